// Sums over warps, over the threads of a row, and over parts: always in the same order, so that results repeat.
#pragma once

#include "core/portable.cuh"

namespace megalodon::cuda {

template <class A>
DEVICE A warp_sum(A value) {
  UNROLL
  for (int bits = 16; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
  return value;
}

// The sum over the threads of one row of the block (threadIdx.x), known to all of them. A row of more than one warp is
// alone in its block (blockDim.y = 1), since it needs the block's barriers.
template <class A>
DEVICE A row_sum(A value) {
  SHARED(A, partial, [32]);
  value = warp_sum(value);
  if (blockDim.x == 32) return value;
  sync_block();  // the sums of an earlier call have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  sync_block();  // every warp's sum is there
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value += partial[warp];
  return value;
}

// out[i] = the sum over p < parts of partial[p * n + i]. A block adds 32 columns; each of its 32 warps takes every
// 32nd part, and the warps' sums are added in order.
template <class A>
__global__ void __launch_bounds__(1024) add_parts_kernel(const A* partial, int64_t parts, int64_t n, A* out) {
  SHARED(A, sums, [32][32]);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  A sum = 0;
  if (i < n) {
    for (int64_t p = threadIdx.y; p < parts; p += 32) sum += partial[p * n + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  sync_block();  // every warp's sums are there
  if (threadIdx.y > 0 || i >= n) return;
  for (int y = 1; y < 32; ++y) sum += sums[y][threadIdx.x];
  out[i] = sum;
}

template <class A>
void add_parts(const A* partial, int64_t parts, int64_t n, A* out, void* stream) {
  if (n == 0) return;
  launch({"add_parts", dim3(static_cast<unsigned>((n + 31) / 32)), dim3(32, 32), 0, stream}, add_parts_kernel<A>,
         partial, parts, n, out);
}

}  // namespace megalodon::cuda
