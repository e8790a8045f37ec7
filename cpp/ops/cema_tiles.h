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
#include "ops/cema_columns.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int kTile = CemaShape::kTile;

// As many as the registers hold: accumulators are 2 kPaired kTogether, or kOutputs kTogether.
constexpr int kTogether = kVectorBytes == 64 ? 4 : 2;
constexpr int kPaired = 2;   // wavelets whose states advance together
constexpr int kOutputs = 4;  // steps of a tile whose outputs are summed together
constexpr int kKept = 4;     // wavelets whose states of a block are kept, in L1

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
  A* powers;     // [vectors of channels, N, T - 1, 2, lanes]: q^1 .. q^(T-1); nullptr: not wanted
  int64_t N;
  int64_t base = 0;  // the channel whose row is the first

  // Takes its room from the workspace and gives what follows.
  A* place(void* workspace, const CemaShape& shape, bool with_powers) {
    N = shape.N;
    wide = static_cast<double*>(workspace);
    narrow = reinterpret_cast<A*>(wide + shape.wavelets() * 2);
    A* rest = narrow + shape.wavelets() * kRow + shape.columns() * CemaShape::kColumn * kTile;
    powers = with_powers ? rest : nullptr;
    return with_powers ? rest + shape.wavelets() * 2 * (kTile - 1) : rest;
  }
  // Of the vector of channels from d on.
  A* response(int64_t d) const { return narrow + (d - base) * (kTile + N * kRow); }
  A* row(int64_t d, int64_t n) const { return response(d) + (kTile + n * kRow) * kLanes<A>; }
  A* powers_of(int64_t d, int64_t n) const { return powers + ((d - base) * N + n * kLanes<A>)*2 * (kTile - 1); }
  double* exact_q(int64_t d, int64_t n) const { return wide + ((d - base) * N + n * kLanes<A>)*2; }

  // Of the channels [d0, d1).
  template <class Args>
  void make(const Args& args, int64_t d0, int64_t d1) const {
    const Parameters<A> parameters = Parameters<A>::of(args);
    const int64_t steps = args.sequences.length >= CemaShape::kBlock ? CemaShape::kBlock : 0;
    for (int64_t d = d0; d < d1; d += kLanes<A>) {
      for (int64_t i = 0; i < kLanes<A>; i += kDoubles) {
        make_lanes(parameters, static_cast<const A*>(args.omega), d, i, steps);
      }
    }
  }

 private:
  // Of kDoubles channels from d + i on. `steps`: of a whole block; 0 where there is none.
  void make_lanes(const Parameters<A>& parameters, const A* omega, int64_t d, int64_t i, int64_t steps) const {
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
      Complex<Double> power_of = q;
      for (int64_t j = 0; powers != nullptr && j < kTile - 1; ++j, power_of = power_of * q) {
        store_pair(powers_of(d, n) + 2 * j * W, W, i, power_of);
      }
      if (steps == 0) continue;
      const Complex<Double> exact = power(advance, steps / kTile);
      const Complex<Double> rounded = power(load_pair(to + kAdvance * W, W, i), steps / kTile);
      store_pair(to + kExact * W, W, i, exact);
      store_pair(to + kDrift * W, W, i, exact - rounded);
    }
    for (int64_t j = 0; j < kTile; ++j) store_wide(response(d) + j * W + i, response_of[j]);
  }
};

