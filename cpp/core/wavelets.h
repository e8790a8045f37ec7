// Raw parameters read by vectors of channels: coefficients.h for the columns of (D, N) tensors, and their gradients
// written back.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/coefficients.h"
#include "core/complex.h"
#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

using Double = Vec<double>;
constexpr int64_t kDoubles = kLanes<double>;

inline Double load_wide(const double* p) { return load(p); }
inline Double load_wide(const float* p) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Double);
}
inline void store_wide(double* p, Double v) { store(p, v); }
inline void store_wide(float* p, Double v) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  const Half half = __builtin_convertvector(v, Half);
  std::memcpy(p, &half, sizeof half);
}

// The same for the first n elements (n may be more than there are lanes).
template <class A>
inline Double load_some(const A* p, int64_t n) {
  if (n >= kDoubles) return load_wide(p);
  A lanes[kDoubles] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_wide(lanes);
}
template <class A>
inline void store_some(A* p, Double v, int64_t n) {
  if (n >= kDoubles) return store_wide(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<A>(v[i]);
}

// (im, re) for every pair (re, im).
inline Double swap_pairs(Double v) {
  VecI64 other;
  for (int64_t i = 0; i < kDoubles; ++i) other[i] = i ^ 1;
  return __builtin_shuffle(v, other);
}

// A pair of vectors `lanes` elements apart, from element i on.
template <class A>
inline Complex<Double> load_pair(const A* p, int64_t lanes, int64_t i) {
  return {load_wide(p + i), load_wide(p + lanes + i)};
}
template <class A>
inline void store_pair(A* p, int64_t lanes, int64_t i, const Complex<Double>& v) {
  store_wide(p + i, v.re);
  store_wide(p + lanes + i, v.im);
}

inline Complex<Double> power(Complex<Double> q, int64_t exponent) {  // exponent >= 1
  while ((exponent & 1) == 0) {
    q = q * q;
    exponent >>= 1;
  }
  Complex<Double> result = q;
  while (exponent >>= 1) {
    q = q * q;
    if (exponent & 1) result = result * q;
  }
  return result;
}

// Where the raw parameters of `lanes` (at most kDoubles) channels from d on are.
template <class A>
struct Parameters {
  const A* alpha;
  const A* delta;
  const A* theta;
  const A* gamma;
  int64_t D, N;

  template <class Args>
  static Parameters of(const Args& args) {
    return {static_cast<const A*>(args.alpha),
            static_cast<const A*>(args.delta),
            static_cast<const A*>(args.theta),
            static_cast<const A*>(args.gamma),
            args.D,
            args.N};
  }
  int64_t lanes(int64_t d) const { return D - d < kDoubles ? (D > d ? D - d : 0) : kDoubles; }

  // One number per channel, `stride` apart; channels beyond D give 0.
  Double gather(const A* p, int64_t d, int64_t stride) const {
    double lanes_of[kDoubles] = {};
    const int64_t n = lanes(d);
    for (int64_t l = 0; l < n; ++l) lanes_of[l] = static_cast<double>(p[(d + l) * stride]);
    return load(lanes_of);
  }
  Sigmoid<Double> frequency(int64_t d) const { return Sigmoid<Double>::of(gather(theta, d, 1)); }
  Wavelet<Double> wavelet(int64_t d, int64_t n, const Sigmoid<Double>& frequency) const {
    return Wavelet<Double>::of(gather(alpha + n, d, N), gather(delta + n, d, N), frequency, n + 1, N);
  }
  Complex<Double> gamma_of(int64_t d, int64_t n) const {
    return {gather(gamma + 2 * n, d, 2 * N), gather(gamma + 2 * n + 1, d, 2 * N)};
  }
};

template <class A>
inline void add_pair(A* p, int64_t lanes, int64_t i, const Complex<Double>& v) {
  store_pair(p, lanes, i, load_pair(p, lanes, i) + v);
}

// c = a g of one wavelet of kDoubles channels.
template <class A>
Complex<Double> product_of(const Parameters<A>& parameters, int64_t d, int64_t n, double scale) {
  const Double a = Sigmoid<Double>::of(parameters.gather(parameters.alpha + n, d, parameters.N)).value * scale;
  const Complex<Double> gamma = parameters.gamma_of(d, n);
  return {gamma.re * a, gamma.im * a};
}

// c = a g of all wavelets of a vector of channels: [N, 2, kLanes<A>].
template <class A>
void products(const Parameters<A>& parameters, int64_t d, double* c) {
  constexpr int64_t W = kLanes<A>;
  const double scale = gamma_scale(parameters.N);
  for (int64_t i = 0; i < W; i += kDoubles) {
    for (int64_t n = 0; n < parameters.N; ++n) {
      store_pair(c + 2 * n * W, W, i, product_of(parameters, d + i, n, scale));
    }
  }
}

// What a backward pass has summed for one wavelet of a vector of channels: kSums rows of kLanes<A> doubles, the fields
// of WaveletSums but with log|q| in the place of |q|.
enum : int64_t {
  kSumLog,
  kSumPhi,
  kSumInput,
  kSumProduct,
  kSumOutput = kSumProduct + 2,
  kWaveletSums = kSumOutput + 2
};

// The gradients of k_t = Re sum_n c_n q_n^t from S and U of dk (core/powers.h), added to sums [N, kWaveletSums, W].
template <class A>
void add_response_gradients(const Parameters<A>& parameters, int64_t d, const double* analysis, double* sums) {
  constexpr int64_t W = kLanes<A>;
  const double scale = gamma_scale(parameters.N);
  for (int64_t i = 0; i < W; i += kDoubles) {
    for (int64_t n = 0; n < parameters.N; ++n) {
      const Complex<Double> c = product_of(parameters, d + i, n, scale);
      const Complex<Double> cU = c * load_pair(analysis + (4 * n + 2) * W, W, i);
      double* row = sums + n * kWaveletSums * W;
      add_pair(row + kSumLog * W, W, i, conj(cU));  // and kSumPhi
      add_pair(row + kSumProduct * W, W, i, conj(load_pair(analysis + 4 * n * W, W, i)));
    }
  }
}

// The gradients of the raw parameters of the vector of channels from d on, from sums [N, kWaveletSums, kLanes<A>]. Args
// has dalpha, ddelta, dtheta and dgamma.
template <class A, class Args>
void write_gradients(const Args& args, const Parameters<A>& parameters, int64_t d, const double* sums) {
  constexpr int64_t W = kLanes<A>;
  const int64_t N = parameters.N;
  const double scale = gamma_scale(N);
  for (int64_t i = 0; i < W; i += kDoubles) {
    const int64_t lanes = parameters.lanes(d + i);
    const auto scatter = [&](void* out, int64_t offset, int64_t stride, Double v) {
      for (int64_t l = 0; l < lanes; ++l) static_cast<A*>(out)[offset + (d + i + l) * stride] = static_cast<A>(v[l]);
    };
    const Sigmoid<Double> frequency = parameters.frequency(d + i);
    Double dtheta = {};
    for (int64_t n = 0; n < N; ++n) {
      const double* row = sums + n * kWaveletSums * W + i;
      const Wavelet<Double> w = parameters.wavelet(d + i, n, frequency);
      const Complex<Double> gamma = parameters.gamma_of(d + i, n);
      WaveletSums<Double> s{};
      s.add_log_q(w, load(row + kSumLog * W), load(row + kSumPhi * W));
      s.a = load(row + kSumInput * W);
      s.c_re = load(row + kSumProduct * W);
      s.c_im = load(row + (kSumProduct + 1) * W);
      s.g_re = load(row + kSumOutput * W);
      s.g_im = load(row + (kSumOutput + 1) * W);
      const auto gradient = WaveletGradient<Double>::of(w, s, gamma.re, gamma.im, scale);
      scatter(args.dalpha, n, N, gradient.alpha);
      scatter(args.ddelta, n, N, gradient.delta);
      scatter(args.dgamma, 2 * n, 2 * N, gradient.gamma_re);
      scatter(args.dgamma, 2 * n + 1, 2 * N, gradient.gamma_im);
      dtheta += gradient.theta;
    }
    scatter(args.dtheta, 0, 1, dtheta);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
