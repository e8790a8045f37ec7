// Products of matrices with some vectors on the CPU. Of one vector reading the matrix is the time; of several, tiles of
// sums in registers share what is loaded, and the tile of the matrix that comes next is fetched meanwhile.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/gemm.h"
#include "core/linear.h"
#include "core/parallel.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Rows of the matrix that share a load of x. One vector goes row by row through a matrix in the caches: that is what
// the hardware foresees best.
template <int M, bool kFar>
constexpr int kMatrixRows = (M == 1 && !kFar) ? 1 : (kVectorBytes == 64 ? 4 : 2);
constexpr int64_t kFarBytes = 1 << 24;  // of matrices (AMD Zen 4, November 2026)

// sums[j][r], j < M, r < R: a vector whose lanes add up to w_r . x_j, for rows of n elements that follow each other.
template <class F, int M, int R, class T, class X>
__attribute__((always_inline)) inline void products(const T* w, const X* x, int64_t n, Vec<stat_t<T>> (&sums)[M][R]) {
  using A = stat_t<T>;
  constexpr int64_t kStep = kLanes<A> * kPerWord<F>;
  constexpr int kChains = M > 1 ? 1 : R == 1 ? 4 : 8 / R;  // of sums that do not wait for each other
  Vec<A> chains[kChains][M][R] = {};
  const auto add = [&](int k, int64_t i, int64_t count) __attribute__((always_inline)) {
    Vec<A> v[R];
    for (int r = 0; r < R; ++r) v[r] = load_words<F>(w + r * n + i, count);
    for (int j = 0; j < M; ++j) {
      const Vec<A> u = load_words<F>(x + j * n + i, count);
      for (int r = 0; r < R; ++r) chains[k][j][r] = multiply_add<F, A>(v[r], u, chains[k][j][r]);
    }
    // As many lines as were read, in their order in memory; to the second level, as a tile may be more than the first.
    for (int r = 0; R > 1 && r < R; ++r) __builtin_prefetch(w + kLanes<A> * n + R * i + r * kStep, 0, 2);
  };
  int64_t i = 0;
  for (; i + kChains * kStep <= n; i += kChains * kStep) {
    for (int k = 0; k < kChains; ++k) add(k, i + k * kStep, kStep);
  }
  for (; i < n; i += kStep) add(0, i, n - i);
  for (int j = 0; j < M; ++j) {
    for (int r = 0; r < R; ++r) {
      sums[j][r] = chains[0][j][r];
      for (int k = 1; k < kChains; ++k) sums[j][r] += chains[k][j][r];
    }
  }
}

// The rows [first, first + kLanes) of the matrix, as far as they exist, for M rows x_b from b on.
template <class F, int M, bool kFar, class T, class X>
void linear_tile(const Linear& linear, const X* x, int64_t b, int64_t first) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  constexpr int R = kMatrixRows<M, kFar>;
  const int64_t left = linear.out - first, n = left < W ? left : W;
  Vec<A> rows[M][W] = {};
  const auto multiply = [&](int64_t r, auto count) __attribute__((always_inline)) {
    Vec<A> sums[M][count];
    products<F>(static_cast<const T*>(linear.weight) + (first + r) * linear.in, x + b * linear.in, linear.in, sums);
    for (int j = 0; j < M; ++j) {
      for (int i = 0; i < count; ++i) rows[j][r + i] = sums[j][i];
    }
  };
  int64_t r = 0;
  for (; r + R <= n; r += R) multiply(r, std::integral_constant<int, R>{});
  for (; r < n; ++r) multiply(r, std::integral_constant<int, 1>{});
  for (int j = 0; j < M; ++j) {
    Vec<A> y = sum_each<A>(rows[j]);
    if (linear.bias != nullptr) y += load(static_cast<const T*>(linear.bias) + first, n);
    if (linear.scale != nullptr) y *= load(static_cast<const T*>(linear.scale) + first, n);
    const int64_t at = (b + j) * linear.out + first;
    for (const void* added : linear.added) {
      if (added != nullptr) y += load(static_cast<const T*>(added) + at, n);
    }
    store(static_cast<T*>(linear.y) + at, y, n);
  }
}

// x as it is multiplied: as it is, or in the type sums are made in.
template <class F, class T>
auto factors(const Linear& linear, int64_t B) {
  using A = stat_t<T>;
  const T* x = static_cast<const T*>(linear.x);
  if constexpr (std::is_same_v<T, A> || kPerWord<F> > 1) {
    return x;
  } else {
    A* wide = static_cast<A*>(linear.wide);
    const int64_t n = B * linear.in;
    for (int64_t i = 0; i < n; i += kLanes<A>) store(wide + i, load(x + i, n - i), n - i);
    return static_cast<const A*>(wide);
  }
}

// Several of them side by side in one parallel loop.
template <class T, int kCount>
void linear(const Linear (&all)[kCount], int64_t B) {
  using F = factor_t<T>;
  constexpr int64_t W = kLanes<stat_t<T>>, kGrain = 1 << 16;  // FMAs that are worth a thread
  decltype(factors<F, T>(all[0], B)) x[kCount];
  int64_t tiles = 0, weights = 0;
  for (int i = 0; i < kCount; ++i) {
    x[i] = factors<F, T>(all[i], B);
    tiles += ceil_div(all[i].out, W);
    weights += all[i].in * all[i].out;
  }
  if (tiles == 0) return;
  const int64_t work = B * weights;
  const bool is_far = weights * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  parallel_for(tiles, work == 0 ? tiles : ceil_div(tiles * kGrain, work), [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (int i = 0; i < kCount; ++i) {
      const int64_t count = ceil_div(all[i].out, W);
      for (int64_t tile = begin > start ? begin - start : 0; tile < count && start + tile < end; ++tile) {
        int64_t b = 0;
        for (; b + 4 <= B; b += 4) linear_tile<F, 4, true, T>(all[i], x[i], b, tile * W);
        for (; b + 2 <= B; b += 2) linear_tile<F, 2, true, T>(all[i], x[i], b, tile * W);
        if (b == B) continue;
        if (is_far) {
          linear_tile<F, 1, true, T>(all[i], x[i], b, tile * W);
        } else {
          linear_tile<F, 1, false, T>(all[i], x[i], b, tile * W);
        }
      }
      start += count;
    }
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
