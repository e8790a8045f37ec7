// Sums over groups of adjacent channels, many groups at a time, and the way back from one value per group to one per
// channel. A block is W groups (W lanes to a vector), so that what belongs to its groups fills a vector. Template
// parameter P says how large a group is:
//   0 < P <= W   exactly P channels, P a power of two: P vectors hold a block;
//   P = 2W       exactly P channels;
//   P = 0        any size K: each group has its own vectors, the last one perhaps partial.
// Either way a block shrinks to one vector of W sums in rounds of adding neighbours: about three instructions a vector,
// where a horizontal sum of each would take eight.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

template <class A, int... I>
inline Vec<A> add_neighbours(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// [a0 + a1, a2 + a3, ..., b0 + b1, b2 + b3, ...]
template <class A>
inline Vec<A> add_neighbours(Vec<A> a, Vec<A> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Add within the two halves of the register, then move across them once.
  if constexpr (std::is_same_v<A, float>) {
    const __m256 sums = _mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b));
    return reinterpret_cast<Vec<A>>(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0xd8));
  } else {
    const __m256d sums = _mm256_hadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b));
    return reinterpret_cast<Vec<A>>(_mm256_permute4x64_pd(sums, 0xd8));
  }
#else
  return add_neighbours<A>(a, b, std::make_integer_sequence<int, kLanes<A>>{});
#endif
}

template <class V, int N>
struct Sums {
  V v[N];
};

#if defined(__AVX512F__)
// Half a vector, of the width of the units of some CPUs (AMD Zen 4).
typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
constexpr int kHalfLanes = kLanes<float> / 2;

// Half h of the kLanes<float> elements at p, in any order that is the same for all sources of a sum. kEvensFirst: those
// of bf16, whose elements of even index become floats in one instruction and those of odd index in another; what is
// summed with them is arranged so beforehand (Groups::arrange).
template <bool kEvensFirst, class T>
inline HalfVec load_half(const T* p, int h) {
  if constexpr (kEvensFirst && std::is_same_v<T, bf16>) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    return reinterpret_cast<HalfVec>(h == 0 ? _mm256_slli_epi32(pairs, 16) : odd);
  } else if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<HalfVec>(_mm256_loadu_ps(p + h * kHalfLanes));
  } else {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + h * kHalfLanes));
    static_assert(std::is_same_v<T, f16>);
    return reinterpret_cast<HalfVec>(_mm256_cvtph_ps(bits));
  }
}

inline Vec<float> join(HalfVec lower, HalfVec upper) {
  const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(reinterpret_cast<__m256>(lower)));
  return reinterpret_cast<Vec<float>>(_mm512_insertf64x4(low, reinterpret_cast<__m256d>(upper), 1));
}

// Lane j: the sum over half vector j, of kHalfLanes; vectors(std::integral_constant<int, j>) gives N of each.
template <int N, int V, int J = 0, class F>
__attribute__((always_inline)) inline Sums<HalfVec, N> add_halves(const F& vectors) {
  if constexpr (V == 1) {
    return vectors(std::integral_constant<int, J>{});
  } else {
    const Sums<HalfVec, N> x = add_halves<N, V / 2, J>(vectors);
    const Sums<HalfVec, N> y = add_halves<N, V / 2, J + V / 2>(vectors);
    Sums<HalfVec, N> sums;
    for (int i = 0; i < N; ++i) {
      const __m256 a = reinterpret_cast<__m256>(x.v[i]), b = reinterpret_cast<__m256>(y.v[i]);
      // Within the quarters of 128 bits twice, then across them.
      const __m256 first = V == kHalfLanes ? _mm256_permute2f128_ps(a, b, 0x20) : _mm256_shuffle_ps(a, b, 0x88);
      const __m256 second = V == kHalfLanes ? _mm256_permute2f128_ps(a, b, 0x31) : _mm256_shuffle_ps(a, b, 0xdd);
      sums.v[i] = reinterpret_cast<HalfVec>(_mm256_add_ps(first, second));
    }
    return sums;
  }
}
#endif

// The sums of W groups from V vectors; vectors(std::integral_constant<int, j>) gives vector j as Vecs<A, N>. Depth
// first, so that only log2(V) + 1 vectors are alive at a time.
template <class A, int V, int N, int J = 0, class F>
__attribute__((always_inline)) inline Vecs<A, N> add_vectors(const F& vectors) {
  if constexpr (V == 1) {
    return vectors(std::integral_constant<int, J>{});
  } else {
    const Vecs<A, N> a = add_vectors<A, V / 2, N, J>(vectors);
    const Vecs<A, N> b = add_vectors<A, V / 2, N, J + V / 2>(vectors);
    Vecs<A, N> sums;
    for (int i = 0; i < N; ++i) sums.v[i] = add_neighbours<A>(a.v[i], b.v[i]);
    return sums;
  }
}

