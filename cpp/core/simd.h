// Vectors of floats, on the compiler's vector extension: the same source is 64, 32 or 16 bytes wide by the instruction
// set it is compiled for. Vec<A> supports + - * /, comparisons and ?: lane by lane; a * b + c becomes one FMA
// (-ffp-contract=fast). Arithmetic is always in float or double: load and store convert the 16-bit types.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#if defined(MEGALODON_X86)
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace megalodon::cpu::MEGALODON_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class A, int N>
struct Vecs {
  Vec<A> v[N];
};

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));  // kLanes<float> 16-bit values

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};  // minus zero, so that -0.0 stays -0.0
}

// ---- 16-bit conversions, one vector of floats at a time ----

inline Vec<float> widen(bf16, HalfBits bits) {
#if defined(__AVX512F__)
  // One instruction, for which g++ 12 makes four of the conversion below.
  const __m512i words = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits));
  return reinterpret_cast<Vec<float>>(reinterpret_cast<VecU32>(words) << 16);
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits));
  return reinterpret_cast<Vec<float>>(reinterpret_cast<VecU32>(words) << 16);
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, VecU32) << 16);
#endif
}

// Rounds to nearest even; NaN stays NaN. The one instruction for it makes zeros of subnormal numbers.
inline HalfBits narrow(bf16, Vec<float> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfBits>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#endif
  const VecU32 bits = reinterpret_cast<VecU32>(v);
  const VecU32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecU32 high = (v == v ? rounded : bits | 0x400000) >> 16;
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(high)));
#elif defined(__AVX2__)
  const __m256i words = reinterpret_cast<__m256i>(high);
  return reinterpret_cast<HalfBits>(
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  return __builtin_convertvector(high, HalfBits);
#endif
}

inline Vec<float> widen(f16, HalfBits bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) {
    _Float16 h;
    const uint16_t b = bits[i];
    std::memcpy(&h, &b, 2);
    out[i] = static_cast<float>(h);
  }
  return out;
#endif
}

inline HalfBits narrow(f16, Vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  HalfBits out;
  for (int i = 0; i < kLanes<float>; ++i) {
    const _Float16 h = static_cast<_Float16>(v[i]);
    uint16_t b;
    std::memcpy(&b, &h, 2);
    out[i] = b;
  }
  return out;
#endif
}

// ---- memory: T* <-> Vec<stat_t<T>>, unaligned; the forms with n touch only the first n elements (n may be >= lanes)
// ----

template <class T>
inline Vec<stat_t<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    HalfBits bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(T{}, bits);
  } else {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T>
inline void store(T* p, Vec<stat_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const HalfBits bits = narrow(T{}, v);
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// Two adjacent vectors. Of bf16 they are loaded and stored in half the instructions that two single ones take.
template <class A>
using Pair = Vecs<A, 2>;

template <class T>
inline Pair<stat_t<T>> load_pair(const T* p) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, bf16>) {  // word i to the upper half of lane i, 0 to the lower half
    const __m512i words = _mm512_loadu_si512(p);
    const auto widened = [&](int first) __attribute__((always_inline)) {
      VecU32 index;
      for (int i = 0; i < 16; ++i) index[i] = static_cast<uint32_t>(first + i) << 16;
      return reinterpret_cast<Vec<float>>(
          _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, reinterpret_cast<__m512i>(index), words));
    };
    return {widened(0), widened(16)};
  }
#endif
  return {load(p), load(p + kLanes<stat_t<T>>)};
}

// The bits of v rounded to bf16, in the upper half of each lane. v is the result of arithmetic: a NaN is quiet.
inline VecU32 round_to_bf16(Vec<float> v) {
  const VecU32 bits = reinterpret_cast<VecU32>(v);
  const VecU32 step = ((bits >> 16) & 1) + 0x7fff;
  return v == v ? bits + step : bits;
}

#if defined(__AVX512BF16__)
inline __m512i pack(const Pair<float>& pair) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(pair.v[1]), reinterpret_cast<__m512>(pair.v[0])));
}
#endif

