// Products of matrices that lie in cache, on one thread.
//
// Every matrix is stored in panels: R rows and N columns become ceil(N / P) panels of P = kPanel<A> columns (two
// vectors), each of them R x P, contiguous, one after another; columns from N on are 0. A panel is what the inner loop
// streams, so the layout serves all three roles of a matrix X:
//   - right factor:            panel p holds columns [p P, p P + P) of X, row by row;
//   - left factor:             multiply() reads X by rows, a panel's width of the sum's index at a time;
//   - left factor, transposed: multiply_transposed() reads one panel of X by columns.
// pack() brings rows of a tensor into panels and widens them to the accumulator type; pack_transposed() brings the
// transpose. Where a whole right factor would be too large for the cache, pack one panel of it, use it, pack the next.
//
// The inner loop keeps M x 2 vectors of the result in registers and does 2 M FMAs for 2 loads and M broadcasts; M is
// kMicroRows, or less for the last rows. Sums run in the order of the index, so that results depend on nothing else.
#pragma once

#include <cstdint>
#include <utility>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

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

// Columns [0, n) of `rows` rows at src, n <= P, into one panel. `ahead` elements further on is what will be packed
// next: it is prefetched (0: nothing).
template <class T, class A>
void pack_panel(const T* src, int64_t stride, int64_t rows, int64_t n, A* panel, int64_t ahead = 0) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  if (n >= P) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = src + r * stride;
      if (ahead != 0) {
        for (int64_t byte = 0; byte < P * int64_t{sizeof(T)}; byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(row + ahead) + byte);
        }
      }
      store(panel + r * P, load(row));
      store(panel + r * P + W, load(row + W));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      store(panel + r * P, load(src + r * stride, n));
      store(panel + r * P + W, n > W ? load(src + r * stride + W, n - W) : Vec<A>{});
    }
  }
}

// `rows` rows of N columns into rows [first, first + rows) of a matrix in panels that has `panel_rows` rows.
template <class T, class A>
void pack(const T* src, int64_t stride, int64_t rows, int64_t N, A* panels, int64_t panel_rows, int64_t first = 0) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t c = 0; c < N; c += P) pack_panel(src + c, stride, rows, N - c, panels + c * panel_rows + first * P);
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
inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int W = kLanes<A>;
  if constexpr (kStep < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & kStep) == 0) exchange<A, kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, W>{});
    }
    transpose<A, 2 * kStep>(v);
  }
}

// The transpose of R rows of N columns, into rows [first, first + N) of a matrix in panels that has R columns and
// `panel_rows` rows.
template <class T, class A>
void pack_transposed(const T* src, int64_t stride, int64_t R, int64_t N, A* panels, int64_t panel_rows,
                     int64_t first = 0) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  for (int64_t r = 0; r < panels_of<A>(R) * P; r += W) {
    A* out = panels + r / P * P * panel_rows + first * P + r % P;
    for (int64_t c = 0; c < N; c += W) {
      Vec<A> block[W];
      for (int64_t i = 0; i < W; ++i) block[i] = r + i < R ? load(src + (r + i) * stride + c, N - c) : Vec<A>{};
      transpose<A>(block);
      const int64_t n = N - c < W ? N - c : W;
      for (int64_t i = 0; i < n; ++i) store(out + (c + i) * P, block[i]);
    }
  }
}

// ---- multiplication ----

// c[M, P] (+)= sum over k < K of x(m, k) b[k, P]. x(m, k) is x[m P + k] with a step of `jump` every P values of k, or,
// transposed, x[k P + m].
template <int M, bool kTransposed, class A>
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
        sums[m][0] = scalar * b0 + sums[m][0];
        sums[m][1] = scalar * b1 + sums[m][1];
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

template <int M, bool kTransposed, class A>
inline void multiply_last_rows(int64_t rows, int64_t K, const A* x, int64_t jump, const A* b, A* c, bool accumulate) {
  if (rows == M) return multiply_rows<M, kTransposed>(K, x, jump, b, c, accumulate);
  if constexpr (M > 1) return multiply_last_rows<M - 1, kTransposed>(rows, K, x, jump, b, c, accumulate);
}

// c[rows, P] (+)= X[rows, K] b[K, P]. X is in panels of `x_rows` rows; `x` points at its first row that takes part.
template <class A>
void multiply(int64_t rows, int64_t K, const A* x, int64_t x_rows, const A* b, A* c, bool accumulate) {
  constexpr int64_t P = kPanel<A>;
  int64_t m = 0;
  for (; m + kMicroRows <= rows; m += kMicroRows) {
    multiply_rows<kMicroRows, false>(K, x + m * P, x_rows * P, b, c + m * P, accumulate);
  }
  if (m < rows) {
    multiply_last_rows<kMicroRows - 1, false>(rows - m, K, x + m * P, x_rows * P, b, c + m * P, accumulate);
  }
}

// c[columns, P] (+)= X[K, columns]^T b[K, P], where X is one panel: columns <= P.
template <class A>
void multiply_transposed(int64_t columns, int64_t K, const A* x, const A* b, A* c, bool accumulate) {
  constexpr int64_t P = kPanel<A>;
  int64_t m = 0;
  for (; m + kMicroRows <= columns; m += kMicroRows) {
    multiply_rows<kMicroRows, true>(K, x + m, 0, b, c + m * P, accumulate);
  }
  if (m < columns) {
    multiply_last_rows<kMicroRows - 1, true>(columns - m, K, x + m, 0, b, c + m * P, accumulate);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
