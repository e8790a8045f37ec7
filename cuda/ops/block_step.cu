// block_step on the GPU. Not yet run on a GPU.
//
// Computes  one decoding step of a block from the kernels of its parts (ops/block_step.h); arXiv 2404.08801 section 3.
// Layout    x, y (B, D); weights (out, in) as torch has them; the state as in the ops it belongs to; all compact.
// Mapping   the parts' launchers one after the other on one stream. Linear layers (core/linear.cuh) with inputs ready
//           at the same time share a launch.
// Traffic   every weight, the filled slots of the caches and the state once: bound by reading them, and for one row by
//           the launches, which a graph makes cheap. The weights are read again for every four rows of x.
// Numerics  as the parts; products and residual sums in stat, rounded once, in a fixed order.
// Limits    those of the parts; rows that are no multiple of 16 bytes, or not so aligned, go element by element.
#include "core/linear.cuh"
#include "ops/block_step.h"

namespace megalodon::cuda {
namespace {

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
    linear<T>("block_step linear", s.inner, s.B, stream);
    qk_norm_rope_forward(s.rope, stream);
    silu_mul_forward(s.value, stream);
    chunk_attention_step_forward(s.attention, stream);
    silu_mul_forward(s.gate, stream);
    linear<T>("block_step linear", s.wh2, s.B, stream);
    layer_norm_forward(s.norm, stream);
    linear<T>("block_step linear", s.up, s.B, stream);
    silu_mul_forward(s.hidden, stream);
    linear<T>("block_step linear", s.fc2, s.B, stream);
  });
}

}  // namespace megalodon::cuda
