// The CEMA forward pass for a few steps (decoding), where the coefficients and the state cost more than the recurrence.
//
// Lanes are the wavelets of one channel, as they lie in memory: a vector of the state holds (re, im) pairs, and so do
// the tables, so that h <- a x + q h is  h <- A x + Q1 h + Q2 swap(h)  with  A = (a, 0), Q1 = (re q, re q),
// Q2 = (-im q, im q), and y = sum of (re g, -im g) h. All in float64: the rounding of q cannot add up over many calls.
#pragma once

#include "core/parallel.h"
#include "core/subnormals.h"
#include "core/wavelets.h"
#include "ops/cema.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int64_t kShortSteps = 16;
constexpr int64_t kShortWavelets = 64;

static inline bool is_short(const CemaForward& args) { return args.L <= kShortSteps && args.N <= kShortWavelets; }

// Of one channel: a, q1, q2 and g, each `stride` entries of which those beyond 2 N are zeros.
struct ShortTable {
  double* a;
  double* q1;
  double* q2;
  double* g;

  static int64_t stride(int64_t N) { return (2 * N + 2 * kDoubles - 1) / (2 * kDoubles) * (2 * kDoubles); }
  ShortTable(double* memory, int64_t stride)
      : a(memory), q1(memory + stride), q2(memory + 2 * stride), g(memory + 3 * stride) {}

  template <class A>
  void make(const Parameters<A>& p, int64_t d) const {
    const Sigmoid<double> theta = Sigmoid<double>::of(static_cast<double>(p.theta[d]));
    const Sigmoid<Double> frequency{splat(theta.value), splat(theta.rest)};
    const double scale = gamma_scale(p.N);
    Double n;
    for (int64_t l = 0; l < kDoubles; ++l) n[l] = static_cast<double>(l + 1);
    for (int64_t i = 0; i < p.N; i += kDoubles, n += static_cast<double>(kDoubles)) {
      const int64_t lanes = p.N - i < kDoubles ? p.N - i : kDoubles;
      const auto w = Wavelet<Double>::at(load_some(p.alpha + d * p.N + i, lanes),
                                         load_some(p.delta + d * p.N + i, lanes), frequency, n, p.N);
      const Double re = w.q_re(), im = w.q_im(), input = w.a();
      const A* gamma = p.gamma + 2 * (d * p.N + i);
      for (int64_t l = 0; l < kDoubles; ++l) {
        const bool real = l < lanes;
        const int64_t k = 2 * (i + l);
        a[k] = real ? input[l] : 0;
        q1[k] = q1[k + 1] = real ? re[l] : 0;
        q2[k] = real ? -im[l] : 0;
        q2[k + 1] = real ? im[l] : 0;
        g[k] = real ? scale * static_cast<double>(gamma[2 * l]) : 0;
        g[k + 1] = real ? -scale * static_cast<double>(gamma[2 * l + 1]) : 0;
        a[k + 1] = 0;
      }
    }
  }
};

// One row and channel: h0 (nullptr: zeros) to h, x to y, both D elements apart from step to step.
template <class T>
void short_row(const ShortTable& table, int64_t N, int64_t L, int64_t D, stat_t<T> omega, const stat_t<T>* h0,
               stat_t<T>* h, const T* x, T* y) {
  double input[kShortSteps];
  Double sums[kShortSteps];
  for (int64_t t = 0; t < L; ++t) {
    input[t] = static_cast<double>(load_one(x + t * D));
    sums[t] = Double{};
  }
  for (int64_t i = 0; i < 2 * N; i += kDoubles) {
    const Double a = load(table.a + i), q1 = load(table.q1 + i), q2 = load(table.q2 + i), g = load(table.g + i);
    Double state = h0 == nullptr ? Double{} : load_some(h0 + i, 2 * N - i);
    for (int64_t t = 0; t < L; ++t) {
      state = q1 * state + (q2 * swap_pairs(state) + a * input[t]);
      sums[t] = g * state + sums[t];
    }
    store_some(h + i, state, 2 * N - i);
  }
  for (int64_t t = 0; t < L; ++t) {
    store_one(y + t * D, static_cast<stat_t<T>>(sum_lanes<double>(sums[t]) + static_cast<double>(omega) * input[t]));
  }
}

template <class T>
void forward_short(const CemaForward& args) {
  using A = stat_t<T>;
  const Parameters<A> parameters = Parameters<A>::of(args);
  const auto* omega = static_cast<const A*>(args.omega);
  const auto* h0 = static_cast<const A*>(args.h0);
  auto* h = static_cast<A*>(args.h);
  const int64_t state = args.D * args.N * 2;
  const int64_t per_channel = args.N * (16 + args.B * (1 + args.L));
  // Channels a thread makes the tables of before it goes over the batch: their states are one piece of memory per row.
  constexpr int64_t kRoom = 4096;
  const int64_t stride = ShortTable::stride(args.N);
  const int64_t most = kRoom / (4 * stride);
  parallel_for(args.D, 1 + 16384 / per_channel, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    alignas(64) double memory[kRoom];
    for (int64_t first = begin; first < end; first += most) {
      const int64_t last = end - first < most ? end : first + most;
      for (int64_t d = first; d < last; ++d) {
        ShortTable(memory + (d - first) * 4 * stride, stride).make(parameters, d);
      }
      for (int64_t b = 0; b < args.B; ++b) {
        for (int64_t d = first; d < last; ++d) {
          const int64_t at = b * state + d * args.N * 2;
          const int64_t row = b * args.L * args.D + d;
          short_row(ShortTable(memory + (d - first) * 4 * stride, stride), args.N, args.L, args.D, omega[d],
                    h0 == nullptr ? nullptr : h0 + at, h + at, static_cast<const T*>(args.x) + row,
                    static_cast<T*>(args.y) + row);
        }
      }
    }
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
