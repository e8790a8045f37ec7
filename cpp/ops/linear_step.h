// linear_step: y_b = W x_b + bias for the rows of a decoding step. Inference only.
#pragma once

#include "core/isa.h"
#include "core/linear.h"
#include "core/tensor.h"

namespace megalodon {

struct LinearStep {
  DType dtype;       // of all tensors
  int64_t B;         // rows of x
  Linear linear[1];  // x [B, in], weight [out, in], bias [out] or nullptr, y [B, out]
};

static inline LinearStep check_linear_step(Checker& c, const DLTensor* x_in, const DLTensor* weight_in,
                                           const DLTensor* bias_in, Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("in")});
  const Tensor weight = c.tensor("weight", weight_in, x.dtype, {any("out"), x.dim(1, "in")});
  const Dim rows = weight.dim(0, "out");
  LinearStep args{};
  args.dtype = x.dtype;
  args.B = x.shape[0];
  Linear& linear = args.linear[0];
  linear.x = x.data;
  linear.weight = weight.data;
  linear.bias = c.optional("bias", bias_in, x.dtype, {rows}).data;
  linear.in = x.shape[1];
  linear.out = rows.size;
  linear.y = out.next(c, "y", x.dtype, {args.B, linear.out});
  const int64_t stat = size_of(stat_dtype(x.dtype));
  const bool widens = size_of(x.dtype) < stat && !c.on_cuda();
  linear.wide = out.workspace(c, widens ? args.B * linear.in * stat : 0);
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(linear_step_forward, LinearStep)