// Calls body(part, d0, d1, tables) for all parts of the sequences and stages of columns, in parallel. A stage makes its
// tables where those of its task's first stage were, so that they stay in L2; where there are parts, which share
// tables, all are made first.
template <class Args, class Tables, class Body>
void with_tables(const Args& args, const Tables& tables, Body&& body) {
  constexpr int64_t kColumn = CemaShape::kColumn;
  const int64_t parts = args.parts();
  if (parts > 1) {
    parallel_for(args.columns(), 1 + 64 / (kColumn * args.N), [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      tables.make(args, begin * kColumn, end * kColumn < args.D ? end * kColumn : args.D);
    });
  }
  parallel_for(parts * args.columns(), 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for_columns(args, begin, end, [&](int64_t part, int64_t first, int64_t last) {
      for_stages(args, first, last, [&](int64_t d0, int64_t d1) {
        Tables own = tables;
        if (parts == 1) {
          own.base = d0 - first * kColumn;
          own.make(args, d0, d1);
        }
        body(part, d0, d1, own);
      });
    });
    finish_puts();
  });
}

// ---- one time block ----

// The states of a block's tiles, of `group` wavelets: kTogether tiles side by side, those left over one by one. What
// at() gives is for wavelet `first` of the group.
struct TileStates {
  int64_t tiles, group, first = 0;

  // Where the (re, im) of tile m are, and how far one wavelet is from the next, in vectors.
  int64_t at(int64_t m) const {
    if (m < whole()) return m / kTogether * kTogether * group * 2 + (first * kTogether + m % kTogether) * 2;
    return (m * group + first) * 2;
  }
  int64_t stride(int64_t m) const { return m < whole() ? 2 * kTogether : 2; }
  TileStates from(int64_t wavelet) const { return {tiles, group, wavelet}; }
  int64_t whole() const { return tiles / kTogether * kTogether; }
  // The first tile of those that are worked on last; and the tile behind those worked on first.
  int64_t last() const { return whole() < tiles ? tiles - 1 : tiles - kTogether; }
  int64_t behind_first() const { return whole() > 0 ? kTogether : 1; }
};

// Forward in time: the states from x. Backward (kBack): the adjoint states from dy, M <- q^T M + sum_i (g q^(i+1))
// dy_i, where dS = Re(M dh), and with them dx from M behind the tile: the same with the two rows of coefficients and
// the order of time exchanged.
enum Direction : bool { kAhead, kBack };

