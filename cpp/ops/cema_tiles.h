// The inner parts of the CEMA scan: tables of coefficients, one time block of tiles, and the carry between blocks.
//
// Time is cut into tiles of T = kTile steps. With h the state before a tile, x_0 .. x_(T-1) its inputs and
// k_j = Re sum_n a g q^j (+ omega at j = 0),
//   y_i = sum_(j <= i) k_(i-j) x_j + Re sum_n (g q^(i+1)) h          a triangular product, and the state's part
//   h  <- q^T h + sum_j (a q^(T-1-j)) x_j
// which is 4 N + 4 N / T + (T + 1) / 2 FMA per step where the recurrence alone is 6 N, and nothing in it waits for the
// step before. The coefficients are made in float64 and rounded once.
//
// Loops are cut so that an operand from memory serves several FMA: `kTogether` tiles share the coefficients.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/wavelets.h"
#include "ops/cema.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int kTile = CemaShape::kTile;

// As many as the registers hold: accumulators are 2 kPaired kTogether, or kOutputs kTogether.
constexpr int kTogether = kVectorBytes == 64 ? 4 : 2;
constexpr int kPaired = 2;   // wavelets whose states advance together
constexpr int kOutputs = 4;  // steps of a tile whose outputs are summed together
constexpr int kKept = 4;    // wavelets whose states of a block are kept, in L1

// Entries of a wavelet's row of the table, each a pair (re, im) of vectors of channels but for the first T vectors of
// all, the response k: a q^j, g q^(j+1), q^T, and for the carry between blocks of K steps q^K and q^K - (q^T)^(K/T),
// where the latter is of q^T as it is rounded here.
enum : int64_t { kEnter = 0, kLeave = 2 * kTile, kAdvance = 4 * kTile, kExact = kAdvance + 2, kDrift = kAdvance + 4 };
constexpr int64_t kRow = CemaShape::kTableRow;
static_assert(kRow == kDrift + 2);

// ---- tables ----

template <class A>
struct TileTables {
  A* narrow;     // [vectors of channels, T + N kRow, lanes]
  double* wide;  // [vectors of channels, N, 2, lanes]: q
  int64_t N;

  // Takes its room from the workspace and gives what follows.
  A* place(void* workspace, const CemaShape& shape) {
    N = shape.N;
    wide = static_cast<double*>(workspace);
    narrow = reinterpret_cast<A*>(wide + shape.wavelets() * 2);
    return narrow + shape.wavelets() * kRow + shape.columns() * CemaShape::kColumn * kTile;
  }
  // Of the vector of channels from d on.
  A* response(int64_t d) const { return narrow + d * (kTile + N * kRow); }
  A* row(int64_t d, int64_t n) const { return response(d) + (kTile + n * kRow) * kLanes<A>; }
  double* exact_q(int64_t d, int64_t n) const { return wide + (d * N + n * kLanes<A>)*2; }

  // Of kDoubles channels from d + i on. `steps`: of a whole block; 0 where there is none.
  void make(const Parameters<A>& parameters, const A* omega, int64_t d, int64_t i, int64_t steps) const {
    constexpr int64_t W = kLanes<A>;
    const double scale = gamma_scale(N);
    const Sigmoid<Double> frequency = parameters.frequency(d + i);
    Double response_of[kTile] = {parameters.gather(omega, d + i, 1)};
    for (int64_t n = 0; n < N; ++n) {
      const Wavelet<Double> w = parameters.wavelet(d + i, n, frequency);
      const Complex<Double> gamma = parameters.gamma_of(d + i, n);
      const Complex<Double> q{w.q_re(), w.q_im()}, g{gamma.re * scale, gamma.im * scale};
      A* to = row(d, n);
      Complex<Double> in{w.a(), Double{}}, out = g * q;
      for (int64_t j = 0; j < kTile; ++j, in = in * q, out = out * q) {
        store_pair(to + (kEnter + 2 * j) * W, W, i, in);
        store_pair(to + (kLeave + 2 * j) * W, W, i, out);
        response_of[j] += g.re * in.re - g.im * in.im;
      }
      const Complex<Double> advance = power(q, kTile);
      store_pair(to + kAdvance * W, W, i, advance);
      store_pair(exact_q(d, n), W, i, q);
      if (steps == 0) continue;
      const Complex<Double> exact = power(advance, steps / kTile);
      const Complex<Double> rounded = power(load_pair(to + kAdvance * W, W, i), steps / kTile);
      store_pair(to + kExact * W, W, i, exact);
      store_pair(to + kDrift * W, W, i, exact - rounded);
    }
    for (int64_t j = 0; j < kTile; ++j) store_wide(response(d) + j * W + i, response_of[j]);
  }
};

