// The loop that uses all threads. Kernels never make threads: the engine is ours or the caller's (megalodon.h).
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__CUDACC__)
#define MEGALODON_HOST_DEVICE __host__ __device__
#else
#define MEGALODON_HOST_DEVICE
#endif

namespace megalodon {

using Task = void (*)(int64_t begin, int64_t end, void* context);

void run_parallel(int64_t count, int64_t grain, Task task, void* context);

// Calls body(begin, end) on disjoint ranges that cover [0, count), at least `grain` items each (but for the last).
// Which thread gets which range is not defined, so what a kernel computes for an item must not depend on the range.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  run_parallel(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

// The same for items of unequal work: a thread takes `grain` of them, the next ones whenever it is done.
template <class Body>
void parallel_take(int64_t count, int64_t grain, Body&& body) {
  std::atomic<int64_t> next{0};
  const int64_t turns = (count + grain - 1) / grain;
  parallel_for(turns, 1, [&](int64_t first, int64_t last) {
    if (last - first == turns) return body(int64_t{0}, count);  // one thread has all
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
      body(begin, begin + grain < count ? begin + grain : count);
    }
  });
}

// A range of `count` items cut into at most `most` parts of at least `least` items, by its size alone: partial sums
// over these parts, added in order, are the same numbers whatever the number of threads.
struct Parts {
  static constexpr int64_t kMaxParts = 64;  // unless said otherwise
  int64_t count;
  int64_t parts;

  static constexpr Parts of(int64_t count, int64_t least, int64_t most = kMaxParts) {
    const int64_t wanted = (count + least - 1) / least;
    return {count, wanted < 1 ? 1 : wanted > most ? most : wanted};
  }
  // Of the rows of D elements whose parameter gradients are summed. On the GPU a part is what 32 to 256 threads work
  // on: enough of them to fill it.
  static constexpr Parts of_rows(int64_t count, int64_t D, bool on_cuda) {
    return on_cuda ? of(count, 16, D > 1024 ? 512 : 2048) : of(count, 32);
  }
  MEGALODON_HOST_DEVICE constexpr int64_t begin(int64_t part) const { return count * part / parts; }
  MEGALODON_HOST_DEVICE constexpr int64_t end(int64_t part) const { return count * (part + 1) / parts; }
};

MEGALODON_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t d) { return n <= 0 ? 0 : (n - 1) / d + 1; }
MEGALODON_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace megalodon
