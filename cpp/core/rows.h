// What the kernels that work row by row share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/parallel.h"
#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Rows a thread should get at least, so that starting it is worth it: about 16K elements.
constexpr int64_t grain_of_rows(int64_t D) { return D < 1 ? 16384 : D > 16384 ? 1 : 16384 / D; }

template <class A>
constexpr int kRowsTogether = kLanes<A> < 8 ? kLanes<A> : 8;

// Calls body(r, n) for rows r to r + n, n <= kRowsTogether, of [begin, end): rows that are worked on together, sums
// first, side by side, so that none waits for the root and the division of the one before, and then, while they lie in
// L1, outputs. They are as many as their bytes and `bytes` allow. Where they go one by one, n is a constant.
template <class A, class Body>
__attribute__((always_inline)) inline void for_rows(int64_t begin, int64_t end, int64_t row_bytes, int64_t bytes,
                                                    const Body& body) {
  const int64_t fitting = bytes / (row_bytes + 1), most = kRowsTogether<A>;
  const int64_t together = fitting > most ? most : fitting;
  if (together > 1) {
    for (int64_t r = begin; r < end; r += together) body(r, r + together < end ? together : end - r);
  } else {
    for (int64_t r = begin; r < end; ++r) body(r, std::integral_constant<int64_t, 1>{});
  }
}

// The bytes for ops that memory binds: few of floats, for reads and writes in turns go best there (AMD Zen 4, November
// 2026).
template <class T>
constexpr int64_t kBytesTogether = sizeof(T) == 2 ? 8192 : 2048;

// The sums over a row of x and of x^2, lane by lane: four accumulators, so that additions do not wait for each other.
// Of bf16, whose pairs are multiplied exactly and added at once, in a third of the instructions: subnormal elements are
// zeros there.
template <class T>
__attribute__((always_inline)) inline Vecs<stat_t<T>, 2> sum_moments(const T* x, int64_t D) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[4] = {}, squares[4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto add = [&](int m, __m512i words) __attribute__((always_inline)) {
      const auto u = reinterpret_cast<__m512bh>(words), ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
      sums[m] = reinterpret_cast<Vec<A>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[m]), u, ones));
      squares[m] = reinterpret_cast<Vec<A>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(squares[m]), u, u));
    };
    for (; i + 8 * W <= D; i += 8 * W) {
      for (int m = 0; m < 4; ++m) add(m, _mm512_loadu_si512(x + i + m * 2 * W));
    }
    for (; i < D; i += 2 * W) {
      add(0, _mm512_maskz_loadu_epi16(D - i >= 2 * W ? ~0u : (1u << (D - i)) - 1, x + i));
    }
  }
#endif
  for (; i + 4 * W <= D; i += 4 * W) {
    for (int m = 0; m < 4; m += 2) {
      const Pair<A> u = load_pair(x + i + m * W);
      for (int k = 0; k < 2; ++k) {
        sums[m + k] += u.v[k];
        squares[m + k] += u.v[k] * u.v[k];
      }
    }
  }
  for (; i < D; i += W) {
    const Vec<A> v = load(x + i, D - i);
    sums[0] += v;
    squares[0] += v * v;
  }
  return {{(sums[0] + sums[1]) + (sums[2] + sums[3]), (squares[0] + squares[1]) + (squares[2] + squares[3])}};
}

// Lane k < rows: the sums over the lanes of the N vectors f(k), to the bit those of any other number of rows.
template <class A, int N, class F>
__attribute__((always_inline)) inline Vecs<A, N> sum_rows(int64_t rows, const F& f) {
  Vecs<A, N> out;
  if (rows == 1) {
    const Vecs<A, N> row = f(0);
    for (int m = 0; m < N; ++m) out.v[m] = splat(sum_lanes<A>(row.v[m]));
    return out;
  }
  Vec<A> sums[N][kRowsTogether<A>] = {};
  for (int64_t k = 0; k < rows; ++k) {
    const Vecs<A, N> row = f(k);
    for (int m = 0; m < N; ++m) sums[m][k] = row.v[m];
  }
  for (int m = 0; m < N; ++m) out.v[m] = sum_each<A>(sums[m]);
  return out;
}

// out[i] = sum over p < parts of partial[p * n + i], in the order of p.
template <class A>
void add_parts(const A* partial, int64_t parts, int64_t n, A* out) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t p = 0; p < parts; ++p) sum += load(partial + p * n + i, n - i);
    store(out + i, sum, n - i);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
