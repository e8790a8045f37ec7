// Products of matrices with a few vectors on the CPU: every weight is read once, and reading them is the time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/gemm.h"
#include "core/linear.h"
#include "core/parallel.h"

namespace megalodon::cpu::MEGALODON_ISA {

// sums[j * kLanes], j < M: a vector whose lanes add up to w . x_j, for rows x_j of n elements.
template <int M, class T>
inline void products(const T* w, const stat_t<T>* x, int64_t n, Vec<stat_t<T>>* sums) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  constexpr int kChains = M == 1 ? 4 : 2;  // of dependent FMAs, side by side
  Vec<A> chains[M][kChains] = {};
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W) {
    for (int k = 0; k < kChains; ++k) {
      const Vec<A> v = load(w + i + k * W);
      for (int j = 0; j < M; ++j) chains[j][k] = v * load(x + j * n + i + k * W) + chains[j][k];
    }
  }
  for (; i < n; i += W) {
    const Vec<A> v = load(w + i, n - i);
    for (int j = 0; j < M; ++j) chains[j][0] = v * load(x + j * n + i, n - i) + chains[j][0];
  }
  for (int j = 0; j < M; ++j) {
    for (int k = 1; k < kChains; ++k) chains[j][0] += chains[j][k];
    sums[j * W] = chains[j][0];
  }
}

// The rows [first, first + kLanes) of W, as far as they exist, for M rows x_b from b on.
template <int M, class T>
void linear_tile(const Linear& linear, const stat_t<T>* x, int64_t b, int64_t first) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t n = linear.out - first < W ? linear.out - first : W;
  const T* weight = static_cast<const T*>(linear.weight) + first * linear.in;
  Vec<A> rows[M][W];
  for (int64_t r = 0; r < n; ++r) products<M>(weight + r * linear.in, x + b * linear.in, linear.in, &rows[0][r]);
  for (int j = 0; j < M; ++j) {
    for (int64_t r = n; r < W; ++r) rows[j][r] = Vec<A>{};
    transpose<A>(rows[j]);
    Vec<A> y = rows[j][0];
    for (int64_t r = 1; r < W; ++r) y += rows[j][r];
    if (linear.bias != nullptr) y += load(static_cast<const T*>(linear.bias) + first, n);
    if (linear.scale != nullptr) y *= load(static_cast<const T*>(linear.scale) + first, n);
    const int64_t at = (b + j) * linear.out + first;
    for (const void* added : linear.added) {
      if (added != nullptr) y += load(static_cast<const T*>(added) + at, n);
    }
    store(static_cast<T*>(linear.y) + at, y, n);
  }
}

// x in the type sums are made in.
template <class T>
const stat_t<T>* widened(const Linear& linear, int64_t B) {
  using A = stat_t<T>;
  if constexpr (std::is_same_v<T, A>) {
    return static_cast<const A*>(linear.x);
  } else {
    const T* x = static_cast<const T*>(linear.x);
    A* wide = static_cast<A*>(linear.wide);
    const int64_t n = B * linear.in;
    for (int64_t i = 0; i < n; i += kLanes<A>) store(wide + i, load(x + i, n - i), n - i);
    return wide;
  }
}

// Several of them side by side in one parallel loop.
template <class T, int kCount>
void linear(const Linear (&all)[kCount], int64_t B) {
  constexpr int64_t W = kLanes<stat_t<T>>, kGrain = 1 << 16;  // FMAs that are worth a thread
  const stat_t<T>* x[kCount];
  int64_t tiles = 0, work = 0;
  for (int i = 0; i < kCount; ++i) {
    x[i] = widened<T>(all[i], B);
    tiles += ceil_div(all[i].out, W);
    work += B * all[i].in * all[i].out;
  }
  if (tiles == 0) return;
  parallel_for(tiles, work == 0 ? tiles : ceil_div(tiles * kGrain, work), [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (int i = 0; i < kCount; ++i) {
      const int64_t count = ceil_div(all[i].out, W);
      for (int64_t tile = begin > start ? begin - start : 0; tile < count && start + tile < end; ++tile) {
        int64_t b = 0;
        for (; b + 4 <= B; b += 4) linear_tile<4, T>(all[i], x[i], b, tile * W);
        for (; b < B; ++b) linear_tile<1, T>(all[i], x[i], b, tile * W);
      }
      start += count;
    }
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