// What is stored is the result of arithmetic.
template <class T>
inline void store_pair(T* p, const Pair<stat_t<T>>& pair) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) return _mm512_storeu_si512(p, pack(pair));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, bf16>) {
    const VecU32 a = round_to_bf16(pair.v[0]), b = round_to_bf16(pair.v[1]);
#if defined(__AVX512BW__)
    VecU32 index;  // the upper words of a, then of b
    for (int i = 0; i < 16; ++i) index[i] = static_cast<uint32_t>(4 * i + 1) | static_cast<uint32_t>(4 * i + 3) << 16;
    const __m512i words = _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(index),
                                                    reinterpret_cast<__m512i>(b));
    _mm512_storeu_si512(p, words);
#else
    const __m256i words = _mm256_packus_epi32(reinterpret_cast<__m256i>(a >> 16), reinterpret_cast<__m256i>(b >> 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
#endif
    return;
  }
#endif
  store(p, pair.v[0]);
  store(p + kLanes<stat_t<T>>, pair.v[1]);
}

#if defined(__AVX512F__)
inline __mmask16 lane_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }  // 0 <= n < 16
#elif defined(__AVX2__)
inline __m256i lane_mask(int64_t words) {  // of 4 bytes
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(words)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <class T>
inline Vec<stat_t<T>> load(const T* p, int64_t n) {  // the other lanes are 0
  if (n >= kLanes<stat_t<T>>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    return widen(T{}, reinterpret_cast<HalfBits>(_mm256_maskz_loadu_epi16(lane_mask(n), p)));
  } else if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(lane_mask(n), p));
  } else {
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(n)), p));
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) {
    const auto* words = reinterpret_cast<const int*>(p);
    return reinterpret_cast<Vec<T>>(_mm256_maskload_epi32(words, lane_mask(n * sizeof(T) / 4)));
  }
#endif
  T buffer[kLanes<stat_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}

template <class T>
inline void store(T* p, Vec<stat_t<T>> v, int64_t n) {
  if (n >= kLanes<stat_t<T>>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, lane_mask(n), reinterpret_cast<__m256i>(narrow(T{}, v)));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, lane_mask(n), reinterpret_cast<__m512>(v));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(n)), reinterpret_cast<__m512d>(v));
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) {
    auto* words = reinterpret_cast<int*>(p);
    return _mm256_maskstore_epi32(words, lane_mask(n * sizeof(T) / 4), reinterpret_cast<__m256i>(v));
  }
#endif
  T buffer[kLanes<stat_t<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// The first n lanes; the others become 0.
template <class V>
inline V first_lanes(V v, int64_t n) {
  using Index = decltype(v == v);
  constexpr int kCount = sizeof(V) / sizeof(v[0]);
  if (n >= kCount) return v;
  Index index;
  for (int i = 0; i < kCount; ++i) index[i] = i;
  return index < static_cast<decltype(index[0] + 0)>(n) ? v : V{};
}

// kLanes<double> values of type A (float or double) as doubles, and back.
template <class A>
inline Vec<double> load_doubles(const A* p) {
  typedef A Values __attribute__((vector_size(kLanes<double> * sizeof(A))));
  Values v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}

template <class A>
inline void store_doubles(A* p, Vec<double> v) {
  typedef A Values __attribute__((vector_size(kLanes<double> * sizeof(A))));
  const Values values = __builtin_convertvector(v, Values);
  std::memcpy(p, &values, sizeof values);
}

// Calls body(i, n) for the vectors of [begin, end): n elements from i on, the constant W but for a partial last one.
template <class A, class Body>
__attribute__((always_inline)) inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t W = kLanes<A>;
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, W);
  if (i < end) body(i, end - i);
}

// One element.
template <class T>
inline stat_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return load(p, 1)[0];
  } else {
    return *p;
  }
}

template <class T>
inline void store_one(T* p, stat_t<T> value) {
  if constexpr (sizeof(T) == 2) {
    store(p, splat(value), 1);
  } else {
    *p = value;
  }
}

// ---- arithmetic ----

// In even lanes a * b - c, in odd ones a * b + c; or, kFlipped, the other way round.
template <bool kFlipped, class A>
inline Vec<A> multiply_alternating(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b), z = reinterpret_cast<__m512>(c);
    return reinterpret_cast<Vec<A>>(kFlipped ? _mm512_fmsubadd_ps(x, y, z) : _mm512_fmaddsub_ps(x, y, z));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const auto x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b), z = reinterpret_cast<__m256>(c);
    return reinterpret_cast<Vec<A>>(kFlipped ? _mm256_fmsubadd_ps(x, y, z) : _mm256_fmaddsub_ps(x, y, z));
  }
