// Sine and cosine of vectors of doubles.
#pragma once

#include <cmath>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Errors below 1 ulp (of 1). Beyond |v| = 1e6, where the reduction by pi/2 in three pieces runs out of bits, the C
// library's.
inline void sin_cos(Vec<double> v, Vec<double>& sine, Vec<double>& cosine) {
  constexpr double kLimit = 1e6;
  constexpr double kTwoOverPi = 0.63661977236758134308;
  constexpr double kHalfPi[] = {1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21};
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const Vec<double> shifted = v * kTwoOverPi + kMagic;
  const Vec<double> n = shifted - kMagic;
  const Vec<double> r = ((v - n * kHalfPi[0]) - n * kHalfPi[1]) - n * kHalfPi[2];
  const Vec<double> z = r * r;
  Vec<double> s = splat(1.58969099521155010221e-10);
  for (double c : {-2.50507602534068634195e-08, 2.75573137070700676789e-06, -1.98412698298579493134e-04,
                   8.33333333332248946124e-03, -1.66666666666666324348e-01}) {
    s = s * z + c;
  }
  s = s * (z * r) + r;
  Vec<double> c = splat(-1.13596475577881948265e-11);
  for (double a : {2.08757232129817482790e-09, -2.75573143513906633035e-07, 2.48015872894767294178e-05,
                   -1.38888888888741095749e-03, 4.16666666666666019037e-02, -0.5}) {
    c = c * z + a;
  }
  c = c * z + 1.0;
  const VecI64 quadrant = reinterpret_cast<VecI64>(shifted);  // its low bits
  const VecI64 zero = {};
  const auto swapped = (quadrant & 1) != zero;
  const Vec<double> s1 = swapped ? c : s, c1 = swapped ? s : c;
  sine = (quadrant & 2) != zero ? -s1 : s1;
  cosine = ((quadrant + 1) & 2) != zero ? -c1 : c1;
  for (int i = 0; i < kLanes<double>; ++i) {
    if (!(std::fabs(v[i]) <= kLimit)) {
      sine[i] = std::sin(v[i]);
      cosine[i] = std::cos(v[i]);
    }
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
