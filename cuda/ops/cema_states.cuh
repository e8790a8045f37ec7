// What the scans of CEMA read besides their inputs: the table of coefficients, and the states with which chunks of time
// begin, from those with which the chunks before them end; the last state in the same way.
#pragma once

#include "core/pack.cuh"
#include "ops/cema_waves.cuh"

namespace megalodon::cuda {
namespace {

constexpr double kLeastInput = 1e-20;

// ---- coefficients ---------------------------------------------------------------------------------------------------

DEVICE Pair<double> pair_of(const Complex& v) { return {v.re, v.im}; }

DEVICE double input_of(const Wavelet& w) { return w.alpha.value < kLeastInput ? kLeastInput : w.alpha.value; }

// cos(arg q), sin(arg q).
DEVICE Pair<double> direction_of(const Wavelet& w) {
  const double quadrant = rint(4 * w.turns);
  Pair<double> v;
  sin_cos_near((w.turns - 0.25 * quadrant) * kTwoPi, static_cast<unsigned>(static_cast<int>(quadrant)), v.im, v.re);
  return v;
}

template <class A>
__global__ void __launch_bounds__(kThreads) cema_table_kernel(Parameters<A> parameters, int64_t D, double* table) {
  const int64_t N = parameters.N, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= D * N) return;
  const int64_t d = i / N, n = i % N;
  const Wavelet w = parameters.wavelet(d, n);
  const Pair<double> q = w.rho * direction_of(w), g = gamma_scale(N) * pair_of(parameters.gamma_of(d, n));
  const double row[kTableRows] = {input_of(w), q.re, q.im, g.re, g.im};
  UNROLL
  for (int r = 0; r < kTableRows; ++r) table[r * D * N + i] = row[r];
}

// ---- from the states chunks end with to those they begin with -------------------------------------------------------

template <class A>
struct CarryArgs {
  const A* start;   // [B, D, N, 2] or nullptr: the state at the very beginning
  double* carries;  // as in ScanArgs
};

// state <- end + q^s state per chunk, and for the derivative e by q: e <- end_e + q^s e + s q^(s-1) state.
template <class A, int kStates, bool kAdjoint>
DEVICE void carry(const CarryArgs<A>& args, const Wavelet& w, int64_t i, int64_t b, int64_t wavelets, int64_t chunks,
                  int64_t length) {
  constexpr int kAhead = 4;  // chunks read before the first of them is needed
  const auto steps = static_cast<double>(length);
  Pair<double> all = pair_of(w.power(steps)), first{};
  if constexpr (kAdjoint) all = conj(all);
  if constexpr (kStates == 2) first = steps * pair_of(w.power(steps - 1));
  Pair<double> state[kStates] = {};
  if (args.start != nullptr) {
    const auto v = load<2>(args.start + 2 * (b * wavelets + i));
    const double a = kAdjoint ? 1 : input_of(w);
    state[0] = {v.v[0] / a, v.v[1] / a};
  }
  const auto slot = [&](int64_t chunk) { return args.carries + ((b * chunks + chunk) * wavelets + i) * 2 * kStates; };
  for (int64_t chunk = 0; chunk < chunks; chunk += kAhead) {
    Pack<double, 2 * kStates> ends[kAhead];
    UNROLL
    for (int c = 0; c < kAhead; ++c) {
      if (chunk + c < chunks) ends[c] = load<2 * kStates>(slot(chunk + c));
    }
    UNROLL
    for (int c = 0; c < kAhead; ++c) {
      if (chunk + c >= chunks) continue;
      if constexpr (kStates == 2) {
        state[1] = Pair<double>{ends[c].v[2], ends[c].v[3]} + (all * state[1] + first * state[0]);
      }
      state[0] = Pair<double>{ends[c].v[0], ends[c].v[1]} + all * state[0];
      Pack<double, 2 * kStates> next;
      UNROLL
      for (int s = 0; s < kStates; ++s) {
        next.v[2 * s] = state[s].re;
        next.v[2 * s + 1] = state[s].im;
      }
      store(slot(chunk + c), next);
    }
  }
}

// chunks: those that have one before them.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_forward_carry_kernel(CarryArgs<A> args, Parameters<A> parameters, int64_t D, int64_t chunks, int64_t length) {
  const int64_t N = parameters.N, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= D * N) return;
  carry<A, 1, false>(args, parameters.wavelet(i / N, i % N), i, blockIdx.y, D * N, chunks, length);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_backward_carry_kernel(CarryArgs<A> sensitivity, CarryArgs<A> adjoint, Parameters<A> parameters, int64_t D,
                               int64_t chunks, int64_t length) {
  const int64_t N = parameters.N, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= D * N) return;
  const Wavelet w = parameters.wavelet(i / N, i % N);
  if (blockIdx.z == 0) {
    carry<A, 2, false>(sensitivity, w, i, blockIdx.y, D * N, chunks, length);
  } else {
    carry<A, 1, true>(adjoint, w, i, blockIdx.y, D * N, chunks, length);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_adjoint_carry_kernel(CarryArgs<A> args, Parameters<A> parameters, int64_t D, int64_t chunks, int64_t length) {
  const int64_t N = parameters.N, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= D * N) return;
  carry<A, 1, true>(args, parameters.wavelet(i / N, i % N), i, blockIdx.y, D * N, chunks, length);
}

// h from the ends [B, chunks, D, N, 2] of all chunks, where h0 is 0.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_last_state_kernel(const double* ends, Parameters<A> parameters, A* h, int64_t B, int64_t L, int64_t D,
                           int64_t chunks, int64_t length) {
  const int64_t N = parameters.N, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= B * D * N) return;
  const int64_t b = at / (D * N), i = at % (D * N);
  const Wavelet w = parameters.wavelet(i / N, i % N);
  const Pair<double> all = pair_of(w.power(static_cast<double>(length)));
  const Pair<double> last = pair_of(w.power(static_cast<double>(L - (chunks - 1) * length)));
  Pair<double> state{0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const auto end = load<2>(ends + ((b * chunks + chunk) * D * N + i) * 2);
    state = Pair<double>{end.v[0], end.v[1]} + (chunk + 1 < chunks ? all : last) * state;
  }
  state = input_of(w) * state;
  store(h + 2 * at, Pack<A, 2>{static_cast<A>(state.re), static_cast<A>(state.im)});
}

}  // namespace
}  // namespace megalodon::cuda
