// layer_norm: y = (x - mean) * rstd * (weight + 1) + bias for every row of D elements, rstd = 1 / sqrt(var + eps) with
// the biased variance; weight and bias both or neither.
//
// With u = dy * (weight + 1) and xh = (x - mean) * rstd:
//   dx = rstd * (u - mean(u) - xh * mean(u * xh)),   dweight = sum over rows of dy * xh,   dbias = sum over rows of dy.
#pragma once

#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace megalodon {

struct LayerNormForward {
  DType dtype;         // of x and y
  const void* x;       // [R, D]
  const void* weight;  // [D] stat, nullptr: scale 1
  const void* bias;    // [D] stat, nullptr: 0
  void* y;             // [R, D]
  void* mean;          // [R] stat
  void* rstd;          // [R] stat
  int64_t R, D;
  double eps;
};

struct LayerNormBackward {
  DType dtype;         // of dy, x and dx
  const void* dy;      // [R, D]
  const void* x;       // [R, D]
  const void* weight;  // [D] stat, nullptr: scale 1, no parameter gradients
  const void* mean;    // [R] stat
  const void* rstd;    // [R] stat
  void* dx;            // [R, D]
  void* dweight;       // [D] stat, nullptr when weight is
  void* dbias;         // [D] stat, nullptr when weight is
  void* workspace;     // [2, parts, D] stat: partial sums of dweight, then of dbias
  int64_t R, D;
  Parts parts;  // of the rows
};

static inline LayerNormForward check_layer_norm(Checker& c, const DLTensor* x_in, const DLTensor* weight_in,
                                                const DLTensor* bias_in, double eps, Outputs&& out) {
  const Tensor x = c.rows("x", x_in);
  const Dim D = x.dim(x.ndim - 1, "D");
  const DType stat = stat_dtype(x.dtype);
  const Tensor weight = c.optional("weight", weight_in, stat, {D});
  const Tensor bias = c.optional("bias", bias_in, stat, {D});
  c.require(weight.present == bias.present, "weight and bias", "given both or neither",
            weight.present ? "weight alone" : "bias alone");
  c.positive("eps", eps, stat);
  LayerNormForward args{};
  args.dtype = x.dtype;
  args.x = x.data;
  args.weight = weight.data;
  args.bias = bias.data;
  args.y = out.like(c, "y", x);
  args.mean = out.next(c, "mean", stat, x.shape, x.ndim - 1);
  args.rstd = out.next(c, "rstd", stat, x.shape, x.ndim - 1);
  args.D = D.size;
  args.R = x.rows();
  args.eps = eps;
  return args;
}

static inline LayerNormBackward check_layer_norm_backward(Checker& c, const DLTensor* dy_in, const DLTensor* x_in,
                                                          const DLTensor* weight_in, const DLTensor* mean_in,
                                                          const DLTensor* rstd_in, Outputs&& out) {
  const Tensor x = c.rows("x", x_in);
  const Tensor dy = c.like("dy", dy_in, x);
  const Dim D = x.dim(x.ndim - 1, "D");
  const DType stat = stat_dtype(x.dtype);
  const Tensor weight = c.optional("weight", weight_in, stat, {D});
  LayerNormBackward args{};
  args.dtype = x.dtype;
  args.dy = dy.data;
  args.x = x.data;
  args.weight = weight.data;
  args.mean = c.tensor("mean", mean_in, stat, x.shape, x.ndim - 1).data;
  args.rstd = c.tensor("rstd", rstd_in, stat, x.shape, x.ndim - 1).data;
  args.D = D.size;
  args.R = x.rows();
  args.dx = out.like(c, "dx", x);
  args.dweight = out.gradient(c, "dweight", weight, stat);
  args.dbias = out.gradient(c, "dbias", weight, stat);
  if (!weight.present) args.dweight = args.dbias = nullptr;
  args.parts = Parts::of_rows(args.R, args.D, c.on_cuda());
  args.workspace = out.workspace(c, weight.present ? 2 * args.parts.parts * args.D * size_of(stat) : 0);
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(layer_norm_forward, LayerNormForward)
MEGALODON_KERNEL_BF16(layer_norm_backward, LayerNormBackward)
