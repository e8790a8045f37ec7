// The kernels of cema's gradients: the walks, and from their sums to the gradients of the raw parameters.
#pragma once

#include "core/reduce.cuh"
#include "ops/cema_scan.cuh"
#include "ops/cema_states.cuh"

namespace megalodon::cuda {
namespace {

// Two independent scans, one half of the grid each: the longer one first.
template <class T, int kLanes, bool kEnds>
__global__ void __launch_bounds__(kThreads) cema_backward_kernel(ScanArgs<T> sensitivity, ScanArgs<T> adjoint) {
  DYNAMIC_SHARED(T, ring);
  if (blockIdx.z == 0) {
    scan<T, kLanes, Sensitivity<T>, kEnds>(sensitivity, ring);
  } else {
    scan<T, kLanes, Adjoint<T>, kEnds>(adjoint, ring);
  }
}

template <class A>
struct GradientArgs {
  const double* sums;  // [count, block_sums]: see kSumQ
  int64_t count, block_sums, D;
  bool has_input_sums;  // if not, dS/da is Re (g dS/dg) / a: from h0 = 0 on, y is in proportion to both, and dh is 0
  A *dalpha, *ddelta, *dtheta, *dgamma, *domega;
};

// A warp per channel, a lane per wavelet.
template <class A>
__global__ void __launch_bounds__(kThreads) cema_gradients_kernel(GradientArgs<A> args, Parameters<A> parameters) {
  const int64_t N = parameters.N, row = args.D * N;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = lane_index();
  if (d >= args.D) return;  // a whole warp
  const auto sum = [&](int64_t i) {
    double total = 0;
    for (int64_t p = 0; p < args.count; ++p) total += args.sums[p * args.block_sums + i];
    return total;
  };
  const double scale = gamma_scale(N);
  double dtheta = 0;
  for (int64_t n = lane; n < N; n += 32) {
    const int64_t i = d * N + n;
    const Wavelet w = parameters.wavelet(d, n);
    const double a = input_of(w), output_re = sum(kSumG * row + i), output_im = sum((kSumG + 1) * row + i);
    const Pair<double> dq{a * sum(kSumQ * row + i), -a * sum((kSumQ + 1) * row + i)};
    const Pair<double> dg{a * output_re, -a * output_im};
    const Complex gamma = parameters.gamma_of(d, n);
    const double da =
        args.has_input_sums ? sum(kSumA * row + i) : scale * (gamma.re * output_re - gamma.im * output_im);
    const Pair<double> u = direction_of(w);
    const double drho = dq.re * u.re + dq.im * u.im, dphi = w.rho * (dq.im * u.re - dq.re * u.im);
    args.dalpha[i] = static_cast<A>(w.alpha.slope() * (da - w.delta.value * drho));
    args.ddelta[i] = static_cast<A>(-(w.alpha.value * w.delta.slope() * drho));
    args.dgamma[2 * i] = static_cast<A>(scale * dg.re);
    args.dgamma[2 * i + 1] = static_cast<A>(scale * dg.im);
    dtheta += static_cast<double>(n + 1) / static_cast<double>(N) * kTwoPi * w.theta.slope() * dphi;
  }
  dtheta = warp_sum(dtheta);
  if (lane > 0) return;
  args.dtheta[d] = static_cast<A>(dtheta);
  args.domega[d] = static_cast<A>(sum(kSumOmega * row + d));
}

}  // namespace
}  // namespace megalodon::cuda
