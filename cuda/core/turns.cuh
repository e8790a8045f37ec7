// Sines and cosines without a library call, whose reduction of large arguments would cost a stack frame.
//
// An angle that is an integer times a fixed step is held in turns (revolutions), as the 64 bits behind the binary
// point: the product of the step and the integer, without its overflow, is the angle reduced exactly, however large it
// is.
#pragma once

#include "core/portable.cuh"

namespace megalodon::cuda {

// 1 / (2 pi) is the sum of the two, to 107 bits.
constexpr double kTurnsPerRadian = 0x1.45f306dc9c883p-3;
constexpr double kTurnsPerRadianRest = -0x1.6b01ec5417056p-57;
constexpr double kTwoPi = 0x1.921fb54442d18p+2;

// radians / (2 pi) modulo 1, to the precision of radians if that is less than a turn, else to 2^-53 turns; 0 <= radians
// < 2^52. Written so that it is the same whether or not the compiler fuses multiplications and additions.
DEVICE uint64_t turns_of(double radians) {
  const double whole = floor(radians * kTurnsPerRadian);
  const double high = fma(radians, kTurnsPerRadian, -whole);  // below 0 where the product was rounded up to `whole`
  double low = radians * kTurnsPerRadianRest;
  if (whole == 0) low += fma(radians, kTurnsPerRadian, -high);
  return static_cast<uint64_t>(high < 0 ? 0 : high * 0x1p64) +
         static_cast<uint64_t>(static_cast<int64_t>(low * 0x1p64));
}

// Of x + quadrant pi/2, |x| <= pi/4: errors below 1 ulp (of 1). The quadrant's low two bits count.
DEVICE void sin_cos_near(float x, unsigned quadrant, float& sine, float& cosine) {
  const float z = x * x;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * (z * x) + x;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * (z * z) - 0.5f * z + 1.0f;
  sine = (quadrant & 1) != 0 ? c : s;
  cosine = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 2) != 0 ? -sine : sine;
  cosine = ((quadrant + 1) & 2) != 0 ? -cosine : cosine;
}

DEVICE void sin_cos_near(double x, unsigned quadrant, double& sine, double& cosine) {
  const double z = x * x;
  double s = 1.58969099521155010221e-10;
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = s * (z * x) + x;
  double c = -1.13596475577881948265e-11;
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  c = (c * z - 0.5) * z + 1.0;
  sine = (quadrant & 1) != 0 ? c : s;
  cosine = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 2) != 0 ? -sine : sine;
  cosine = ((quadrant + 1) & 2) != 0 ? -cosine : cosine;
}

// Of turns in fixed point.
template <class A>
DEVICE void sin_cos_turns(uint64_t turns, A& sine, A& cosine) {
  const uint64_t shifted = turns + (uint64_t{1} << 61);  // its top two bits: the quadrant whose middle is nearest
  const auto quadrant = static_cast<unsigned>(shifted >> 62);
  const auto rest = static_cast<int64_t>(turns - (static_cast<uint64_t>(quadrant) << 62));
  if constexpr (std::is_same_v<A, double>) {
    sin_cos_near(static_cast<double>(rest) * (kTwoPi * 0x1p-64), quadrant, sine, cosine);
  } else {
    const auto high = static_cast<int32_t>(rest >> 32);
    sin_cos_near(static_cast<float>(high) * static_cast<float>(kTwoPi * 0x1p-32), quadrant, sine, cosine);
  }
}

}  // namespace megalodon::cuda
