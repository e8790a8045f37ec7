// Exponentials, sines and sigmoids of vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

// e^v. Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial: error below 1 ulp (float) and 1.1 ulp (double).
// Results below the smallest normal number are 0; above the largest, inf; NaN stays NaN.
inline Vec<float> exp(Vec<float> v) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693145751953125f;
  constexpr float kLn2Low = 1.42860682030941723e-6f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> low = splat(-87.33654f);
  [[maybe_unused]] const Vec<float> high = splat(88.72283f);
#if defined(__AVX512F__)
  const __m512 clamped = _mm512_max_ps(reinterpret_cast<__m512>(low), reinterpret_cast<__m512>(v));  // NaN: v
  const Vec<float> x = reinterpret_cast<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(89.0f), clamped));
#else
  const Vec<float> x = v < low ? low : v > high ? high : v;
#endif
  const Vec<float> shifted = x * kLog2e + kMagic;
  const Vec<float> n = shifted - kMagic;
  const Vec<float> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec<float> e = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  const __m512 result = _mm512_scalef_ps(reinterpret_cast<__m512>(e), reinterpret_cast<__m512>(n));
  return v < low ? Vec<float>{} : reinterpret_cast<Vec<float>>(result);
#else
  // 2^n in two factors, for n may be 128
  const VecI32 i = reinterpret_cast<VecI32>(shifted) - 0x4b400000;
  const VecI32 half = i >> 1;
  const Vec<float> scale1 = reinterpret_cast<Vec<float>>((half + 127) << 23);
  const Vec<float> scale2 = reinterpret_cast<Vec<float>>((i - half + 127) << 23);
  const Vec<float> result = e * scale1 * scale2;
  const Vec<float> infinity = splat(std::numeric_limits<float>::infinity());
  return v > high ? infinity : v < low ? Vec<float>{} : v == v ? result : v;
#endif
}

inline Vec<double> exp(Vec<double> v) {
  constexpr double kLog2e = 1.4426950408889634074;
  constexpr double kLn2High = 6.93145751953125e-1;
  constexpr double kLn2Low = 1.42860682030941723212e-6;
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> low = splat(-708.39641853226408);
  [[maybe_unused]] const Vec<double> high = splat(709.78271289338397);
#if defined(__AVX512F__)
  const __m512d clamped = _mm512_max_pd(reinterpret_cast<__m512d>(low), reinterpret_cast<__m512d>(v));  // NaN: v
  const Vec<double> x = reinterpret_cast<Vec<double>>(_mm512_min_pd(_mm512_set1_pd(710.0), clamped));
#else
  const Vec<double> x = v < low ? low : v > high ? high : v;
#endif
  const Vec<double> shifted = x * kLog2e + kMagic;
  const Vec<double> n = shifted - kMagic;
  const Vec<double> r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor to degree 13: |r|^14 / 14! < 5e-18. Even and odd powers apart: neither waits for the other.
  const Vec<double> z = r * r;
  Vec<double> even = splat(1.0 / 479001600.0), odd = splat(1.0 / 6227020800.0);
  constexpr double kEven[] = {1.0 / 3628800.0, 1.0 / 40320.0, 1.0 / 720.0, 1.0 / 24.0, 0.5};
  constexpr double kOdd[] = {1.0 / 39916800.0, 1.0 / 362880.0, 1.0 / 5040.0, 1.0 / 120.0, 1.0 / 6.0};
  for (int i = 0; i < 5; ++i) {
    even = even * z + kEven[i];
    odd = odd * z + kOdd[i];
  }
  const Vec<double> e = (odd * r + even) * z + r + 1.0;
#if defined(__AVX512F__)
  const __m512d result = _mm512_scalef_pd(reinterpret_cast<__m512d>(e), reinterpret_cast<__m512d>(n));
  return v < low ? Vec<double>{} : reinterpret_cast<Vec<double>>(result);
#else
  const VecI64 i = reinterpret_cast<VecI64>(shifted) - 0x4338000000000000;
  const VecI64 half = i >> 1;
  const Vec<double> scale1 = reinterpret_cast<Vec<double>>((half + 1023) << 52);
  const Vec<double> scale2 = reinterpret_cast<Vec<double>>((i - half + 1023) << 52);
  const Vec<double> result = e * scale1 * scale2;
  const Vec<double> infinity = splat(std::numeric_limits<double>::infinity());
  return v > high ? infinity : v < low ? Vec<double>{} : v == v ? result : v;
#endif
}

