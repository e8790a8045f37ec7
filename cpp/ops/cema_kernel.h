// cema_kernel: the impulse response of CEMA without its omega term, k_t = Re sum_n c_n q_n^t, t = 0 .. L-1, with q and
// c = a g from the raw parameters as core/coefficients.h says.
//
// With S_n = sum_t dk_t q_n^t and U_n = sum_t t dk_t q_n^t:
//   dc = conj(S) (as the pair d re, d im),   dlog|q| = Re(c U),   darg q = -Im(c U).
#pragma once

#include "core/isa.h"
#include "core/powers.h"
#include "core/tensor.h"

namespace megalodon {

struct CemaKernelForward {
  DType dtype;        // of everything: float32 or float64
  const void* alpha;  // [D, N]
  const void* delta;  // [D, N]
  const void* theta;  // [D]
  const void* gamma;  // [D, N, 2]
  void* k;            // [D, L]
  void* workspace;    // a slot per task; empty on the GPU
  int64_t D, N, L;

  ChannelTasks tasks() const { return ChannelTasks::of(D, dtype, powers_bytes(N) + wavelet_rows_bytes(N, 2)); }
};

struct CemaKernelBackward {
  DType dtype;        // of everything: float32 or float64
  const void* dk;     // [D, L]
  const void* alpha;  // as in CemaKernelForward
  const void* delta;
  const void* theta;
  const void* gamma;
  void* dalpha;     // [D, N]
  void* ddelta;     // [D, N]
  void* dtheta;     // [D]
  void* dgamma;     // [D, N, 2]
  void* workspace;  // a slot per task; on the GPU double [parts, D, N, 4]: S and U
  int64_t D, N, L;

  ChannelTasks tasks() const { return ChannelTasks::of(D, dtype, powers_bytes(N) + wavelet_rows_bytes(N, 4 + 7)); }
};

// What the blocks of a GPU work on: tiles of a channel's steps, in parts where the channels alone do not fill it.
constexpr int64_t kCemaKernelTile = 4096;
constexpr Parts cema_kernel_parts(int64_t D, int64_t L) {
  const int64_t tiles = ceil_div(L, kCemaKernelTile);
  return Parts::of(tiles, 1, ceil_div(1056, D < 1 ? 1 : D));
}

// The workspace of the backward pass there: S and U of every part.
constexpr int64_t cema_kernel_cuda_bytes(int64_t D, int64_t N, int64_t L) {
  return cema_kernel_parts(D, L).parts * D * N * 4 * 8;
}

template <class Args>
static inline void check_cema_kernel_parameters(Checker& c, Args& args, const DLTensor* alpha_in,
                                                const DLTensor* delta_in, const DLTensor* theta_in,
                                                const DLTensor* gamma_in) {
  const Tensor alpha = c.stat("alpha", alpha_in, {any("D"), any("N")});
  const Dim D = alpha.dim(0, "D");
  const Dim N = alpha.dim(1, "N");
  args.dtype = alpha.dtype;
  args.alpha = alpha.data;
  args.delta = c.tensor("delta", delta_in, alpha.dtype, {D, N}).data;
  args.theta = c.tensor("theta", theta_in, alpha.dtype, {D}).data;
  args.gamma = c.tensor("gamma", gamma_in, alpha.dtype, {D, N, Dim{"2", 2}}).data;
  args.D = D.size;
  args.N = N.size;
}

static inline CemaKernelForward check_cema_kernel(Checker& c, const DLTensor* alpha, const DLTensor* delta,
                                                  const DLTensor* theta, const DLTensor* gamma, int64_t length,
                                                  Outputs&& out) {
  CemaKernelForward args{};
  check_cema_kernel_parameters(c, args, alpha, delta, theta, gamma);
  c.at_least("length", length, 0);
  args.L = length;
  args.k = out.next(c, "k", args.dtype, {args.D, args.L});
  args.workspace = out.workspace(c, c.on_cuda() ? 0 : kMaxVectorBytes + args.tasks().bytes());
  return args;
}

static inline CemaKernelBackward check_cema_kernel_backward(Checker& c, const DLTensor* dk_in, const DLTensor* alpha,
                                                            const DLTensor* delta, const DLTensor* theta,
                                                            const DLTensor* gamma, Outputs&& out) {
  CemaKernelBackward args{};
  check_cema_kernel_parameters(c, args, alpha, delta, theta, gamma);
  const Tensor dk = c.tensor("dk", dk_in, args.dtype, {Dim{"D", args.D, "alpha", 0}, any("L")});
  args.dk = dk.data;
  args.L = dk.shape[1];
  args.dalpha = out.next(c, "dalpha", args.dtype, {args.D, args.N});
  args.ddelta = out.next(c, "ddelta", args.dtype, {args.D, args.N});
  args.dtheta = out.next(c, "dtheta", args.dtype, {args.D});
  args.dgamma = out.next(c, "dgamma", args.dtype, {args.D, args.N, 2});
  const int64_t sums = cema_kernel_cuda_bytes(args.D, args.N, args.L);
  args.workspace = out.workspace(c, c.on_cuda() ? sums : kMaxVectorBytes + args.tasks().bytes());
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL(cema_kernel_forward, CemaKernelForward)
MEGALODON_KERNEL(cema_kernel_backward, CemaKernelBackward)
