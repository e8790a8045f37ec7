// The host executor's side of cuda/core/portable.cuh: what a CUDA kernel needs when a host C++ compiler compiles it.
//
// A kernel launched here runs on the CPU, one fiber per CUDA thread, in a schedule chosen by the environment:
// MEGALODON_SIMT_SCHEDULE = forward (default), reverse, random:SEED or lockstep. A mistake the executor can see
// (divergent barrier or shuffle, deadlock, spinning on a block that is not running, in the race build a data race)
// ends the launch with a std::runtime_error that names kernel, block, thread and source line.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace megalodon::simt {

// Where a kernel calls a barrier or a warp operation: threads that meet must come from the same line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;   // of dynamic shared memory
  unsigned cluster = 1;  // blocks that follow each other along x
};

// Whether the GPU that the executor stands for is a Hopper: MEGALODON_SIMT_ARCHITECTURE = 90 (default) or 80.
bool has_wgmma();
// It has so few multiprocessors that in small tests, too, blocks have more to do than one thing.
constexpr int kMultiprocessors = 3;

// Runs `body` once per thread of the grid; returns when all are done. Throws std::runtime_error on a mistake.
void run(const Launch& launch, const std::function<void()>& body);

// The built-in variables of the running thread, rewritten at every switch.
struct Builtins {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Builtins builtins;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers and warp operations -----------------------------------------------------------------------------------

void block_barrier(Site site);

// The lanes of `mask` meet; `combine` then runs once, on the operands of all of them (nullptr where a lane is absent).
enum class WarpOp {
  kSync,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kMatrix,
  kWgmma,
  kWgmmaCommit,
  kWgmmaWait
};
using Combine = void (*)(void* const operands[32], uint32_t mask, uint32_t live);
void warp_meet(uint32_t mask, WarpOp op, void* operand, Combine combine, Site site);
uint32_t lane();

#define MEGALODON_SIMT_UNTRACED __attribute__((no_sanitize("thread")))

template <class T>
struct ShuffleOperand {
  T given;
  T taken;
  int source;
};

template <class T>
MEGALODON_SIMT_UNTRACED void combine_shuffle(void* const operands[32], uint32_t mask, uint32_t live) {
  for (int i = 0; i < 32; ++i) {
    if (operands[i] == nullptr) continue;
    auto* mine = static_cast<ShuffleOperand<T>*>(operands[i]);
    if (((mask & live) >> mine->source & 1) == 0) {
      fail("shuffle: lane %d reads lane %d, which is not in the mask or has exited (mask %08x, live %08x)", i,
           mine->source, mask, live);
    }
    mine->taken = static_cast<ShuffleOperand<T>*>(operands[mine->source])->given;
  }
}

template <class T>
MEGALODON_SIMT_UNTRACED T shuffle(uint32_t mask, WarpOp op, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  ShuffleOperand<T> operand{value, value, source};
  warp_meet(mask, op, &operand, combine_shuffle<T>, site);
  return operand.taken;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site);

// ---- matrix instructions of a warpgroup -----------------------------------------------------------------------------

struct Wgmma {
  float (*widen)(uint16_t bits);
  int columns;
  bool transposed_a, transposed_b;
  bool adds;      // or the sums before do not count
  uint64_t a, b;  // descriptors
  bool has_registers_of_a;
  bool operator==(const Wgmma& other) const {
    return widen == other.widen && columns == other.columns && transposed_a == other.transposed_a &&
           transposed_b == other.transposed_b && adds == other.adds && a == other.a && b == other.b &&
           has_registers_of_a == other.has_registers_of_a;
  }
};

// sums, [2][columns / 4] of each lane, += a b, when it is waited for; until then they hold NaN. registers_of_a, if it
// has them, are read then, too.
void wgmma(const Wgmma& instruction, float* sums, const uint32_t* registers_of_a, Site site);
void wgmma_fence();
void wgmma_commit(Site site);
void wgmma_wait(int groups_left, Site site);
// What this thread has written to shared memory wgmma may read, after a barrier.
void fence_async_proxy();
uint32_t shared_address(const void* shared);

// ---- barriers in shared memory, tensor copies, clusters -----------------------------------------------------------

// A tensor of 16-bit numbers, the first dimension contiguous, and the box of it that a copy takes.
struct TensorMap {
  const void* base;
  int64_t sizes[3];
  int64_t strides[2];  // of the others, in bytes
  int box[3];
};
// Boxes of 64 x 1 x lines; sizes and strides in numbers.
TensorMap tensor_map(const void* base, const int64_t (&sizes)[3], const int64_t (&strides)[2], int lines);

void mbarrier_init(uint64_t* barrier, int count);
void fence_barrier_init();
void mbarrier_arrive(uint64_t* barrier, int count, uint32_t rank);  // at the same place in the block of that rank
void mbarrier_expect(uint64_t* barrier, int bytes);                 // and arrives
void mbarrier_wait(uint64_t* barrier, int parity);
// The box at `at` to the same place of all blocks in `ranks`, zeros beyond the tensor, arriving at their barriers.
void tensor_copy(void* shared, const TensorMap& map, const int (&at)[3], uint64_t* barrier, uint32_t ranks);
uint32_t cluster_rank();
void cluster_arrive();
void cluster_wait();

// ---- memory ---------------------------------------------------------------------------------------------------------

// The block's variable known by `key`, made (full of NaN bytes) when the first thread asks for it.
void* shared_static(const void* key, size_t bytes, size_t alignment, const char* name);
void* shared_dynamic();

// An asynchronous copy of 4, 8 or 16 bytes, zero-filled beyond source_bytes. It takes effect at the wait; until then
// its destination holds NaN bytes.
void async_copy(void* shared, const void* global, int bytes, int source_bytes);
void async_commit();
void async_wait(int groups_left);

// What a spin loop calls at every turn: lets other threads run.
void spin();
// May let other threads run (random schedule).
void maybe_yield();

// The race detector's view of synchronisation; nothing in the other builds.
void on_fence();
void on_atomic(const void* address, int bytes, bool reads, bool writes, bool acquire, bool release);

template <class T>
MEGALODON_SIMT_UNTRACED T load_acquire(const T* address) {
  spin();
  on_atomic(address, sizeof(T), true, false, true, false);
  return *address;
}

template <class T>
MEGALODON_SIMT_UNTRACED void store_release(T* address, T value) {
  on_atomic(address, sizeof(T), false, true, false, true);
  *address = value;
  maybe_yield();
}

template <class T, class Update>
MEGALODON_SIMT_UNTRACED T atomic_update(T* address, Update update) {
  maybe_yield();
  on_atomic(address, sizeof(T), true, true, false, false);
  const T before = *address;
  *address = update(before);
  return before;
}

}  // namespace megalodon::simt

#define threadIdx (::megalodon::simt::builtins.thread)
#define blockIdx (::megalodon::simt::builtins.block)
#define blockDim (::megalodon::simt::builtins.block_dim)
#define gridDim (::megalodon::simt::builtins.grid_dim)