template <class A, int P, int... I>
inline Vec<A> spread_lanes(Vec<A> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / P)...);
}

// The values of a block of W groups, one per channel, as vector j of the block: the inverse of Groups::sum. Reads up to
// W values beyond the block.
template <class A, int P, class V = Vec<A>>
inline V spread(const A* block, int64_t j) {
  if constexpr (P == 1) {
    return load(block);
  } else if constexpr (P == 0 || P >= kLanes<A>) {
    return block[j] - V{};
  } else {
    return spread_lanes<A, P>(load(block + j * (kLanes<A> / P)), std::make_integer_sequence<int, kLanes<A>>{});
  }
}

// `groups` adjacent groups of K channels. Below, n is the number of channels that are there, from channel i on, and j
// the index of spread().
template <class A, int P>
struct Groups {
  static constexpr int W = kLanes<A>;
  static constexpr int kEach = P / W;  // vectors of a group of constant size, if it is whole vectors
  static constexpr int kVectors = P == 0 || kEach > 0 ? W : P;
  // Vectors of a block that are unrolled. With four, sums of groups of 16 and 32 channels took up to 1.3 times as long
  // on AVX2.
  static constexpr int kUnrolled = kVectors < 8 ? kVectors : 8;
  // Adjacent vectors that for_each_run takes at a time, at most: two accumulators for each fit in the registers.
  static constexpr int kRun = kVectors < (kVectorBytes == 64 ? 8 : 4) ? kVectors : kVectorBytes == 64 ? 8 : 4;
#if defined(__AVX512F__)
  static constexpr bool kByHalves = kEach > 0 && std::is_same_v<A, float>;
#else
  static constexpr bool kByHalves = false;
#endif
  int64_t K;
  int64_t groups;

  int64_t channels() const { return groups * K; }
  int64_t blocks_end() const { return (groups + W - 1) / W * W; }

  // Calls run(count, j, i, n) for runs of `count` adjacent vectors of the block that starts at group g. count is a
  // constant, a power of two; n = W for each of several vectors. Their indices are j + step(0), j + step(1), ...
  template <class F>
  __attribute__((always_inline)) void for_each_run(int64_t g, const F& run) const {
    constexpr std::integral_constant<int, kRun> kMany;
    constexpr std::integral_constant<int, 1> kOne;
    if constexpr (P > 0) {
      if (g + W <= groups) {
        for (int64_t v = 0; v < P; v += kRun) run(kMany, index_of(v), g * P + v * W, int64_t{W});
      } else {
        for (int64_t v = 0; v < P; ++v) {
          const int64_t i = g * P + v * W, n = groups * P - i;
          if (n > 0) run(kOne, index_of(v), i, n < W ? n : int64_t{W});
        }
      }
    } else {
      for (int64_t j = 0; j < W && g + j < groups; ++j) {
        int64_t i = (g + j) * K;
        const int64_t end = i + K;
        take_runs<kRun>(j, &i, end, run);
        if (i < end) run(kOne, j, i, end - i);
      }
    }
  }
  static constexpr int step(int vector) { return P == 0 ? 0 : static_cast<int>(index_of(vector)); }

  // The sums of f over the groups of that block; of groups that do not exist, 0. f(j, n, v, ...) gets what lies at the
  // sources (T first, then T or A) as vectors V, and gives N sums of type V, as an array Sums, which are 0 in lanes
  // from n on; n is a constant where all lanes are there. Sources of type A are arranged for T.
  template <int N, class F, class T, class... S>
  __attribute__((always_inline)) Vecs<A, N> sum(int64_t g, const F& f, const T* source, const S*... more) const {
#if defined(__AVX512F__)
    if constexpr (kByHalves) {
      return g + W <= groups ? sum_halves<true, N>(g, f, source, more...) : sum_halves<false, N>(g, f, source, more...);
    }
#endif
    return g + W <= groups ? sum_of<true, N>(g, f, source, more...) : sum_of<false, N>(g, f, source, more...);
  }

  // Whether sum() takes channels of T in another order, of every W those of even index first.
  template <class T>
  static constexpr bool kEvensFirst = kByHalves && std::is_same_v<T, bf16>;

  // Copies n values per channel, whole groups, in that order.
  static void arrange(const A* from, int64_t n, A* to) {
    for (int64_t i = 0; i < n; ++i) to[i / W * W + i % 2 * (W / 2) + i % W / 2] = from[i];
  }

 private:
  // Of vector v of a block of constant size.
  static constexpr int64_t index_of(int64_t v) { return kEach > 1 ? v / kEach : v; }

