// What the scans of CEMA read besides their inputs: the table of coefficients, and the states with which pieces of time
// begin, from those with which the pieces before them end; the last state in the same way.
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

// ---- from the states pieces end with to those they begin with -------------------------------------------------------

template <class A>
struct CarryArgs {
  const A* start;   // [B, D, N, 2] or nullptr: the state at the very beginning
  double* carries;  // as in ScanArgs
  CemaCut cut;
  Parts parts;  // of the sequences

  static CarryArgs of(const CemaCut& cut, const A* start, double* carries) {
    constexpr int64_t kMostParts = 128;
    return {start, carries, cut, Parts::of(cut.sequences.count, 1, kMostParts)};
  }
};

// Sequence s: state <- end + q^s state per piece, and for the derivative e by q: e <- end_e + q^s e + s q^(s-1) state.
template <class A, int kStates, bool kAdjoint>
DEVICE void carry_sequence(const CarryArgs<A>& args, const Pair<double>& all, const Pair<double>& first, double a,
                           int64_t i, int64_t s, int64_t wavelets) {
  constexpr int kAhead = 4;  // pieces read before the first of them is needed
  const int64_t begin = args.cut.sequences.begin(s),
                pieces = ceil_div(args.cut.sequences.end(s) - begin, args.cut.length);
  if (pieces <= 1) return;
  Pair<double> state[kStates] = {};
  if (args.start != nullptr) {
    const auto v = load<2>(args.start + 2 * (s * wavelets + i));
    state[0] = {v.v[0] / a, v.v[1] / a};
  }
  double* places = args.carries + (args.cut.place(s, 1) * wavelets + i) * 2 * kStates;
  const auto place = [&](int64_t piece) { return places + piece * wavelets * 2 * kStates; };
  for (int64_t piece = 0; piece < pieces - 1; piece += kAhead) {
    Pack<double, 2 * kStates> ends[kAhead];
    UNROLL
    for (int c = 0; c < kAhead; ++c) {
      if (piece + c < pieces - 1) ends[c] = load<2 * kStates>(place(piece + c));
    }
    UNROLL
    for (int c = 0; c < kAhead; ++c) {
      if (piece + c >= pieces - 1) continue;
      if constexpr (kStates == 2) {
        state[1] = Pair<double>{ends[c].v[2], ends[c].v[3]} + (all * state[1] + first * state[0]);
      }
      state[0] = Pair<double>{ends[c].v[0], ends[c].v[1]} + all * state[0];
      Pack<double, 2 * kStates> next;
      UNROLL
      for (int k = 0; k < kStates; ++k) {
        next.v[2 * k] = state[k].re;
        next.v[2 * k + 1] = state[k].im;
      }
      store(place(piece + c), next);
    }
  }
}

template <class A, int kStates, bool kAdjoint>
DEVICE void carry(const CarryArgs<A>& args, const Parameters<A>& parameters, int64_t D) {
  const int64_t N = parameters.N, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= D * N) return;
  const Wavelet w = parameters.wavelet(i / N, i % N);
  const auto steps = static_cast<double>(args.cut.length);
  Pair<double> all = pair_of(w.power(steps)), first{};
  if constexpr (kAdjoint) all = conj(all);
  if constexpr (kStates == 2) first = steps * pair_of(w.power(steps - 1));
  const double a = kAdjoint ? 1 : input_of(w);
  for (int64_t s = args.parts.begin(blockIdx.y); s < args.parts.end(blockIdx.y); ++s) {
    carry_sequence<A, kStates, kAdjoint>(args, all, first, a, i, s, D * N);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_forward_carry_kernel(CarryArgs<A> args, Parameters<A> parameters, int64_t D) {
  carry<A, 1, false>(args, parameters, D);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_backward_carry_kernel(CarryArgs<A> sensitivity, CarryArgs<A> adjoint, Parameters<A> parameters, int64_t D) {
  if (blockIdx.z == 0) {
    carry<A, 2, false>(sensitivity, parameters, D);
  } else {
    carry<A, 1, true>(adjoint, parameters, D);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, 1)  // 1: without it two registers are spilled around a call
    cema_adjoint_carry_kernel(CarryArgs<A> args, Parameters<A> parameters, int64_t D) {
  carry<A, 1, true>(args, parameters, D);
}

// h from the ends of all pieces [CemaCut::ends, D, N, 2], where h0 is 0; of rows.
template <class A>
__global__ void __launch_bounds__(kThreads)
    cema_last_state_kernel(const double* ends, Parameters<A> parameters, A* h, CemaCut cut, int64_t D) {
  const int64_t N = parameters.N, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= cut.sequences.count * D * N) return;
  const int64_t i = at % (D * N);
  const Wavelet w = parameters.wavelet(i / N, i % N);
  const Pair<double> all = pair_of(w.power(static_cast<double>(cut.length)));
  Pair<double> state{0, 0};
  for (auto piece = cut.sequences.piece_from(cut.sequences.first_piece(at / (D * N), cut.length), cut.length);;
       piece = cut.sequences.after(piece, cut.length)) {
    const auto end = load<2>(ends + (cut.end(piece.sequence, piece.index) * D * N + i) * 2);
    const Pair<double> power = piece.last ? pair_of(w.power(static_cast<double>(piece.tokens()))) : all;
    state = Pair<double>{end.v[0], end.v[1]} + power * state;
    if (piece.last) break;
  }
  state = input_of(w) * state;
  store(h + 2 * at, Pack<A, 2>{static_cast<A>(state.re), static_cast<A>(state.im)});
}

}  // namespace
}  // namespace megalodon::cuda
