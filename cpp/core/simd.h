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

// The lanes of a vector as doubles, and back.
template <class A>
using Doubles = Vecs<double, kLanes<A> / kLanes<double>>;

inline Doubles<double> to_doubles(Vec<double> v) { return {{v}}; }
inline Vec<double> from_doubles(const Doubles<double>& d) { return d.v[0]; }

inline Doubles<float> to_doubles(Vec<float> v) {
#if defined(__AVX512F__)
  const __m512 floats = reinterpret_cast<__m512>(v);
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(floats), 1));
  return {{reinterpret_cast<Vec<double>>(_mm512_cvtps_pd(_mm512_castps512_ps256(floats))),
           reinterpret_cast<Vec<double>>(_mm512_cvtps_pd(upper))}};
#elif defined(__AVX2__)
  const __m256 floats = reinterpret_cast<__m256>(v);
  return {{reinterpret_cast<Vec<double>>(_mm256_cvtps_pd(_mm256_castps256_ps128(floats))),
           reinterpret_cast<Vec<double>>(_mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1)))}};
#else
  Doubles<float> d;
  for (int i = 0; i < kLanes<float>; ++i) d.v[i / kLanes<double>][i % kLanes<double>] = v[i];
  return d;
#endif
}

inline Vec<float> from_doubles(const Doubles<float>& d) {
#if defined(__AVX512F__)
  const __m256 lower = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(d.v[0]));
  const __m256 upper = _mm512_cvtpd_ps(reinterpret_cast<__m512d>(d.v[1]));
  return reinterpret_cast<Vec<float>>(
      _mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(lower)), _mm256_castps_pd(upper), 1));
#elif defined(__AVX2__)
  const __m128 lower = _mm256_cvtpd_ps(reinterpret_cast<__m256d>(d.v[0]));
  const __m128 upper = _mm256_cvtpd_ps(reinterpret_cast<__m256d>(d.v[1]));
  return reinterpret_cast<Vec<float>>(_mm256_set_m128(upper, lower));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(d.v[i / kLanes<double>][i % kLanes<double>]);
  return v;
#endif
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

}  // namespace megalodon::cpu::MEGALODON_ISA
