// block_step on the GPU. Not yet run on a GPU.
//
// Computes  one decoding step of a block from the kernels of its parts (ops/block_step.h); arXiv 2404.08801 section 3.
// Layout    x, y (B, D); weights (out, in) as torch has them; the state as in the ops it belongs to; all compact.
// Mapping   the parts' launchers one after the other on one stream. Linear layers: a warp per row of the matrix and
//           four rows of x at a time; layers with inputs ready at the same time share a launch.
// Traffic   every weight, the filled slots of the caches and the state once: bound by reading them, and for one row by
//           the launches, which a graph makes cheap. The weights are read again for every four rows of x.
// Numerics  as the parts; products and residual sums in stat, rounded once, in a fixed order.
// Limits    those of the parts; rows that are no multiple of 16 bytes, or not so aligned, go element by element.
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "ops/block_step.h"

namespace megalodon::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kRows = 4;   // of x at a time
constexpr int kAhead = 2;  // packs of the matrix that a lane reads before the first of them is needed

template <int kCount>
struct Linears {
  Linear all[kCount];
};

template <class T, int V, int kCount>
__global__ void __launch_bounds__(32 * kWarps) linear_kernel(Linears<kCount> linears, int64_t B) {
  using A = stat_t<T>;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  int which = 0;
  while (which < kCount && row >= linears.all[which].out) row -= linears.all[which++].out;
  if (which == kCount) return;  // a whole warp
  const Linear& linear = linears.all[which];
  const T* weight = static_cast<const T*>(linear.weight) + row * linear.in;
  const int lane = static_cast<int>(threadIdx.x);
  for (int64_t b = 0; b < B; b += kRows) {
    const T* x = static_cast<const T*>(linear.x) + b * linear.in;
    const int rows = static_cast<int>(B - b < kRows ? B - b : kRows);
    A sums[kRows] = {};
    for (int64_t i = static_cast<int64_t>(lane) * V; i < linear.in; i += kAhead * 32 * V) {
      Pack<T, V> w[kAhead];
      UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (i + a * 32 * V < linear.in) w[a] = load<V>(weight + i + a * 32 * V);
      }
      UNROLL
      for (int a = 0; a < kAhead; ++a) {
        if (i + a * 32 * V >= linear.in) break;
        UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const Pack<T, V> v = load<V>(x + r * linear.in + i + a * 32 * V);
          UNROLL
          for (int j = 0; j < V; ++j) sums[r] += widen(w[a].v[j]) * widen(v.v[j]);
        }
      }
    }
    A y = 0;  // of row b + lane
    UNROLL
    for (int r = 0; r < kRows; ++r) {
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

template <class T, int kCount>
void linear(const Linear (&all)[kCount], int64_t B, void* stream) {
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
  launch({"block_step linear", dim3(static_cast<unsigned>(ceil_div(rows, kWarps))), dim3(32, kWarps), 0, stream},
         kernel, linears, B);
}

__global__ void copy_count_kernel(const int64_t* from, int64_t* to, int64_t B) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < B) to[b] = from[b];
}

}  // namespace

void block_step_forward(const BlockStep& s, void* stream) {
  if (s.B == 0) return;
  visit_activation(s.timenorm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    timestep_norm_forward(s.timenorm, stream);
    launch({"block_step count", dim3(static_cast<unsigned>(ceil_div(s.B, 256))), dim3(256), 0, stream},
           copy_count_kernel, s.timenorm.last_count, s.count, s.B);
    cema_forward(s.cema, stream);
    rms_norm_forward(s.rmsnorm, stream);
    linear<T>(s.inner, s.B, stream);
    qk_norm_rope_forward(s.rope, stream);
    silu_mul_forward(s.value, stream);
    chunk_attention_step_forward(s.attention, stream);
    silu_mul_forward(s.gate, stream);
    linear<T>(s.wh2, s.B, stream);
    layer_norm_forward(s.norm, stream);
    linear<T>(s.up, s.B, stream);
    silu_mul_forward(s.hidden, stream);
    linear<T>(s.fc2, s.B, stream);
  });
}

}  // namespace megalodon::cuda
