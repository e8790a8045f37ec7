// rms_norm: y = x * rstd * (weight + 1), rstd = 1 / sqrt(mean over D of x^2 + eps), for every row of D elements.
//
// With u = dy * (weight + 1) and xh = x * rstd:
//   dx = rstd * (u - xh * mean(u * xh)),   dweight = sum over rows of dy * xh.
#pragma once

#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace megalodon {

struct RmsNormForward {
  DType dtype;         // of x and y
  const void* x;       // [R, D]
  const void* weight;  // [D] stat, nullptr: scale 1
  void* y;             // [R, D]
  void* rstd;          // [R] stat
  int64_t R, D;
  double eps;
};

struct RmsNormBackward {
  DType dtype;         // of dy, x and dx
  const void* dy;      // [R, D]
  const void* x;       // [R, D]
  const void* weight;  // [D] stat, nullptr: scale 1
  const void* rstd;    // [R] stat
  void* dx;            // [R, D]
  void* dweight;       // [D] stat, nullptr when weight is
  void* workspace;     // [parts, D] stat: partial sums of dweight
  int64_t R, D;
  Parts parts;  // of the rows
};

static inline RmsNormForward check_rms_norm(Checker& c, const DLTensor* x_in, const DLTensor* weight_in, double eps,
                                            Outputs&& out) {
  const Tensor x = c.rows("x", x_in);
  const Dim D = x.dim(x.ndim - 1, "D");
  const DType stat = stat_dtype(x.dtype);
  const Tensor weight = c.optional("weight", weight_in, stat, {D});
  c.positive("eps", eps, stat);
  RmsNormForward args{};
  args.dtype = x.dtype;
  args.x = x.data;
  args.weight = weight.data;
  args.y = out.like(c, "y", x);
  args.rstd = out.next(c, "rstd", stat, x.shape, x.ndim - 1);
  args.D = D.size;
  args.R = x.rows();
  args.eps = eps;
  return args;
}

static inline RmsNormBackward check_rms_norm_backward(Checker& c, const DLTensor* dy_in, const DLTensor* x_in,
                                                      const DLTensor* weight_in, const DLTensor* rstd_in,
                                                      Outputs&& out) {
  const Tensor x = c.rows("x", x_in);
  const Tensor dy = c.like("dy", dy_in, x);
  const Dim D = x.dim(x.ndim - 1, "D");
  const DType stat = stat_dtype(x.dtype);
  const Tensor weight = c.optional("weight", weight_in, stat, {D});
  const Tensor rstd = c.tensor("rstd", rstd_in, stat, x.shape, x.ndim - 1);
  RmsNormBackward args{};
  args.dtype = x.dtype;
  args.dy = dy.data;
  args.x = x.data;
  args.weight = weight.data;
  args.rstd = rstd.data;
  args.D = D.size;
  args.R = x.rows();
  args.dx = out.like(c, "dx", x);
  args.dweight = out.gradient(c, "dweight", weight, stat);
  if (!weight.present) args.dweight = nullptr;
  args.parts = Parts::of_rows(args.R, args.D, c.on_cuda());
  args.workspace = out.workspace(c, weight.present ? args.parts.parts * args.D * size_of(stat) : 0);
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(rms_norm_forward, RmsNormForward)
MEGALODON_KERNEL_BF16(rms_norm_backward, RmsNormBackward)