// sin v and cos v for |v| <= 1e6 (NaN stays NaN): reduction to |r| <= pi/4 by pi/2 in three parts, then the polynomials
// of fdlibm; relative error below 3.2e-16.
inline void sincos(Vec<double> v, Vec<double>& sine, Vec<double>& cosine) {
  constexpr double kTwoOverPi = 6.36619772367581382433e-01;
  constexpr double kHalfPi1 = 1.57079632673412561417e+00;  // 33 bits each
  constexpr double kHalfPi2 = 6.07710050630396597660e-11;
  constexpr double kHalfPi3 = 2.02226624879595063154e-21;
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const Vec<double> shifted = v * kTwoOverPi + kMagic;
  const Vec<double> n = shifted - kMagic;
  const Vec<double> r = ((v - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3;
  const Vec<double> z = r * r;
  Vec<double> s = splat(1.58969099521155010221e-10);
  for (double k : {-2.50507602534068634195e-08, 2.75573137070700676789e-06, -1.98412698298579493134e-04,
                   8.33333333332248946124e-03, -1.66666666666666324348e-01}) {
    s = s * z + k;
  }
  s = s * (z * r) + r;
  Vec<double> c = splat(-1.13596475577881948265e-11);
  for (double k : {2.08757232129817482790e-09, -2.75573143513906633035e-07, 2.48015872894767294178e-05,
                   -1.38888888888741095749e-03, 4.16666666666666019037e-02}) {
    c = c * z + k;
  }
  c = c * (z * z) + (1.0 - 0.5 * z);
  const VecI64 quadrant = reinterpret_cast<VecI64>(shifted);
  const auto odd = (quadrant & 1) != 0;
  const Vec<double> first = odd ? c : s;
  const Vec<double> second = odd ? s : c;
  sine = (quadrant & 2) != 0 ? -first : first;
  cosine = ((quadrant + 1) & 2) != 0 ? -second : second;
}

// The same of any v: beyond, where the reduction runs out of bits, the C library's.
inline void sincos_of_any(Vec<double> v, Vec<double>& sine, Vec<double>& cosine) {
  sincos(v, sine, cosine);
  for (int i = 0; i < kLanes<double>; ++i) {
    if (!(std::fabs(v[i]) <= 1e6)) {
      sine[i] = std::sin(v[i]);
      cosine[i] = std::cos(v[i]);
    }
  }
}

template <class V>
inline V sigmoid(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) {
    // An approximate reciprocal and a Newton step take half the time of a division; of d in [1, 2] nothing overflows.
    const V e = exp(v > 0 ? -v : v);
    const V d = 1.0f + e;
    const V r = reinterpret_cast<V>(_mm512_rcp14_ps(reinterpret_cast<__m512>(d)));
    const V inverse = r * (1.0f - d * r) + r;
    return v > 0 ? inverse : e * inverse;
  }
#endif
  return 1.0f / (1.0f + exp(-v));
}

// sigmoid(v) for results that are stored as T. Where T has 16 bits and the machine AVX-512, with a relative error up to
// 3e-6 where |v| < 20 (16 bits round by 5e-4 at least), in half the instructions; NaN at -inf, as v * sigmoid(v) is.
template <class T>
inline Vec<stat_t<T>> sigmoid_for(Vec<stat_t<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    // e^-v = 2^t: t is rounded to n by an instruction that does not take the FMA units, and 2^(t - n) is a minimax
    // polynomial. Below -140 (NaN passes) nothing changes any more; above 128, e is inf and the result 0.
    constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-140.0f), reinterpret_cast<__m512>(v * -1.44269504088896341f));
    const __m512 n = _mm512_roundscale_ps(t, kToNearest);
    const Vec<float> f = reinterpret_cast<Vec<float>>(t) - reinterpret_cast<Vec<float>>(n);
    Vec<float> p = splat(9.570101276e-3f);
    for (float c : {5.591785908e-2f, 2.402474433e-1f, 6.931217909e-1f, 9.999992847e-1f}) p = p * f + c;
    const __m512 e = _mm512_scalef_ps(reinterpret_cast<__m512>(p), n);
    const Vec<float> d = reinterpret_cast<Vec<float>>(e) + 1.0f;
    const Vec<float> r = reinterpret_cast<Vec<float>>(_mm512_rcp14_ps(reinterpret_cast<__m512>(d)));
    return d > 1e38f ? r : r * (1.0f - d * r) + r;  // a Newton step, but not with inf
  }
#endif
  return sigmoid(v);
}

}  // namespace megalodon::cpu::MEGALODON_ISA
