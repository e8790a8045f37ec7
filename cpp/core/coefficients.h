// The coefficients of CEMA and their gradients: the one place where its raw parameters become numbers.
//
// For channel d and wavelet n = 1..N, all in float64:
//   a   = sigmoid(alpha)
//   rho = 1 - sigmoid(alpha) sigmoid(delta)
//   phi = n (2 pi / N) sigmoid(theta)
//   q   = rho e^(i phi)
//   g   = (gamma_re + i gamma_im) / sqrt(N),   c = a g
// so that h_t = a x_t + q h_(t-1), y_t = Re sum_n g h_t, and the impulse response is k_t = Re sum_n c q^t.
//
// Nothing cancels: rho is sigmoid(-alpha) + sigmoid(alpha) sigmoid(-delta), and every derivative of a sigmoid is the
// product sigmoid(u) sigmoid(-u), so values and gradients keep full relative precision where the sigmoids saturate.
//
// Everything is written for V = double and V = Vec<double> (usually one channel per lane).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/elementary.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr double kTwoPi = 6.283185307179586476925;

inline double exp(double v) { return std::exp(v); }
inline void sincos(double v, double& sine, double& cosine) {
  sine = std::sin(v);
  cosine = std::cos(v);
}

// sigmoid(u) and 1 - sigmoid(u) = sigmoid(-u), both to full relative precision.
template <class V>
struct Sigmoid {
  V value, rest;

  static Sigmoid of(V u) {
    const V decay = exp(u < 0 ? u : -u);  // at most 1
    return make(u, decay, 1.0 / (1.0 + decay));
  }
  // Of two arguments by one division, the slowest part.
  static void both(V u, V v, Sigmoid& first, Sigmoid& second) {
    const V one = exp(u < 0 ? u : -u), other = exp(v < 0 ? v : -v);
    const V inverse = 1.0 / ((1.0 + one) * (1.0 + other));
    first = make(u, one, inverse * (1.0 + other));
    second = make(v, other, inverse * (1.0 + one));
  }
  V slope() const { return value * rest; }  // d sigmoid(u) / du

 private:
  // From e^-|u| and 1 / (1 + e^-|u|).
  static Sigmoid make(V u, V decay, V large) {
    const V small = decay * large;
    return {u < 0 ? small : large, u < 0 ? large : small};
  }
};

template <class V>
struct Wavelet {
  Sigmoid<V> alpha, delta, theta;
  V step;  // d phi / d sigmoid(theta) = n 2 pi / N
  V rho, phi;
  V cosine, sine;  // of phi

  // From sigmoid(theta), which the N wavelets of a channel share. `at` takes n as V: lanes may be wavelets too.
  static Wavelet of(V alpha, V delta, const Sigmoid<V>& theta, int64_t n, int64_t N) {
    return at(alpha, delta, theta, V{} + static_cast<double>(n), N);
  }
  static Wavelet at(V alpha, V delta, const Sigmoid<V>& theta, V n, int64_t N) {
    Wavelet w;
    Sigmoid<V>::both(alpha, delta, w.alpha, w.delta);
    w.theta = theta;
    w.step = n * (kTwoPi / static_cast<double>(N));
    w.rho = w.alpha.rest + w.alpha.value * w.delta.rest;
    w.phi = w.step * theta.value;
    sincos(w.phi, w.sine, w.cosine);
    return w;
  }
  static Wavelet of(V alpha, V delta, V theta, int64_t n, int64_t N) {
    return of(alpha, delta, Sigmoid<V>::of(theta), n, N);
  }

  V a() const { return alpha.value; }
  V q_re() const { return rho * cosine; }
  V q_im() const { return rho * sine; }

  // log|q|: from 1 - rho where |q| is near 1, from rho elsewhere; finite even where rho underflows. V = double only.
  V log_rho() const {
    if (rho > 0.5) return std::log1p(-(alpha.value * delta.value));
    return std::log(rho < std::numeric_limits<double>::min() ? std::numeric_limits<double>::min() : rho);
  }
};

// 1 / sqrt(N): g = gamma * gamma_scale(N).
static inline double gamma_scale(int64_t N) { return 1.0 / std::sqrt(static_cast<double>(N)); }

// What a backward pass has summed over time and batch for one wavelet: dS/d of each coefficient; a complex coefficient
// has the pair (dS/d re, dS/d im).
template <class V>
struct WaveletSums {
  V rho, phi;    // |q| and arg q
  V a;           // the input coefficient, apart from where it enters through c
  V c_re, c_im;  // c = a g
  V g_re, g_im;  // the output coefficient, apart from where it enters through c

  void add_q(const Wavelet<V>& w, V re, V im) {  // dS/dq
    rho += re * w.cosine + im * w.sine;
    phi += w.rho * (im * w.cosine - re * w.sine);
  }
  void add_log_q(const Wavelet<V>& w, V log_rho, V angle) {  // dS/d log|q|, dS/d arg q
    constexpr double kLeast = std::numeric_limits<double>::min();
    rho += log_rho / (w.rho < kLeast ? V{} + kLeast : w.rho);
    phi += angle;
  }
};

// dS/d of the raw parameters. theta is this wavelet's share: d theta is the sum over n.
template <class V>
struct WaveletGradient {
  V alpha, delta, theta, gamma_re, gamma_im;

  //   d alpha = a (1 - a) (dS/da + Re(conj(g) dS/dc) - sigmoid(delta) dS/drho)
  //   d delta = -a sigmoid(delta) sigmoid(-delta) dS/drho
  //   d theta = n (2 pi / N) sigmoid(theta) sigmoid(-theta) dS/dphi
  //   d gamma = (dS/dg + a dS/dc) / sqrt(N)
  // `scale` is gamma_scale(N).
  static WaveletGradient of(const Wavelet<V>& w, const WaveletSums<V>& s, V gamma_re, V gamma_im, double scale) {
    const V from_c = scale * (gamma_re * s.c_re + gamma_im * s.c_im);
    WaveletGradient d;
    d.alpha = w.alpha.slope() * (s.a + from_c - w.delta.value * s.rho);
    d.delta = -(w.alpha.value * w.delta.slope() * s.rho);
    d.theta = w.step * w.theta.slope() * s.phi;
    d.gamma_re = scale * (s.g_re + w.alpha.value * s.c_re);
    d.gamma_im = scale * (s.g_im + w.alpha.value * s.c_im);
    return d;
  }
};

}  // namespace megalodon::cpu::MEGALODON_ISA
