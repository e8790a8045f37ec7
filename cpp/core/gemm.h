// Products of matrices that lie in cache, on one thread.
//
// Every matrix is stored in panels: R rows and N columns become ceil(N / P) panels of P = kPanel<A> columns (two
// vectors), each of them R x P, contiguous, one after another; columns from N on are 0. A panel is what the inner loop
// streams, so the layout serves all three roles of a matrix X:
//   - right factor:            panel p holds columns [p P, p P + P) of X, row by row;
//   - left factor:             multiply() reads X by rows, a panel's width of the sum's index at a time;
//   - left factor, transposed: multiply_transposed() reads one panel of X by columns.
// pack_rows() and pack_row() bring rows of a tensor into panels and widen them to the accumulator type;
// pack_transposed() brings the transpose. Where a whole right factor would be too large for the cache, pack some panels
// of it, use them, pack the next.
//
// The factors are made of words as large as a number of the result. F says what a word is: the number itself (F = A) or
// a Bf16Pair, two bf16 of consecutive indices of the sum, which are multiplied and added to a float at once, exactly
// but for the additions' rounding. R, N and K then count words along the sum's index: an odd last one is paired with 0.
//
// The inner loop keeps M x 2 vectors of the result in registers and does 2 M FMAs for 2 loads and M broadcasts; M is
// kMicroRows, or less for the last rows. Sums run in the order of the index, so that results depend on nothing else.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

struct Bf16Pair {};  // the first in the low half of the word

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Pairs = true;
#else
constexpr bool kHasBf16Pairs = false;
#endif

// What factors of type T are multiplied as, and how many of them are in a word.
template <class T>
using factor_t = std::conditional_t<kHasBf16Pairs && std::is_same_v<T, bf16>, Bf16Pair, stat_t<T>>;
template <class F>
constexpr int64_t kPerWord = std::is_same_v<F, Bf16Pair> ? 2 : 1;
template <class F>
constexpr int64_t words_of(int64_t n) {
  return (n + kPerWord<F> - 1) / kPerWord<F>;
}

template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;

// The panel of the widest instruction set: a multiple of every kPanel, for sizing workspaces.
constexpr int64_t kWidestPanel = 32;

// Accumulators, the right factor's two vectors and a broadcast must fit 32 or 16 registers (x86-64, AVX-512 or below).
constexpr int kMicroRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;

template <class A>
constexpr int64_t panels_of(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A>;
}

// ---- packing ----

// A vector of words from the first n elements at p; the others are 0.
template <class F, class T>
inline Vec<stat_t<T>> load_words(const T* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, Bf16Pair>) {
    if (n >= 32) return reinterpret_cast<Vec<float>>(_mm512_loadu_si512(p));
    return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p));
  }
#endif
  return load(p, n);
}

// Pairs of two rows' elements, of the first and the last 16 of 32.
#if defined(__AVX512BF16__)
template <int... i>
inline void pair_up(Vec<float> a, Vec<float> b, Vec<float>& low, Vec<float>& high, std::integer_sequence<int, i...>) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const auto x = reinterpret_cast<Halves>(a), y = reinterpret_cast<Halves>(b);
  low = reinterpret_cast<Vec<float>>(__builtin_shufflevector(x, y, (i / 2 + i % 2 * 32)...));
  high = reinterpret_cast<Vec<float>>(__builtin_shufflevector(x, y, (16 + i / 2 + i % 2 * 32)...));
}

// Two vectors of numbers, rounded, as one of pairs.
inline Vec<float> pair_up(Vec<float> a, Vec<float> b) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const auto both =
      reinterpret_cast<Halves>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
  return reinterpret_cast<Vec<float>>(__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                                              22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                              14, 30, 15, 31));
}
#endif

// The n elements at `row` into one row of panels of `panel_rows` rows, for a factor whose sum runs along the row.
template <class F, class T, class A>
inline void pack_row(const T* row, int64_t n, A* out, int64_t panel_rows) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>, D = kPerWord<F>;
  for (int64_t c = 0; c < n; c += P * D, out += panel_rows * P) {
    store(out, load_words<F>(row + c, n - c));
    store(out + W, n - c > W * D ? load_words<F>(row + c + W * D, n - c - W * D) : Vec<A>{});
  }
}

// The same for a factor whose sum runs from row to row: a row of words is made of kPerWord rows, of which the second
// may be absent (nullptr).
template <class F, class T, class A>
inline void pack_rows(const T* row, [[maybe_unused]] const T* second, int64_t n, A* out, int64_t panel_rows) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, Bf16Pair>) {
    constexpr int64_t P = kPanel<A>, W = kLanes<A>;
    for (int64_t c = 0; c < n; c += P, out += panel_rows * P) {
      Vec<A> low, high;
      const Vec<A> other = second == nullptr ? Vec<A>{} : load_words<F>(second + c, n - c);
      pair_up(load_words<F>(row + c, n - c), other, low, high, std::make_integer_sequence<int, 32>{});
      store(out, low);
      store(out + W, high);
    }
    return;
  }
#endif
  pack_row<F>(row, n, out, panel_rows);
}

