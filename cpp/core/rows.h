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

// The sums over a row of f(vector), lane by lane: four accumulators, so that additions do not wait for each other. f
// gets the vector and how many of its lanes are in the row; what it gives for the others must be 0.
template <class T, class F>
__attribute__((always_inline)) inline Vecs<stat_t<T>, 1> sum_row(const T* x, int64_t D, const F& f) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    for (int k = 0; k < 4; k += 2) {
      const Pair<A> u = load_pair(x + i + k * W);
      for (int m = 0; m < 2; ++m) sums[k + m] += f(u.v[m], W);
    }
  }
  for (; i < D; i += W) sums[0] += f(load(x + i, D - i), D - i);
  return {{(sums[0] + sums[1]) + (sums[2] + sums[3])}};
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