// Through M tiles with G wavelets: the states the tiles are entered with to `states` (nullptr: not wanted), the state
// after them to hr, hi.
template <class A, Direction kWay, bool kKeep, int G, int M>
__attribute__((always_inline)) inline void advance_tiles(const A* table, const A* x, Vec<A>* hr, Vec<A>* hi,
                                                         A* states) {
  constexpr int64_t W = kLanes<A>;
  constexpr int64_t kFrom = kWay == kBack ? kLeave : kEnter;
  Vec<A> re[G][M], im[G][M];
  for (int g = 0; g < G; ++g) {
    const A* in = table + (g * kRow + kFrom) * W;
    for (int k = 0; k < M; ++k) {
      const Vec<A> input = load(x + (k * kTile + (kWay == kBack ? 0 : kTile - 1)) * W);
      re[g][k] = load(in) * input;
      im[g][k] = kWay == kBack ? load(in + W) * input : Vec<A>{};  // a is real
    }
  }
  for (int j = 1; j < kTile; ++j) {
    for (int g = 0; g < G; ++g) {
      const Vec<A> in_re = load(table + (g * kRow + kFrom + 2 * j) * W);
      const Vec<A> in_im = load(table + (g * kRow + kFrom + 2 * j + 1) * W);
      for (int k = 0; k < M; ++k) {
        const Vec<A> input = load(x + (k * kTile + (kWay == kBack ? j : kTile - 1 - j)) * W);
        re[g][k] = in_re * input + re[g][k];
        im[g][k] = in_im * input + im[g][k];
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    const int k = kWay == kBack ? M - 1 - i : i;
    for (int g = 0; g < G; ++g) {
      const Vec<A> p_re = load(table + (g * kRow + kAdvance) * W);
      const Vec<A> p_im = load(table + (g * kRow + kAdvance + 1) * W);
      if constexpr (kKeep) {
        store(states + (g * M + k) * 2 * W, hr[g]);
        store(states + ((g * M + k) * 2 + 1) * W, hi[g]);
      }
      const Vec<A> next = p_re * hr[g] + (re[g][k] - p_im * hi[g]);
      hi[g] = p_re * hi[g] + (p_im * hr[g] + im[g][k]);
      hr[g] = next;
    }
  }
}

// G wavelets, of.first and those behind it, through a block; `cut`: nobody wants the state after the last tile.
template <class A, Direction kWay, bool kKeep, int G>
void advance_block(const A* table, const A* x, const TileStates& of, A* state, A* states, bool cut = false) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> hr[G], hi[G];
  for (int g = 0; g < G; ++g) {
    hr[g] = load(state + 2 * g * W);
    hi[g] = load(state + (2 * g + 1) * W);
  }
  const int64_t whole = of.whole();
  const auto together = [&](int64_t m) {
    advance_tiles<A, kWay, kKeep, G, kTogether>(table, x + m * kTile * W, hr, hi, states + of.at(m) * W);
  };
  const auto single = [&](int64_t m) {
    advance_tiles<A, kWay, kKeep, G, 1>(table, x + m * kTile * W, hr, hi, states + of.at(m) * W);
  };
  if constexpr (kWay == kBack) {
    for (int64_t m = of.tiles; m-- > whole;) single(m);
    for (int64_t m = whole; m > 0; m -= kTogether) together(m - kTogether);
  } else {
    for (int64_t m = 0; m < whole; m += kTogether) together(m);
    for (int64_t m = whole; m < of.tiles - cut; ++m) single(m);
    for (int g = 0; cut && whole < of.tiles && g < G; ++g) {
      A* last = states + (of.at(of.tiles - 1) + g * of.stride(of.tiles - 1)) * W;
      store(last, hr[g]);
      store(last + W, hi[g]);
    }
  }
  for (int g = 0; g < G; ++g) {
    store(state + 2 * g * W, hr[g]);
    store(state + (2 * g + 1) * W, hi[g]);
  }
}

// What the tiles' own x gives to their outputs.
template <class A, Direction kWay>
void respond(const A* response, const A* x, int64_t tiles, A* sums) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t m = 0; m < tiles; ++m, x += kTile * W, sums += kTile * W) {
    Vec<A> sum[kTile] = {};
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const Vec<A> k_j = load(response + j * W);
#pragma GCC unroll 8
      for (int i = j; i < kTile; ++i) {
        const int to = kWay == kBack ? kTile - 1 - i : i, from = kWay == kBack ? to + j : to - j;
        sum[to] = k_j * load(x + from * W) + sum[to];
      }
    }
    for (int i = 0; i < kTile; ++i) store(sums + i * W, sum[i]);
  }
}

// The outputs kFirst .. kFirst + kOutputs - 1 of M tiles: what the states of `group` wavelets add to y. Steps of y lie
// W, of out `step` elements apart.
template <class A, Direction kWay, bool kPast, int M, int kFirst, class T>
__attribute__((always_inline)) inline void output_tiles(const A* table, const A* states, int64_t group, const A* y,
                                                        T* out, int64_t step) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> sum[kOutputs][M];
  for (int i = 0; i < kOutputs; ++i) {
    for (int k = 0; k < M; ++k) sum[i][k] = load(y + (k * kTile + kFirst + i) * W);
  }
  table += (kWay == kBack ? kEnter + 2 * (kTile - 1 - kFirst) : kLeave + 2 * kFirst) * W;
  for (int64_t n = 0; n < group; ++n, table += kRow * W, states += 2 * M * W) {
    Vec<A> hr[M], hi[M];
    for (int k = 0; k < M; ++k) {
      hr[k] = load(states + 2 * k * W);
      hi[k] = load(states + (2 * k + 1) * W);
    }
    for (int i = 0; i < kOutputs; ++i) {
      const A* pair = table + (kWay == kBack ? -2 * i : 2 * i) * W;
      const Vec<A> re = load(pair), im = load(pair + W);
      for (int k = 0; k < M; ++k) {
        sum[i][k] = re * hr[k] + sum[i][k];
        sum[i][k] = sum[i][k] - im * hi[k];
      }
    }
  }
  for (int i = 0; i < kOutputs; ++i) {
    for (int k = 0; k < M; ++k) put<kPast>(out + (k * kTile + kFirst + i) * step, sum[i][k]);
  }
}