// Lane i of row r <-> lane r of row i, by exchanging ever larger blocks.
template <class A, int kStep, class Index, Index... lane>
inline void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<Index, lane...>) {
  constexpr int W = kLanes<A>;
  const Vec<A> low = __builtin_shufflevector(a, b, ((lane & kStep) == 0 ? lane : W + lane - kStep)...);
  b = __builtin_shufflevector(a, b, ((lane & kStep) == 0 ? lane + kStep : W + lane)...);
  a = low;
}

template <class A, int kStep = 1>
__attribute__((always_inline)) inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int W = kLanes<A>;
  if constexpr (kStep < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & kStep) == 0) exchange<A, kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, W>{});
    }
    transpose<A, 2 * kStep>(v);
  }
}

// The transpose of R rows of N elements, row(i) the i-th, into rows [0, words) of a matrix in panels that has R columns
// and that many rows.
template <class F, class A, class Row>
void pack_transposed(const Row& row, int64_t R, int64_t N, A* panels) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>, D = kPerWord<F>;
  const int64_t words = words_of<F>(N);
  for (int64_t r = 0; r < panels_of<A>(R) * P; r += W) {
    A* out = panels + r / P * P * words + r % P;
    for (int64_t c = 0; c < words; c += W) {
      const int64_t n = words - c < W ? words - c : W;
      if (r >= R) {
        for (int64_t i = 0; i < n; ++i) store(out + (c + i) * P, Vec<A>{});
        continue;
      }
      Vec<A> block[W];
      for (int64_t i = 0; i < W; ++i) {
        block[i] = r + i < R ? load_words<F>(row(r + i) + c * D, N - c * D) : Vec<A>{};
      }
      transpose<A>(block);
      for (int64_t i = 0; i < n; ++i) store(out + (c + i) * P, block[i]);
    }
  }
}

// ---- multiplication ----

// sum + a b
template <class F, class A>
inline Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, Bf16Pair>) {
    return reinterpret_cast<Vec<A>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
#endif
  return a * b + sum;
}

// The same of one word and a vector of them.
template <class F, class A>
inline Vec<A> add_product(A x, Vec<A> b, Vec<A> sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, Bf16Pair>) {
    return multiply_add<F, A>(reinterpret_cast<Vec<A>>(_mm512_set1_ps(x)), b, sum);
  }
#endif
  return x * b + sum;
}

// c[M, P] (+)= sum over k < K of x(m, k) b[k, P]. x(m, k) is x[m P + k] with a step of `jump` every P values of k, or,
// transposed, x[k P + m].
template <int M, bool kTransposed, class F, class A>
inline void multiply_rows(int64_t K, const A* x, int64_t jump, const A* b, A* c, bool accumulate) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  Vec<A> sums[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sums[m][0] = accumulate ? load(c + m * P) : Vec<A>{};
    sums[m][1] = accumulate ? load(c + m * P + W) : Vec<A>{};
  }
  while (K > 0) {
    const int64_t run = kTransposed || K < P ? K : P;
    for (int64_t k = 0; k < run; ++k) {
      const Vec<A> b0 = load(b), b1 = load(b + W);
      b += P;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const A scalar = kTransposed ? x[k * P + m] : x[m * P + k];
        sums[m][0] = add_product<F>(scalar, b0, sums[m][0]);
        sums[m][1] = add_product<F>(scalar, b1, sums[m][1]);
      }
    }
    x += jump;
    K -= run;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(c + m * P, sums[m][0]);
    store(c + m * P + W, sums[m][1]);
  }
}

template <int M, bool kTransposed, class F, class A>
inline void multiply_last_rows(int64_t rows, int64_t K, const A* x, int64_t jump, const A* b, A* c, bool accumulate) {
  if (rows == M) return multiply_rows<M, kTransposed, F>(K, x, jump, b, c, accumulate);
  if constexpr (M > 1) return multiply_last_rows<M - 1, kTransposed, F>(rows, K, x, jump, b, c, accumulate);
}

// c[rows, P] (+)= X[rows, K] b[K, P]. X is in panels of `x_rows` rows; `x` points at its first row that takes part.
template <class F, class A>
void multiply(int64_t rows, int64_t K, const A* x, int64_t x_rows, const A* b, A* c, bool accumulate) {
  constexpr int64_t P = kPanel<A>;
  int64_t m = 0;
  for (; m + kMicroRows <= rows; m += kMicroRows) {
    multiply_rows<kMicroRows, false, F>(K, x + m * P, x_rows * P, b, c + m * P, accumulate);
  }
  if (m < rows) {
    multiply_last_rows<kMicroRows - 1, false, F>(rows - m, K, x + m * P, x_rows * P, b, c + m * P, accumulate);
  }
}

// c[columns, P] (+)= X[K, columns]^T b[K, P], where X is one panel: columns <= P.
template <class F, class A>
void multiply_transposed(int64_t columns, int64_t K, const A* x, const A* b, A* c, bool accumulate) {
  constexpr int64_t P = kPanel<A>;
  int64_t m = 0;
  for (; m + kMicroRows <= columns; m += kMicroRows) {
    multiply_rows<kMicroRows, true, F>(K, x + m, 0, b, c + m * P, accumulate);
  }
  if (m < columns) {
    multiply_last_rows<kMicroRows - 1, true, F>(columns - m, K, x + m, 0, b, c + m * P, accumulate);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