  template <int kCount, class F>
  __attribute__((always_inline)) static void take_runs(int64_t j, int64_t* i, int64_t end, const F& run) {
    for (; *i + kCount * W <= end; *i += kCount * W) run(std::integral_constant<int, kCount>{}, j, *i, int64_t{W});
    if constexpr (kCount > 1) take_runs<kCount / 2>(j, i, end, run);
  }

  // kWhole: all groups of the block exist.
  template <bool kWhole, int N, class F, class... S>
  __attribute__((always_inline)) Vecs<A, N> sum_of(int64_t g, const F& f, const S*... sources) const {
    Vecs<A, N> sums[kVectors / kUnrolled];
    for (int64_t j = 0; j < kVectors; j += kUnrolled) {
      sums[j / kUnrolled] = add_vectors<A, kUnrolled, N>([&](auto k) __attribute__((always_inline)) {
        Vecs<A, N> total = {};
        visit<kWhole>(g, j + k, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          const Sums<Vec<A>, N> values = f(j + k, n, load(sources + i, n)...);
          for (int m = 0; m < N; ++m) total.v[m] = P == 0 || kEach > 1 ? total.v[m] + values.v[m] : values.v[m];
        });
        return total;
      });
    }
    return add_vectors<A, kVectors / kUnrolled, N>([&](auto k) __attribute__((always_inline)) { return sums[k]; });
  }

#if defined(__AVX512F__)
  // Groups of whole vectors, half by half: the first sum of a tree is then a plain one, and the others take half the
  // time on units of that width (AMD Zen 4, 32 groups of 16 in L1: 168 cycles to 124).
  template <bool kWhole, int N, class F, class T, class... S>
  __attribute__((always_inline)) Vecs<A, N> sum_halves(int64_t g, const F& f, const T* source, const S*... more) const {
    constexpr bool kEvens = kEvensFirst<T>;
    const auto sums_from = [&](int64_t first) __attribute__((always_inline)) {
      return add_halves<N, kHalfLanes>([&](auto k) __attribute__((always_inline)) {
        const int64_t j = first + k, i = (g + j) * P;
        if (!kWhole && g + j >= groups) return Sums<HalfVec, N>{};
        Sums<HalfVec, N> total = {};
        for (int h = 0; h < 2 * kEach; ++h) {
          const int64_t at = i + h / 2 * W;
          const Sums<HalfVec, N> values =
              f(j, int64_t{kHalfLanes}, load_half<kEvens>(source + at, h % 2), load_half<kEvens>(more + at, h % 2)...);
          for (int m = 0; m < N; ++m) total.v[m] = h == 0 ? values.v[m] : total.v[m] + values.v[m];
        }
        return total;
      });
    };
    const Sums<HalfVec, N> lower = sums_from(0), upper = sums_from(kHalfLanes);
    Vecs<A, N> all;
    for (int m = 0; m < N; ++m) all.v[m] = join(lower.v[m], upper.v[m]);
    return all;
  }
#endif

  // Vector j of the block, or the vectors of its group j.
  template <bool kWhole, class F>
  __attribute__((always_inline)) void visit(int64_t g, int64_t j, const F& f) const {
    if constexpr (P > 0 && kEach == 0) {
      const int64_t i = g * P + j * W, n = groups * P - i;
      if (kWhole || n >= W) {
        f(i, int64_t{W});
      } else if (n > 0) {
        f(i, n);
      }
    } else if (kWhole || g + j < groups) {
      const int64_t begin = (g + j) * K, size = kEach > 0 ? P : K;
      int64_t m = 0;
      for (; m + W <= size; m += W) f(begin + m, int64_t{W});
      if (m < size) f(begin + m, size - m);
    }
  }
};

// Calls f(std::integral_constant<int, P>) with the P that fits groups of K channels.
template <class A, class F>
void visit_group_size(int64_t K, const F& f) {
  constexpr int W = kLanes<A>;
  if constexpr (std::is_same_v<A, float>) {  // float64 is for checks: not worth its compile time
    if (K == 1) return f(std::integral_constant<int, 1>{});
    if (K == 2) return f(std::integral_constant<int, 2>{});
    if (K == 4) return f(std::integral_constant<int, 4>{});
    if constexpr (W >= 8) {
      if (K == 8) return f(std::integral_constant<int, 8>{});
    }
    if constexpr (W >= 16) {
      if (K == 16) return f(std::integral_constant<int, 16>{});
    }
    if (K == 2 * W) return f(std::integral_constant<int, 2 * W>{});
  }
  f(std::integral_constant<int, 0>{});
}

}  // namespace megalodon::cpu::MEGALODON_ISA