#endif
  Vec<A> sign;
  for (int i = 0; i < kLanes<A>; ++i) sign[i] = (i % 2 == 0) == kFlipped ? A(1) : A(-1);
  return a * b + c * sign;
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

inline Vec<float> sqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline Vec<double> sqrt(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// Shuffles with vectors of indices, which nvcc understands where it does not understand packs of them.
template <class A>
using VecIndex = std::conditional_t<std::is_same_v<A, double>, VecI64, VecI32>;

template <class A, int kDistance = kLanes<A> / 2>
inline A sum_lanes(Vec<A> v) {  // pairwise
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    VecIndex<A> other;
    for (int i = 0; i < kLanes<A>; ++i) other[i] = i ^ kDistance;
    return sum_lanes<A, kDistance / 2>(v + __builtin_shuffle(v, other));
  }
}

// Of a and b, which hold kCount numbers of each of their rows, the rows one after another: the sums of the lower and
// the upper half of each row.
template <class A, int kCount>
inline Vec<A> add_halves(Vec<A> a, Vec<A> b) {
  constexpr int kHalf = kCount / 2;
  VecIndex<A> lower;
  for (int i = 0; i < kLanes<A>; ++i) lower[i] = i / kHalf * kCount + i % kHalf;
  return __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, lower + kHalf);
}

// Lane i < R: sum_lanes(v[i]), to the bit. R is a power of two, kLanes<A> at most.
template <class A, int R, int kCount = kLanes<A>>
inline Vec<A> sum_each(const Vec<A> (&v)[R]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kLeft = R > 1 ? R / 2 : 1;
    Vec<A> sums[kLeft];
    for (int i = 0; i < kLeft; ++i) sums[i] = add_halves<A, kCount>(v[R > 1 ? 2 * i : 0], v[R > 1 ? 2 * i + 1 : 0]);
    return sum_each<A, kLeft, kCount / 2>(sums);
  }
}

template <class A>
inline A max_lanes(Vec<A> v) {
  A best = v[0];
  for (int i = 1; i < kLanes<A>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^v. Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial: error below 1 ulp (float) and 1.5 ulp (double).
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
  const Vec<double> high = splat(709.78271289338397);
  const Vec<double> x = v < low ? low : v > high ? high : v;
  const Vec<double> shifted = x * kLog2e + kMagic;
  const Vec<double> n = shifted - kMagic;
  const Vec<double> r = (x - n * kLn2High) - n * kLn2Low;
  Vec<double> p = splat(1.0 / 6227020800.0);  // Taylor to degree 13: |r|^14 / 14! < 5e-18
  constexpr double kInverseFactorials[] = {1.0 / 479001600.0,
                                           1.0 / 39916800.0,
                                           1.0 / 3628800.0,
                                           1.0 / 362880.0,
                                           1.0 / 40320.0,
                                           1.0 / 5040.0,
                                           1.0 / 720.0,
                                           1.0 / 120.0,
                                           1.0 / 24.0,
                                           1.0 / 6.0,
                                           0.5};
  for (double c : kInverseFactorials) p = p * r + c;
  const Vec<double> e = p * (r * r) + r + 1.0;
  const VecI64 i = reinterpret_cast<VecI64>(shifted) - 0x4338000000000000;
  const VecI64 half = i >> 1;
  const Vec<double> scale1 = reinterpret_cast<Vec<double>>((half + 1023) << 52);
  const Vec<double> scale2 = reinterpret_cast<Vec<double>>((i - half + 1023) << 52);
  const Vec<double> result = e * scale1 * scale2;
  const Vec<double> infinity = splat(std::numeric_limits<double>::infinity());
  return v > high ? infinity : v < low ? Vec<double>{} : v == v ? result : v;
}

// sin v and cos v for |v| < 1e5 (NaN beyond the reduction's reach stays NaN): reduction to |r| <= pi/4 by pi/2 in three
// parts, then the polynomials of fdlibm; relative error below 3.2e-16.
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
