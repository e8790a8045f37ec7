// Work by groups of channels, with scratch memory per task: the shape of it for check(), the loop for the kernels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/subnormals.h"

namespace megalodon {

constexpr int64_t kMaxVectorBytes = 64;

// D channels in groups of one widest vector, the groups in at most 64 tasks. A range of tasks uses the slot of its
// first task, so only as many slots are touched as there are threads.
struct ChannelTasks {
  int64_t D;
  int64_t width;       // channels of a group
  int64_t slot_bytes;  // scratch memory of a task, a multiple of kMaxVectorBytes
  Parts parts;

  static constexpr int64_t kMaxBytes = int64_t{1} << 30;  // of all slots, while there are at least 8

  static constexpr ChannelTasks of(int64_t D, DType stat, int64_t slot_bytes) {
    const int64_t width = kMaxVectorBytes / size_of(stat);
    const int64_t groups = (D + width - 1) / width;
    const int64_t affordable = slot_bytes > 0 ? kMaxBytes / slot_bytes : Parts::kMaxParts;
    const int64_t most = affordable < 8 ? 8 : affordable > Parts::kMaxParts ? Parts::kMaxParts : affordable;
    return {D, width, slot_bytes, {groups, groups < most ? groups : most}};
  }
  constexpr int64_t groups() const { return parts.count; }
  constexpr int64_t bytes() const { return parts.parts * slot_bytes; }
};

// `bytes` rounded up so that what follows is aligned like a vector.
constexpr int64_t aligned_bytes(int64_t bytes) {
  return (bytes + kMaxVectorBytes - 1) / kMaxVectorBytes * kMaxVectorBytes;
}

namespace cpu::MEGALODON_ISA {

// Workspaces are allocated kMaxVectorBytes larger than needed, so that they can start at an aligned address.
inline char* aligned(void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return static_cast<char*>(memory) + (kMaxVectorBytes - address % kMaxVectorBytes) % kMaxVectorBytes;
}

// A slot handed out from its start.
class Slot {
 public:
  explicit Slot(char* begin) : next_(begin) {}
  template <class V>
  V* take(int64_t count) {
    char* taken = next_;
    next_ += aligned_bytes(count * static_cast<int64_t>(sizeof(V)));
    return reinterpret_cast<V*>(taken);
  }

 private:
  char* next_;
};

// Calls body(d, lanes, slot) for every kLanes<A> channels: the first channel, how many there are, the scratch memory.
// Subnormal numbers count as zeros in there.
template <class A, class Body>
void for_channels(const ChannelTasks& tasks, char* slots, Body&& body) {
  constexpr int64_t W = kLanes<A>;
  parallel_for(tasks.parts.parts, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    char* slot = slots + begin * tasks.slot_bytes;
    for (int64_t group = tasks.parts.begin(begin); group < tasks.parts.end(end - 1); ++group) {
      const int64_t last = (group + 1) * tasks.width < tasks.D ? (group + 1) * tasks.width : tasks.D;
      for (int64_t d = group * tasks.width; d < last; d += W) body(d, last - d < W ? last - d : W, Slot(slot));
    }
  });
}

// One vector of channels of a step: all lanes where kFull, `lanes` of them otherwise. A step `ahead` elements further
// is fetched meanwhile: steps lie D elements apart, which the hardware does not foresee.
template <bool kFull, class T>
inline Vec<stat_t<T>> load_step(const T* p, int64_t lanes, int64_t ahead) {
  __builtin_prefetch(p + ahead);
  if constexpr (kFull) return load(p);
  return load(p, lanes);
}
template <bool kFull, class T>
inline void store_step(T* p, Vec<stat_t<T>> v, int64_t lanes, int64_t ahead) {
  __builtin_prefetch(p + ahead, 1);
  if constexpr (kFull) return store(p, v);
  store(p, v, lanes);
}

// Calls body(std::true_type or std::false_type): whether all lanes of the vector exist.
template <class A, class Body>
void with_lanes(int64_t lanes, Body&& body) {
  if (lanes == kLanes<A>) return body(std::true_type{});
  body(std::false_type{});
}

// rows[lane * stride + t] -> tile[t], for t < count; lanes that do not exist are 0.
template <class A>
void gather_lanes(const A* rows, int64_t stride, int64_t lanes, int64_t count, Vec<A>* tile) {
  constexpr int64_t W = kLanes<A>;
  A* out = reinterpret_cast<A*>(tile);
  if (lanes < W) std::memset(out, 0, count * sizeof(Vec<A>));
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t t = 0; t < count; ++t) out[t * W + lane] = rows[lane * stride + t];
  }
}

template <class A>
void scatter_lanes(const Vec<A>* tile, int64_t lanes, int64_t count, A* rows, int64_t stride) {
  constexpr int64_t W = kLanes<A>;
  const A* in = reinterpret_cast<const A*>(tile);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t t = 0; t < count; ++t) rows[lane * stride + t] = in[t * W + lane];
  }
}

}  // namespace cpu::MEGALODON_ISA
}  // namespace megalodon
