// What the backward pass of the CEMA scan sums up for the gradients of the parameters.
//
// With M_m the adjoint of the state behind tile m (dS = Re(M dh)), h_m the state before it, and products without
// conjugates:
//   G_i = sum_m dy_i h_m,   H_j = sum_m x_j M_m,   C = sum_m h_m M_m,   r_l = sum of dy_i x_(i-l) within the tiles
// hold all there is to know of a block's tiles: 4 N FMA per step where the sums over every step take 10 N. From them,
// for dS = Re(D_g dg + D_lambda dlambda) + D_a da with q = e^lambda,
//   D_g      = sum_i q^(i+1) G_i + sum_l a q^l r_l
//   D_a      = Re(sum_j q^(T-1-j) H_j + sum_l g q^l r_l)
//   D_lambda = g sum_i (i+1) q^(i+1) G_i + a sum_j (T-1-j) q^(T-1-j) H_j + T q^T C + a g sum_l l q^l r_l.
// The sums over a block's 16 tiles and their products with powers of q are in A, everything else in float64.
#pragma once

#include "ops/cema_tiles.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Sums of one wavelet in float64, pairs (re, im) of rows but for the real kSumA; kSumTail: of D_lambda, of the steps
// behind the last tile. Of a channel: r_l, and domega of those steps.
enum : int64_t { kSumG = 0, kSumOut = 2, kSumIn = 4, kSumC = 6, kSumTail = 8, kSumA = 10 };
constexpr int64_t kSums = CemaShape::kSums;
constexpr int64_t kChannelSums = kTile + 1;
static_assert(kSums == kSumA + 1 && kChannelSums == CemaShape::kChannelSums);

template <class A>
inline void add_to(double* sums, Vec<A> v) {
  if constexpr (std::is_same_v<A, double>) {
    store(sums, load(sums) + v);
  } else {
    A lanes[kLanes<A>];
    store(lanes, v);
    for (int64_t i = 0; i < kLanes<A>; i += kDoubles) store(sums + i, load(sums + i) + load_wide(lanes + i));
  }
}

// in_i times the states of G wavelets, summed over the tiles: out [G, T, 2] vectors. `states`: of the first of them.
template <class A, int G>
inline void product_block(const A* in, const A* states, const TileStates& of, Vec<A>* out) {
  constexpr int64_t W = kLanes<A>;
  for (int first = 0; first < kTile; first += kOutputs) {
    Vec<A> re[G][kOutputs] = {}, im[G][kOutputs] = {};
    for (int64_t m = 0; m < of.tiles; ++m) {
      const A* step = in + (m * kTile + first) * W;
      const A* state = states + of.at(m) * W;
      const int64_t stride = of.stride(m) * W;
      for (int g = 0; g < G; ++g) {
        const Vec<A> hr = load(state + g * stride), hi = load(state + g * stride + W);
        for (int i = 0; i < kOutputs; ++i) {
          re[g][i] = load(step + i * W) * hr + re[g][i];
          im[g][i] = load(step + i * W) * hi + im[g][i];
        }
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int i = 0; i < kOutputs; ++i) {
        out[(g * kTile + first + i) * 2] = re[g][i];
        out[(g * kTile + first + i) * 2 + 1] = im[g][i];
      }
    }
  }
}

// Of one wavelet.
template <class A>
inline Complex<Vec<A>> state_products(const A* h, const A* M, const TileStates& of) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> rr = {}, ii = {}, ri = {}, ir = {};
  for (int64_t m = 0; m < of.tiles; ++m) {
    const int64_t at = of.at(m) * W;
    const Vec<A> hr = load(h + at), hi = load(h + at + W), mr = load(M + at), mi = load(M + at + W);
    rr = hr * mr + rr;
    ii = hi * mi + ii;
    ri = hr * mi + ri;
    ir = hi * mr + ir;
  }
  return {rr - ii, ri + ir};
}

// G wavelets of the group from wavelet i on. h, M: as TileStates has them; powers: of the first of the G.
template <class A, int G>
void add_products(const A* table, const A* powers, const A* x, const A* dy, const A* h, const A* M,
                  const TileStates& of, int64_t i, double* sums) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> by_dy[G * kTile * 2], by_x[G * kTile * 2];
  // Both layouts of TileStates keep the G wavelets one stride apart, and the first of them i strides from the group.
  const TileStates own = of.from(i);
  product_block<A, G>(dy, h, own, by_dy);
  product_block<A, G>(x, M, own, by_x);
  for (int g = 0; g < G; ++g, table += kRow * W, powers += 2 * (kTile - 1) * W, sums += kSums * W) {
    const auto power = [&](int j) {  // q^j, 1 <= j <= T
      const A* pair = j == kTile ? table + kAdvance * W : powers + 2 * (j - 1) * W;
      return Complex<Vec<A>>{load(pair), load(pair + W)};
    };
    const auto product = [&](const Vec<A>* of, int step) {
      return Complex<Vec<A>>{of[(g * kTile + step) * 2], of[(g * kTile + step) * 2 + 1]};
    };
    // sum_j z_j and, as the sum of its parts from the far end on, sum_j j z_j.
    Complex<Vec<A>> sum = {}, weighted = {};
    for (int j = kTile; j >= 1; --j) {
      sum = sum + power(j) * product(by_dy, j - 1);
      weighted = weighted + sum;
    }
    add_to<A>(sums + kSumG * W, sum.re);
    add_to<A>(sums + (kSumG + 1) * W, sum.im);
    add_to<A>(sums + kSumOut * W, weighted.re);
    add_to<A>(sums + (kSumOut + 1) * W, weighted.im);
    sum = weighted = Complex<Vec<A>>{};
    for (int j = kTile - 1; j >= 1; --j) {
      sum = sum + power(j) * product(by_x, kTile - 1 - j);
      weighted = weighted + sum;
    }
    add_to<A>(sums + kSumA * W, sum.re + product(by_x, kTile - 1).re);
    add_to<A>(sums + kSumIn * W, weighted.re);
    add_to<A>(sums + (kSumIn + 1) * W, weighted.im);
    const Complex<Vec<A>> crossed = state_products(h, M, of.from(i + g));
    add_to<A>(sums + kSumC * W, crossed.re);
    add_to<A>(sums + (kSumC + 1) * W, crossed.im);
  }
}

// r_l of a block's tiles.
template <class A>
void add_lags(const A* x, const A* dy, int64_t tiles, double* sums) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> lag[kTile] = {};
  for (int64_t m = 0; m < tiles; ++m, x += kTile * W, dy += kTile * W) {
    for (int i = 0; i < kTile; ++i) {
      const Vec<A> out = load(dy + i * W);
      for (int l = 0; l <= i; ++l) lag[l] = out * load(x + (i - l) * W) + lag[l];
    }
  }
  for (int l = 0; l < kTile; ++l) add_to<A>(sums + l * W, lag[l]);
}

}  // namespace megalodon::cpu::MEGALODON_ISA
