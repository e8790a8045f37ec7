// CEMA over a few steps, as in decoding: a lane per wavelet, all in double.
#pragma once

#include "core/pack.cuh"
#include "ops/cema_states.cuh"

namespace megalodon::cuda {
namespace {

template <class T>
struct ShortArgs {
  using A = stat_t<T>;
  const T* x;
  Parameters<A> parameters;
  const A* omega;
  const A* h0;
  T* y;
  A* h;
  int64_t D;
  Sequences sequences;
  Parts parts;  // of the sequences
  int lanes;    // of a channel
};

// A channel's wavelets are n = lane and, for kGroups = 2, n = lane + 32; at most kSteps steps.
template <class T, int kSteps, int kGroups>
__global__ void __launch_bounds__(kThreads) cema_short_kernel(ShortArgs<T> args) {
  using A = stat_t<T>;
  const int64_t N = args.parameters.N, D = args.D;
  const int channels = kThreads / args.lanes;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * channels + threadIdx.x / args.lanes;
  const int lane = static_cast<int>(threadIdx.x) % args.lanes;
  const bool exists = d < D;
  double a[kGroups] = {};
  Pair<double> q[kGroups] = {}, g[kGroups] = {}, next[kGroups] = {};
  const auto has = [&](int k) { return exists && lane + 32 * k < N; };
  const auto index = [&](int64_t i, int k) { return 2 * ((i * D + d) * N + lane + 32 * k); };
  const auto read = [&](int64_t i) {
    UNROLL
    for (int k = 0; k < kGroups; ++k) {
      if (args.h0 == nullptr || !has(k)) continue;
      const auto v = load<2>(args.h0 + index(i, k));
      next[k] = {v.v[0], v.v[1]};
    }
  };
  UNROLL
  for (int k = 0; k < kGroups; ++k) {
    if (!has(k)) continue;
    const Wavelet w = args.parameters.wavelet(d, lane + 32 * k);
    a[k] = w.alpha.value;
    q[k] = w.rho * direction_of(w);
    g[k] = gamma_scale(N) * pair_of(args.parameters.gamma_of(d, lane + 32 * k));
  }
  const A omega = exists ? args.omega[d] : A(0);
  const int64_t end = args.parts.end(blockIdx.y);
  int64_t i = args.parts.begin(blockIdx.y);
  if (i < end) read(i);
  for (; i < end; ++i) {
    Pair<double> h[kGroups];
    UNROLL
    for (int k = 0; k < kGroups; ++k) h[k] = next[k];
    if (i + 1 < end) read(i + 1);
    const int64_t begin = args.sequences.begin(i);
    const int L = static_cast<int>(args.sequences.end(i) - begin);
    A x[kSteps];
    double sums[kSteps];
    UNROLL
    for (int t = 0; t < kSteps; ++t) {
      x[t] = t < L && exists ? widen(args.x[(begin + t) * D + d]) : A(0);
      sums[t] = 0;
    }
    UNROLL
    for (int k = 0; k < kGroups; ++k) {
      UNROLL
      for (int t = 0; t < kSteps; ++t) {
        if (t >= L) continue;
        h[k] = step_of(q[k], h[k], a[k] * static_cast<double>(x[t]));
        sums[t] += g[k].re * h[k].re - g[k].im * h[k].im;
      }
      if (has(k)) store(args.h + index(i, k), Pack<A, 2>{static_cast<A>(h[k].re), static_cast<A>(h[k].im)});
    }
    UNROLL
    for (int t = 0; t < kSteps; ++t) {
      if (t >= L) continue;
      A sum = static_cast<A>(sums[t]);
      for (int bits = args.lanes / 2; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
      if (lane == 0 && exists) args.y[(begin + t) * D + d] = narrow<T>(omega * x[t] + sum);
    }
  }
}

template <class T>
void forward_short(const CemaForward& args, void* stream) {
  using A = stat_t<T>;
  constexpr int64_t kWantedThreads = 132 * 2048;
  int lanes = 1;
  while (lanes < 32 && lanes < args.N) lanes *= 2;
  const Parts parts = Parts::of(args.sequences.count, 1, ceil_div(kWantedThreads, args.D * lanes));
  const ShortArgs<T> short_args{static_cast<const T*>(args.x),
                                Parameters<A>::of(args),
                                static_cast<const A*>(args.omega),
                                static_cast<const A*>(args.h0),
                                static_cast<T*>(args.y),
                                static_cast<A*>(args.h),
                                args.D,
                                args.sequences,
                                parts,
                                lanes};
  auto kernel =
      args.N <= 32 ? cema_short_kernel<T, kCemaCudaShortSteps, 1> : cema_short_kernel<T, kCemaCudaShortSteps, 2>;
  if (args.sequences.length <= 1) kernel = args.N <= 32 ? cema_short_kernel<T, 1, 1> : cema_short_kernel<T, 1, 2>;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.D, kThreads / lanes)), static_cast<unsigned>(parts.parts));
  launch({"cema_short", grid, dim3(kThreads), 0, stream}, kernel, short_args);
}

}  // namespace
}  // namespace megalodon::cuda