// ---- one time block ----

// The states of a block's tiles, of `group` wavelets: kTogether tiles side by side, those left over one by one.
struct TileStates {
  int64_t tiles, group;

  // Where the (re, im) of tile m are, and how far one wavelet is from the next, in vectors.
  int64_t at(int64_t m) const {
    return whole(m) ? m / kTogether * kTogether * group * 2 + m % kTogether * 2 : m * group * 2;
  }
  int64_t stride(int64_t m) const { return whole(m) ? 2 * kTogether : 2; }

 private:
  bool whole(int64_t m) const { return m < tiles / kTogether * kTogether; }
};

// Through M tiles with G wavelets: the states before each tile to `states`, the state after them to hr, hi.
template <class A, int G, int M>
__attribute__((always_inline)) inline void advance_tiles(const A* table, const A* x, Vec<A>* hr, Vec<A>* hi,
                                                         A* states) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> re[G][M], im[G][M];
  for (int g = 0; g < G; ++g) {
    const Vec<A> in = load(table + (g * kRow + kEnter) * W);
    for (int k = 0; k < M; ++k) {
      re[g][k] = in * load(x + (k * kTile + kTile - 1) * W);
      im[g][k] = Vec<A>{};
    }
  }
  for (int j = 1; j < kTile; ++j) {
    for (int g = 0; g < G; ++g) {
      const Vec<A> in_re = load(table + (g * kRow + kEnter + 2 * j) * W);
      const Vec<A> in_im = load(table + (g * kRow + kEnter + 2 * j + 1) * W);
      for (int k = 0; k < M; ++k) {
        const Vec<A> input = load(x + (k * kTile + kTile - 1 - j) * W);
        re[g][k] = in_re * input + re[g][k];
        im[g][k] = in_im * input + im[g][k];
      }
    }
  }
  for (int k = 0; k < M; ++k) {
    for (int g = 0; g < G; ++g) {
      const Vec<A> p_re = load(table + (g * kRow + kAdvance) * W);
      const Vec<A> p_im = load(table + (g * kRow + kAdvance + 1) * W);
      store(states + (g * M + k) * 2 * W, hr[g]);
      store(states + ((g * M + k) * 2 + 1) * W, hi[g]);
      const Vec<A> next = p_re * hr[g] + (re[g][k] - p_im * hi[g]);
      hi[g] = p_re * hi[g] + (p_im * hr[g] + im[g][k]);
      hr[g] = next;
    }
  }
}

// G wavelets of the group, from wavelet i on, through a block.
template <class A, int G>
void advance_block(const A* table, const A* x, const TileStates& of, int64_t i, A* state, A* states) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> hr[G], hi[G];
  for (int g = 0; g < G; ++g) {
    hr[g] = load(state + 2 * g * W);
    hi[g] = load(state + (2 * g + 1) * W);
  }
  int64_t m = 0;
  for (; m + kTogether <= of.tiles; m += kTogether) {
    advance_tiles<A, G, kTogether>(table, x + m * kTile * W, hr, hi, states + (of.at(m) + i * of.stride(m)) * W);
  }
  for (; m < of.tiles; ++m) {
    advance_tiles<A, G, 1>(table, x + m * kTile * W, hr, hi, states + (of.at(m) + i * of.stride(m)) * W);
  }
  for (int g = 0; g < G; ++g) {
    store(state + 2 * g * W, hr[g]);
    store(state + (2 * g + 1) * W, hi[g]);
  }
}

