// fft_conv: causal convolution of every channel with its own kernel, y_t = sum over s <= t of k_s x_(t-s).
//
// The gradients are convolutions too, in reversed time r_t = dy_(L-1-t):
//   dx_(L-1-t) = sum over s <= t of k_s r_(t-s),   dk_(L-1-t) = sum over the batch and s <= t of x_s r_(t-s).
#pragma once

#include "core/fft.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace megalodon {

struct FftConvForward {
  DType dtype;      // of x and y
  const void* x;    // [B, L, D]
  const void* k;    // [D, L] stat
  void* y;          // [B, L, D]
  void* workspace;  // the constants, then a slot per task
  int64_t B, L, D;

  static constexpr int64_t kArrays = 2;
  int64_t points() const { return fft_points(B * D == 0 ? 0 : L); }
  ChannelTasks tasks() const { return ChannelTasks::of(D, stat_dtype(dtype), kArrays * fft_array_bytes(points())); }
  int64_t table_bytes() const { return fft_table_bytes(points(), stat_dtype(dtype)); }
  int64_t workspace_bytes() const { return kMaxVectorBytes + table_bytes() + tasks().bytes(); }
};

struct FftConvBackward {
  DType dtype;      // of dy, x and dx
  const void* dy;   // [B, L, D]
  const void* x;    // [B, L, D]
  const void* k;    // [D, L] stat
  void* dx;         // [B, L, D]
  void* dk;         // [D, L] stat
  void* workspace;  // as in FftConvForward
  int64_t B, L, D;

  static constexpr int64_t kArrays = 4;
  int64_t points() const { return fft_points(D == 0 ? 0 : L); }
  ChannelTasks tasks() const { return ChannelTasks::of(D, stat_dtype(dtype), kArrays * fft_array_bytes(points())); }
  int64_t table_bytes() const { return fft_table_bytes(points(), stat_dtype(dtype)); }
  int64_t workspace_bytes() const { return kMaxVectorBytes + table_bytes() + tasks().bytes(); }
};

static inline FftConvForward check_fft_conv(Checker& c, const DLTensor* x_in, const DLTensor* k_in, Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  const Tensor k = c.tensor("k", k_in, stat_dtype(x.dtype), {x.dim(2, "D"), x.dim(1, "L")});
  FftConvForward args{};
  args.dtype = x.dtype;
  args.x = x.data;
  args.k = k.data;
  args.B = x.shape[0];
  args.L = x.shape[1];
  args.D = x.shape[2];
  args.y = out.like(c, "y", x);
  args.workspace = out.workspace(c, args.workspace_bytes());
  return args;
}

static inline FftConvBackward check_fft_conv_backward(Checker& c, const DLTensor* dy_in, const DLTensor* x_in,
                                                      const DLTensor* k_in, Outputs&& out) {
  const Tensor x = c.activation("x", x_in, {any("B"), any("L"), any("D")});
  const Tensor dy = c.like("dy", dy_in, x);
  const Tensor k = c.tensor("k", k_in, stat_dtype(x.dtype), {x.dim(2, "D"), x.dim(1, "L")});
  FftConvBackward args{};
  args.dtype = x.dtype;
  args.dy = dy.data;
  args.x = x.data;
  args.k = k.data;
  args.B = x.shape[0];
  args.L = x.shape[1];
  args.D = x.shape[2];
  args.dx = out.like(c, "dx", x);
  args.dk = out.like(c, "dk", k);
  args.workspace = out.workspace(c, args.workspace_bytes());
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL(fft_conv_forward, FftConvForward)
MEGALODON_KERNEL(fft_conv_backward, FftConvBackward)