// Of all tiles of a block, from sums [steps, W] to the same, or to out, `step` elements from step to step, where that
// is given; those worked on with tile `aside` stay in sums.
// Calls after() now and then.
template <class A, Direction kWay, class T, class After>
inline void output_block(const A* table, const A* states, const TileStates& of, A* sums, T* out, int64_t step,
                         bool past, int64_t aside, After&& after) {
  constexpr int64_t W = kLanes<A>;
  const auto tiles = [&](auto together, int64_t m) {
    constexpr int M = together.value;
    const A* from = states + of.at(m) * W;
    A* y = sums + m * kTile * W;
    const auto go = [&](auto kPast, auto* to, int64_t apart) {
      output_tiles<A, kWay, kPast.value, M, 0>(table, from, of.group, y, to, apart);
      output_tiles<A, kWay, kPast.value, M, kOutputs>(table, from, of.group, y, to, apart);
    };
    if (out == nullptr || m == aside) {
      go(std::false_type{}, y, W);
    } else if (past) {
      go(std::true_type{}, out + m * kTile * step, step);
    } else {
      go(std::false_type{}, out + m * kTile * step, step);
    }
    after();
  };
  int64_t m = 0;
  for (; m + kTogether <= of.tiles; m += kTogether) tiles(std::integral_constant<int, kTogether>{}, m);
  for (; m < of.tiles; ++m) tiles(std::integral_constant<int, 1>{}, m);
}

// ---- the carry between blocks ----

// The state between blocks is hi + lo, in A: `end` came of hi alone, with q^T rounded. H <- end + (q^K - E) hi + q^K
// lo, so that neither rounding adds up over the blocks.
template <class A>
inline void carry(const A* table, bool whole, const A* end, A* hi, A* lo) {
  constexpr int64_t W = kLanes<A>;
  if (std::is_same_v<A, double> || !whole) {
    std::memcpy(hi, end, 2 * W * sizeof(A));
  } else {
    const Vec<A> end_re = load(end), end_im = load(end + W);
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

// The states of G wavelets after `steps` < T further steps from h, `stride` vectors apart, with x from there on; in
// float64, as ends of sequences and calls may be many.
template <class A, int G>
inline void finish_tile(const A* table, const double* q, const A* x, int64_t steps, const A* h, int64_t stride,
                        A* end) {
  constexpr int64_t W = kLanes<A>, kHalves = W / kDoubles;
  Complex<Double> state[G][kHalves], by[G][kHalves];
  Double a[G][kHalves];
  for (int g = 0; g < G; ++g) {
    for (int64_t i = 0; i < kHalves; ++i) {
      state[g][i] = load_pair(h + g * stride * W, W, i * kDoubles);
      by[g][i] = load_pair(q + 2 * g * W, W, i * kDoubles);
      a[g][i] = load_wide(table + (g * kRow + kEnter) * W + i * kDoubles);
    }
  }
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = 0; i < kHalves; ++i) {
      const Double input = load_wide(x + t * W + i * kDoubles);
      for (int g = 0; g < G; ++g) {
        const Complex<Double> s = state[g][i], f = by[g][i];
        state[g][i] = {f.re * s.re + (a[g][i] * input - f.im * s.im), f.re * s.im + f.im * s.re};
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int64_t i = 0; i < kHalves; ++i) store_pair(end + 2 * g * W, W, i * kDoubles, state[g][i]);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