// The outputs kFirst .. kFirst + kOutputs - 1 of M tiles: the response to their own x (added to y where there is one
// already) and to the states of `group` wavelets. Steps of y lie W, of out `step` elements apart.
template <class A, int M, int kFirst, class T>
inline void output_tiles(const A* response, const A* table, const A* x, const A* states, int64_t group, const A* y,
                         T* out, int64_t step) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> sum[kOutputs][M];
  if (y == nullptr) {
    for (int i = 0; i < kOutputs; ++i) {
      for (int k = 0; k < M; ++k) sum[i][k] = load(response) * load(x + (k * kTile + kFirst + i) * W);
    }
    for (int j = 1; j < kFirst + kOutputs; ++j) {
      const Vec<A> k_j = load(response + j * W);
      for (int i = 0; i < kOutputs; ++i) {
        if (kFirst + i < j) continue;
        for (int k = 0; k < M; ++k) sum[i][k] = k_j * load(x + (k * kTile + kFirst + i - j) * W) + sum[i][k];
      }
    }
  } else {
    for (int i = 0; i < kOutputs; ++i) {
      for (int k = 0; k < M; ++k) sum[i][k] = load(y + (k * kTile + kFirst + i) * W);
    }
  }
  table += (kLeave + 2 * kFirst) * W;
  for (int64_t n = 0; n < group; ++n, table += kRow * W, states += 2 * M * W) {
    Vec<A> hr[M], hi[M];
    for (int k = 0; k < M; ++k) {
      hr[k] = load(states + 2 * k * W);
      hi[k] = load(states + (2 * k + 1) * W);
    }
    for (int i = 0; i < kOutputs; ++i) {
      const Vec<A> re = load(table + 2 * i * W);
      const Vec<A> im = load(table + (2 * i + 1) * W);
      for (int k = 0; k < M; ++k) {
        sum[i][k] = re * hr[k] + sum[i][k];
        sum[i][k] = sum[i][k] - im * hi[k];
      }
    }
  }
  for (int i = 0; i < kOutputs; ++i) {
    for (int k = 0; k < M; ++k) store(out + (k * kTile + kFirst + i) * step, sum[i][k]);
  }
}

// ---- the carry between blocks ----

// The state between blocks is hi + lo, in A: `end` came of hi alone, with q^T rounded. H <- end + (q^K - E) hi + q^K
// lo, so that neither rounding adds up over the blocks.
template <class A>
inline void carry(const A* table, const A* end, A* hi, A* lo) {
  constexpr int64_t W = kLanes<A>;
  const Vec<A> end_re = load(end), end_im = load(end + W);
  if constexpr (std::is_same_v<A, double>) {
    store(hi, end_re);
    store(hi + W, end_im);
  } else {
    const Complex<Vec<A>> exact{load(table + kExact * W), load(table + (kExact + 1) * W)};
    const Complex<Vec<A>> drift{load(table + kDrift * W), load(table + (kDrift + 1) * W)};
    const Complex<Vec<A>> more =
        drift * Complex<Vec<A>>{load(hi), load(hi + W)} + exact * Complex<Vec<A>>{load(lo), load(lo + W)};
    const auto add = [](Vec<A> a, Vec<A> b, A* high, A* low) {  // Knuth's, exact
      const Vec<A> sum = a + b;
      const Vec<A> b_in = sum - a;
      store(high, sum);
      store(low, (a - (sum - b_in)) + (b - b_in));
    };
    add(end_re, more.re, hi, lo);
    add(end_im, more.im, hi + W, lo + W);
  }
}

// The state after `steps` < T further steps from h, with x from there on; in float64.
template <class A>
inline void finish_tile(const A* table, const double* q, const A* x, int64_t steps, const A* h, A* end) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t i = 0; i < W; i += kDoubles) {
    Complex<Double> sum = power(load_pair(q, W, i), steps) * load_pair(h, W, i);
    for (int64_t j = 0; j < steps; ++j) {
      const Double input = load_wide(x + (steps - 1 - j) * W + i);
      const Complex<Double> in = load_pair(table + (kEnter + 2 * j) * W, W, i);
      sum = sum + Complex<Double>{in.re * input, in.im * input};
    }
    store_pair(end, W, i, sum);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
