// What the kernels that work row by row share: how many threads a row gets, and the walk over its columns.
#pragma once

#include "core/pack.cuh"
#include "core/portable.cuh"
#include "core/reduce.cuh"

namespace megalodon::cuda {

// Packs of a row that each of its threads holds in registers; what is beyond is read a second time.
constexpr int kHeld = 4;
constexpr int kMaxRowThreads = 256;

struct RowPlan {
  int threads;  // of a row: 32, 64, 128 or 256
  int rows;     // side by side in a block: 4 if a warp suffices for one, else 1

  // The fewest threads that hold a row of D elements in packs of V.
  static RowPlan of(int64_t D, int V) {
    int threads = 32;
    while (threads < kMaxRowThreads && static_cast<int64_t>(threads) * V * kHeld < D) threads *= 2;
    return {threads, threads == 32 ? 4 : 1};
  }
  dim3 block() const { return dim3(threads, rows); }
  // Blocks for this many rows; a kernel loops where there are more rows than a grid can have.
  dim3 grid(int64_t count) const {
    const int64_t blocks = (count + rows - 1) / rows;
    return dim3(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
  }
};

// The calling thread's first row, and the distance to its next one.
DEVICE int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
DEVICE int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

// held(k, i) for the packs in registers (k is known at compile time once unrolled), rest(i) for those beyond; i is the
// pack's first column.
template <int V, class Held, class Rest>
DEVICE void for_columns(int64_t D, Held&& held, Rest&& rest) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * V;
  int64_t i = static_cast<int64_t>(threadIdx.x) * V;
  UNROLL
  for (int k = 0; k < kHeld; ++k) {
    if (i < D) held(k, i);
    i += step;
  }
  for (; i < D; i += step) rest(i);
}

}  // namespace megalodon::cuda
