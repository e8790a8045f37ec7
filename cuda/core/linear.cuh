// Products of matrices with a few vectors on the GPU: a warp per row of the matrix and four rows of x at a time; the
// matrix is read again for every four. What is no multiple of 16 bytes, or not so aligned, goes element by element.
#pragma once

#include "core/linear.h"
#include "core/pack.cuh"
#include "core/reduce.cuh"

namespace megalodon::cuda {
namespace {

constexpr int kLinearWarps = 8;  // of a block
constexpr int kLinearRows = 4;   // of x at a time
constexpr int kLinearAhead = 2;  // packs of the matrix that a lane reads before the first of them is needed

template <int kCount>
struct Linears {
  Linear all[kCount];
};

template <class T, int V, int kCount>
__global__ void __launch_bounds__(32 * kLinearWarps) linear_kernel(Linears<kCount> linears, int64_t B) {
  using A = stat_t<T>;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kLinearWarps + threadIdx.y;
  int which = 0;
  while (which < kCount && row >= linears.all[which].out) row -= linears.all[which++].out;
  if (which == kCount) return;  // a whole warp
  const Linear& linear = linears.all[which];
  const T* weight = static_cast<const T*>(linear.weight) + row * linear.in;
  const int lane = static_cast<int>(threadIdx.x);
  for (int64_t b = 0; b < B; b += kLinearRows) {
    const T* x = static_cast<const T*>(linear.x) + b * linear.in;
    const int rows = static_cast<int>(B - b < kLinearRows ? B - b : kLinearRows);
    A sums[kLinearRows] = {};
    for (int64_t i = static_cast<int64_t>(lane) * V; i < linear.in; i += kLinearAhead * 32 * V) {
      Pack<T, V> w[kLinearAhead];
      UNROLL
      for (int a = 0; a < kLinearAhead; ++a) {
        if (i + a * 32 * V < linear.in) w[a] = load<V>(weight + i + a * 32 * V);
      }
      UNROLL
      for (int a = 0; a < kLinearAhead; ++a) {
        if (i + a * 32 * V >= linear.in) break;
        UNROLL
        for (int r = 0; r < kLinearRows; ++r) {
          if (r >= rows) break;
          const Pack<T, V> v = load<V>(x + r * linear.in + i + a * 32 * V);
          UNROLL
          for (int j = 0; j < V; ++j) sums[r] += widen(w[a].v[j]) * widen(v.v[j]);
        }
      }
    }
    A y = 0;  // of row b + lane
    UNROLL
    for (int r = 0; r < kLinearRows; ++r) {
      const A sum = warp_sum(sums[r]);
      if (lane == r) y = sum;
    }
    if (lane >= rows) continue;
    if (linear.bias != nullptr) y += widen(static_cast<const T*>(linear.bias)[row]);
    if (linear.scale != nullptr) y *= widen(static_cast<const T*>(linear.scale)[row]);
    const int64_t at = (b + lane) * linear.out + row;
    for (const void* added : linear.added) {
      if (added != nullptr) y += widen(static_cast<const T*>(added)[at]);
    }
    static_cast<T*>(linear.y)[at] = narrow<T>(y);
  }
}

// Several of them side by side in one launch.
template <class T, int kCount>
void linear(const char* name, const Linear (&all)[kCount], int64_t B, void* stream) {
  Linears<kCount> linears;
  int64_t rows = 0;
  bool packed = true;
  for (int i = 0; i < kCount; ++i) {
    linears.all[i] = all[i];
    rows += all[i].out;
    packed = packed && can_pack<T>(all[i].in, all[i].weight, all[i].x);
  }
  if (rows == 0) return;
  const auto kernel = packed ? linear_kernel<T, kPackOf<T>, kCount> : linear_kernel<T, 1, kCount>;
  launch({name, dim3(static_cast<unsigned>(ceil_div(rows, kLinearWarps))), dim3(32, kLinearWarps), 0, stream}, kernel,
         linears, B);
}

}  // namespace
}  // namespace megalodon::cuda
