// Sums over groups of adjacent channels, many groups at a time, and the way back from one value per group to one per
// channel. A block is W groups (W lanes to a vector), so that what belongs to its groups fills a vector. Template
// parameter P says how large a group is:
//   0 < P <= W   exactly P channels, P a power of two: P vectors hold a block;
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
inline Vec<A> spread(Vec<A> v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / P)...);
}

// The values of a block of W groups, one per channel, as vector j of the block: the inverse of Groups::sum. Reads up to
// W values beyond the block.
template <class A, int P>
inline Vec<A> spread(const A* block, int64_t j) {
  if constexpr (P == 1) {
    return load(block);
  } else if constexpr (P == 0 || P == kLanes<A>) {
    return splat(block[j]);
  } else {
    return spread<A, P>(load(block + j * (kLanes<A> / P)), std::make_integer_sequence<int, kLanes<A>>{});
  }
}

template <class F, int... J>
__attribute__((always_inline)) inline void for_each_index(const F& f, std::integer_sequence<int, J...>) {
  (f(J), ...);
}

// `groups` adjacent groups of K channels. Below, f(j, i, n) is called with the index j of
// spread(), the channel i to start at and the number n of channels that are there: a constant W where that is certain.
// Up to eight vectors of a block are unrolled: with four, groups of 16 and 32 channels took up to 1.3 times as long on
// AVX2.
template <class A, int P>
struct Groups {
  static constexpr int W = kLanes<A>;
  static constexpr int kVectors = P == 0 ? W : P;
  static constexpr int kUnrolled = kVectors < 8 ? kVectors : 8;
  int64_t K;
  int64_t groups;

  int64_t channels() const { return groups * K; }
  int64_t blocks_end() const { return (groups + W - 1) / W * W; }

  // For the vectors of the block that starts at group g.
  template <class F>
  __attribute__((always_inline)) void for_each_vector(int64_t g, const F& f) const {
    for (int64_t j = 0; j < kVectors; j += kUnrolled) {
      for_each_index([&](int k) __attribute__((always_inline)) { visit(g, j + k, f); },
                     std::make_integer_sequence<int, kUnrolled>{});
    }
  }

  // The same, but two adjacent vectors at a time where there are two, kPairs, and the whole block: pair(j0, j1, i), j0
  // and j1 being their indices.
  template <bool kPairs, class F2, class F>
  __attribute__((always_inline)) void for_each_pair(int64_t g, const F2& pair, const F& single) const {
    if constexpr (kPairs && P > 1) {
      if (g + W > groups) return for_each_vector(g, single);
      for (int64_t j = 0; j < kVectors; j += kUnrolled) {
        for_each_index([&](int k)
                           __attribute__((always_inline)) { pair(j + 2 * k, j + 2 * k + 1, g * P + (j + 2 * k) * W); },
                       std::make_integer_sequence<int, kUnrolled / 2>{});
      }
    } else if constexpr (kPairs && P == 0) {
      for (int64_t j = 0; j < W && g + j < groups; ++j) {
        const int64_t begin = (g + j) * K;
        int64_t m = 0;
        for (; m + 2 * W <= K; m += 2 * W) pair(j, j, begin + m);
        for (; m < K; m += W) single(j, begin + m, K - m < W ? K - m : int64_t{W});
      }
    } else {
      for_each_vector(g, single);
    }
  }

  // The sums of f over the groups of that block; of groups that do not exist, 0. f gives 0 in lanes from n on.
  template <int N, class F>
  __attribute__((always_inline)) Vecs<A, N> sum(int64_t g, const F& f) const {
    Vecs<A, N> sums[kVectors / kUnrolled];
    for (int64_t j = 0; j < kVectors; j += kUnrolled) {
      sums[j / kUnrolled] = add_vectors<A, kUnrolled, N>([&](auto k) __attribute__((always_inline)) {
        Vecs<A, N> total = {};
        visit(g, j + k, [&](int64_t, int64_t i, int64_t n) __attribute__((always_inline)) {
          const Vecs<A, N> values = f(j + k, i, n);
          for (int m = 0; m < N; ++m) total.v[m] = P == 0 ? total.v[m] + values.v[m] : values.v[m];
        });
        return total;
      });
    }
    return add_vectors<A, kVectors / kUnrolled, N>([&](auto k) __attribute__((always_inline)) { return sums[k]; });
  }

 private:
  // Vector j of the block, or the vectors of its group j.
  template <class F>
  __attribute__((always_inline)) void visit(int64_t g, int64_t j, const F& f) const {
    if constexpr (P > 0) {
      const int64_t i = g * P + j * W, n = groups * P - i;
      if (n >= W) {
        f(j, i, int64_t{W});
      } else if (n > 0) {
        f(j, i, n);
      }
    } else if (g + j < groups) {
      const int64_t begin = (g + j) * K;
      int64_t m = 0;
      for (; m + W <= K; m += W) f(j, begin + m, int64_t{W});
      if (m < K) f(j, begin + m, K - m);
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
  }
  f(std::integral_constant<int, 0>{});
}

}  // namespace megalodon::cpu::MEGALODON_ISA
