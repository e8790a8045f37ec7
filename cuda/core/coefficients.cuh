// The coefficients of CEMA on the device, in double: the equations, and why nothing in them cancels, are in
// core/coefficients.h, of which this is one wavelet.
#pragma once

#include "core/portable.cuh"
#include "core/turns.cuh"

namespace megalodon::cuda {

struct Complex {
  double re, im;
};
DEVICE Complex operator*(const Complex& u, const Complex& v) {
  return {u.re * v.re - u.im * v.im, u.re * v.im + u.im * v.re};
}

// sigmoid(u) and 1 - sigmoid(u), both to full relative precision.
struct Sigmoid {
  double value, rest;

  DEVICE static Sigmoid of(double u) {
    const double decay = exp(u < 0 ? u : -u);  // at most 1
    const double large = 1.0 / (1.0 + decay), small = decay * large;
    return {u < 0 ? small : large, u < 0 ? large : small};
  }
  DEVICE double slope() const { return value * rest; }
};

struct Wavelet {
  static constexpr double kLeast = 0x1p-1022;  // |q| below it counts as this

  Sigmoid alpha, delta, theta;
  double rho, log_rho;  // |q|
  double turns;         // arg q / (2 pi) = n / N sigmoid(theta)

  // The wavelet n = 1 .. N.
  DEVICE static Wavelet of(double alpha, double delta, double theta, int64_t n, int64_t N) {
    Wavelet w;
    w.alpha = Sigmoid::of(alpha);
    w.delta = Sigmoid::of(delta);
    w.theta = Sigmoid::of(theta);
    w.rho = w.alpha.rest + w.alpha.value * w.delta.rest;
    w.log_rho = w.rho > 0.5 ? log1p(-(w.alpha.value * w.delta.value)) : log(w.rho < kLeast ? kLeast : w.rho);
    w.turns = static_cast<double>(n) / static_cast<double>(N) * w.theta.value;
    return w;
  }

  // q^t for an integer t >= 0: the angle is reduced exactly, so that the error does not grow with t but for that of
  // log|q| and arg q themselves.
  DEVICE Complex power(double t) const {
    const double rest = fma(t, turns, -rint(t * turns));  // in turns
    const double quadrant = rint(4 * rest);
    double sine, cosine;
    sin_cos_near((rest - 0.25 * quadrant) * kTwoPi, static_cast<unsigned>(static_cast<int>(quadrant)), sine, cosine);
    const double size = exp(t * log_rho);
    return {size * cosine, size * sine};
  }
};

// g = gamma * gamma_scale(N), c = a g.
DEVICE double gamma_scale(int64_t N) { return 1.0 / sqrt(static_cast<double>(N)); }

// Raw parameters as they are stored: alpha, delta [D, N], theta [D], gamma [D, N, 2].
template <class A>
struct Parameters {
  const A *alpha, *delta, *theta, *gamma;
  int64_t N;

  template <class Args>
  static Parameters of(const Args& args) {
    return {static_cast<const A*>(args.alpha), static_cast<const A*>(args.delta), static_cast<const A*>(args.theta),
            static_cast<const A*>(args.gamma), args.N};
  }
  // Those of channel d and the wavelet that has index n = 0 .. N-1.
  DEVICE Wavelet wavelet(int64_t d, int64_t n) const {
    return Wavelet::of(alpha[d * N + n], delta[d * N + n], theta[d], n + 1, N);
  }
  DEVICE Complex gamma_of(int64_t d, int64_t n) const { return {gamma[2 * (d * N + n)], gamma[2 * (d * N + n) + 1]}; }
  DEVICE Complex product(const Wavelet& w, int64_t d, int64_t n) const {  // c
    const double a = w.alpha.value * gamma_scale(N);
    const Complex g = gamma_of(d, n);
    return {g.re * a, g.im * a};
  }
};

}  // namespace megalodon::cuda
