// linear_step on the GPU. Not yet run on a GPU.
//
// Computes  y = x W^T + bias for few rows (ops/linear_step.h).
// Layout    x, y (B, in or out); W (out, in) as torch has it; all compact.
// Mapping   a warp per row of W and four rows of x at a time (core/linear.cuh).
// Traffic   W once for every four rows of x: bound by reading it.
// Numerics  sums in stat, rounded once, in a fixed order.
// Limits    any B, in and out; rows that are no multiple of 16 bytes, or not so aligned, go element by element.
#include "core/linear.cuh"
#include "ops/linear_step.h"

namespace megalodon::cuda {

void linear_step_forward(const LinearStep& args, void* stream) {
  if (args.B == 0) return;
  visit_activation(args.dtype,
                   [&](auto tag) { linear<typename decltype(tag)::type>("linear_step", args.linear, args.B, stream); });
}

}  // namespace megalodon::cuda
