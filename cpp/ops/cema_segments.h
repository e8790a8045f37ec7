// Short segments of a packed row, whose states before are zeros: there the scan would spend its time on tables, states
// and tiles that are not full.
//
// With k_l = Re sum_n a g q^l (+ omega at l = 0) a segment of S steps from 0 is a convolution and its transpose,
//   y_t = sum_(l <= t) k_l x_(t-l),   dx_t = sum_l k_l dy_(t+l),   dS/dk_l = r_l = sum_t dy_t x_(t-l)
// (S + 1) / 2 FMA per step each where the scan takes about 4 N and 16 N, and its last state, which goes to memory as it
// is made, is 2 N more: lanes are the wavelets of a channel, as in cema_short.h,
//   h <- q^U h + sum_(j < U) (a q^j) x_(last-j)
// in units of U steps, the first one shorter.
//
// Several segments share a block of packed rows, each from a whole tile on, zeros behind it.
#pragma once

#include <algorithm>

#include "ops/cema_products.h"
#include "ops/cema_short.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int64_t kUnit = CemaShape::kUnit;
constexpr int64_t kFew = 16;  // short segments that are not worth the tables

// The tables of tiles and those of short segments.
template <class A>
struct SegmentTables : TileTables<A> {
  using TileTables<A>::N, TileTables<A>::base;
  int64_t steps = 0;  // of the longest short segment, in whole tiles
  A* kernel;          // [vectors of channels, steps, lanes]: k
  A* entering;        // [channels, U + 2, 2 N in whole vectors]: a q^j; q^U as two rows to multiply by. nullptr: none

  // As TileTables::place. Segments of at most `most` steps are short, where several start from zeros.
  A* place(void* workspace, const CemaShape& shape, int64_t most, bool zeros, bool backward) {
    const Sequences& sequences = shape.sequences;
    const bool several = zeros && sequences.packed && sequences.count > 1;
    kernel = TileTables<A>::place(workspace, shape, backward);
    int64_t few = kFew;
    for (int64_t i = 0; several && i < sequences.count; ++i) {
      const int64_t length = sequences.end(i) - sequences.begin(i);
      if (length > most) continue;
      --few;
      steps = std::max(steps, length);
    }
    steps = few > 0 ? 0 : round_up(steps, kTile);
    const int64_t channels = shape.columns() * CemaShape::kColumn;
    A* rest = kernel + channels * steps;
    entering = backward ? nullptr : rest;
    return backward ? rest : rest + (steps == 0 ? 0 : channels * (kUnit + 2) * shape.padded_pairs());
  }
  static int64_t row(int64_t N) { return round_up(2 * N, 2 * kDoubles); }
  A* kernel_of(int64_t d) const { return kernel + (d - base) * steps; }
  A* entering_of(int64_t d) const { return entering + (d - base) * (kUnit + 2) * row(N); }

  // Of the channels [d0, d1).
  template <class Args>
  void make(const Args& args, int64_t d0, int64_t d1) const {
    TileTables<A>::make(args, d0, d1);
    if (steps == 0) return;
    const Parameters<A> parameters = Parameters<A>::of(args);
    for (int64_t d = d0; d < d1; d += kDoubles) {
      const Sigmoid<Double> frequency = parameters.frequency(d);
      make_kernel(parameters, d, frequency);
      for (int64_t l = 0; entering != nullptr && l < kDoubles && d + l < d1; ++l) {
        make_entering(parameters, d + l, {splat(frequency.value[l]), splat(frequency.rest[l])});
      }
    }
    for (int64_t d = d0; d < d1; d += kLanes<A>) {
      std::memcpy(kernel_of(d), this->response(d), kTile * kLanes<A> * sizeof(A));
    }
  }

 private:
  // But for the first tile, which is the response that TileTables has.
  void make_kernel(const Parameters<A>& parameters, int64_t d, const Sigmoid<Double>& frequency) const {
    constexpr int64_t W = kLanes<A>;
    const double scale = gamma_scale(N);
    Double sums[CemaShape::kMostShort] = {};
    constexpr int kChains = 4;  // of r_(l+1) = 2 Re q r_l - |q|^2 r_(l-1), r_l = Re c q^l
    for (int64_t n = 0; n < N; n += kChains) {
      Double by[kChains] = {}, back[kChains] = {}, now[kChains] = {}, before[kChains] = {};
      for (int64_t k = 0; k < kChains && n + k < N; ++k) {
        const Wavelet<Double> w = parameters.wavelet(d, n + k, frequency);
        const Complex<Double> gamma = parameters.gamma_of(d, n + k), q{w.q_re(), w.q_im()};
        const Double c = w.a() * scale;
        const Complex<Double> first = Complex<Double>{gamma.re * c, gamma.im * c} * power(q, kTile - 1);
        before[k] = first.re;
        now[k] = (first * q).re;
        by[k] = q.re + q.re;
        back[k] = -w.rho * w.rho;
      }
      for (int64_t l = kTile; l < steps; ++l) {
        sums[l] += (now[0] + now[1]) + (now[2] + now[3]);
        for (int k = 0; k < kChains; ++k) {
          const Double next = by[k] * now[k] + back[k] * before[k];
          before[k] = now[k];
          now[k] = next;
        }
      }
    }
    A* to = kernel_of(d / W * W) + d % W;
    for (int64_t l = kTile; l < steps; ++l) store_wide(to + l * W, sums[l]);
  }
  void make_entering(const Parameters<A>& p, int64_t d, const Sigmoid<Double>& frequency) const {
    const int64_t length = row(N);
    Double n;
    for (int64_t l = 0; l < kDoubles; ++l) n[l] = static_cast<double>(l + 1);
    for (int64_t i = 0; i < N; i += kDoubles, n += static_cast<double>(kDoubles)) {
      const auto w = Wavelet<Double>::at(load_some(p.alpha + d * N + i, N - i), load_some(p.delta + d * N + i, N - i),
                                         frequency, n, N);
      const Complex<Double> q{w.q_re(), w.q_im()}, unit = power(q, kUnit);
      Complex<Double> in{w.a(), Double{}};
      A* to = entering_of(d) + 2 * i;
      for (int64_t j = 0; j < kUnit; ++j, to += length, in = in * q) store_pairs(to, in.re, in.im);
      store_pairs(to, unit.re, unit.re);
      store_pairs(to + length, -unit.im, unit.im);
    }
  }
};

// Short segments, as many as a block of packed rows holds; the shortest first.
struct SegmentRun {
  static constexpr int64_t kRows = 256, kMost = 64;
  struct Segment {
    int64_t index, begin, row, steps;
  };
  Segment list[kMost];
  int64_t count = 0, rows = 0, tokens = 0;

  // The segments of at most `most` steps from sequence i on, which becomes the one behind them, and before `past`.
  SegmentRun(const Sequences& sequences, int64_t& i, int64_t past, int64_t most) {
    for (; i < past && count < kMost; ++i) {
      const int64_t begin = sequences.begin(i), steps = sequences.end(i) - begin;
      if (steps > most) continue;
      if (rows + round_up(steps, kTile) > kRows) break;
      list[count++] = {i, begin, rows, steps};
      rows += round_up(steps, kTile);
      tokens += steps;
    }
    std::stable_sort(list, list + count, [](const Segment& a, const Segment& b) { return a.steps < b.steps; });
  }

  template <class T>
  void pack(const T* from, int64_t D, int64_t lanes, stat_t<T>* packed) const {
    constexpr int64_t W = kLanes<stat_t<T>>;
    for (int64_t i = 0; i < count; ++i) {
      stat_t<T>* to = packed + list[i].row * W;
      cpu::MEGALODON_ISA::pack(from + list[i].begin * D, D, lanes, list[i].steps, to);
      const int64_t behind = round_up(list[i].steps, kTile) - list[i].steps;
      std::memset(to + list[i].steps * W, 0, behind * W * sizeof(stat_t<T>));
    }
  }

  // What is read next, of the next channels of [d0, d1) or further on, as many rows as segment s has.
  template <class T>
  Next<T> next(const Segment& s, const T* first, const T* second, int64_t all, int64_t D, int64_t d, int64_t d0,
               int64_t d1) const {
    const bool turn = d + kLanes<stat_t<T>> >= d1;
    const int64_t token = s.begin + (turn ? tokens : 0), at = token * D + (turn ? d0 : d + kLanes<stat_t<T>>);
    return {first + at, second == nullptr ? nullptr : second + at, nullptr, D, std::min(all - token, s.steps), kTile};
  }
};

// Calls run(segments) for the short segments of [i, past), long(i) for each of the others.
template <class Run, class Long>
void for_segments(const Sequences& sequences, int64_t i, int64_t past, int64_t most, Run&& run, Long&& long_one) {
  for (int64_t next = i; most > 0 && next < past;) {
    const SegmentRun segments(sequences, next, past, most);
    if (segments.count > 0) run(segments);
  }
  for (; i < past; ++i) {
    if (most == 0 || sequences.end(i) - sequences.begin(i) > most) long_one(i);
  }
}

// What a tile of inputs gives to a tile of outputs: the same (kSame), or one that the kernel, shifted so, leads to.
template <class A, Direction kWay, bool kSame>
__attribute__((always_inline)) inline void convolve_tile(const A* kernel, const A* x, Vec<A>* sum) {
  constexpr int64_t W = kLanes<A>;
#pragma GCC unroll 8
  for (int j = 0; j < kTile; ++j) {
    const Vec<A> input = load(x + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const int lag = kWay == kBack ? j - i : i - j;
      if (!kSame || lag >= 0) sum[i] = load(kernel + lag * W) * input + sum[i];
    }
  }
}

// A segment's outputs, from packed inputs to rows D elements apart. Calls after() for every tile.
template <class T, Direction kWay, class After>
void convolve(const stat_t<T>* kernel, const stat_t<T>* x, int64_t steps, int64_t D, int64_t lanes, bool past, T* out,
              After&& after) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>, kStep = kTile * W;
  const int64_t tiles = ceil_div(steps, kTile);
  for (int64_t m = 0; m < tiles; ++m, out += kTile * D) {
    Vec<A> sum[kTile] = {};
    convolve_tile<A, kWay, true>(kernel, x + m * kStep, sum);
    if constexpr (kWay == kBack) {
      for (int64_t j = m + 1; j < tiles; ++j)
        convolve_tile<A, kWay, false>(kernel + (j - m) * kStep, x + j * kStep, sum);
    } else {
      for (int64_t j = m; j-- > 0;) convolve_tile<A, kWay, false>(kernel + (m - j) * kStep, x + j * kStep, sum);
    }
    if (lanes == W && steps - m * kTile >= kTile) {
      if (past) {
        for (int i = 0; i < kTile; ++i) put<true>(out + i * D, sum[i]);
      } else {
        for (int i = 0; i < kTile; ++i) store(out + i * D, sum[i]);
      }
    } else {
      alignas(64) A sums[kStep];
      for (int i = 0; i < kTile; ++i) store(sums + i * W, sum[i]);
      unpack(sums, D, lanes, steps - m * kTile < kTile ? steps - m * kTile : kTile, past, out);
    }
    after();
  }
}

// What the steps last[-j], from <= j < to, of M units give to V vectors of a channel's states; `table`: of these
// vectors.
template <class A, int V, int M>
__attribute__((always_inline)) inline void enter(const A* table, int64_t length, const A* const* last, int64_t from,
                                                 int64_t to, Vec<A> (*state)[V]) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t j = from; j < to; ++j) {
    Vec<A> in[V];
    for (int v = 0; v < V; ++v) in[v] = load(table + j * length + v * W);
    for (int m = 0; m < M; ++m) {
      const A input = last[m][-j * W];
      for (int v = 0; v < V; ++v) state[m][v] = in[v] * input + state[m][v];
    }
  }
}

// The last states of M segments, list[0] the shortest: V vectors of one channel's, to h, of which `left` numbers remain
// in a row. x: the channel's first input in the packed rows.
template <class A, int V, int M, bool kPast>
void last_states(const A* table, int64_t length, const A* x, const SegmentRun::Segment* list, A* h, int64_t apart,
                 int64_t left) {
  constexpr int64_t W = kLanes<A>;
  VecIndex<A> other;
  for (int64_t i = 0; i < W; ++i) other[i] = i ^ 1;
  Vec<A> state[M][V] = {};
  const int64_t units = ceil_div(list[M - 1].steps, kUnit);
  for (int64_t unit = units; unit-- > 0;) {
    const A* last[M];
    int64_t steps[M];
    for (int m = 0; m < M; ++m) {
      steps[m] = std::clamp<int64_t>(list[m].steps - unit * kUnit, 0, kUnit);
      last[m] = x + (list[m].row + list[m].steps - 1 - unit * kUnit) * W;
    }
    for (int v = 0; unit + 1 < units && v < V; ++v) {
      const A* power = table + kUnit * length + v * W;
      const Vec<A> re = load(power), im = load(power + length);
      for (int m = 0; m < M; ++m) {
        state[m][v] = re * state[m][v] + im * Vec<A>(__builtin_shuffle(state[m][v], other));
      }
    }
    enter<A, V, M>(table, length, last, 0, steps[0], state);
#pragma GCC unroll 4
    for (int m = 1; m < M; ++m) enter<A, V, 1>(table, length, last + m, steps[0], steps[m], state + m);
  }
  for (int m = 0; m < M; ++m) {
    A* to = h + list[m].index * apart;
    for (int v = 0; v < V; ++v) {
      if constexpr (kPast) {
        put<true>(to + v * W, state[m][v]);
      } else {
        store(to + v * W, state[m][v], left - v * W);
      }
    }
  }
}

// Of one channel, all segments of the run.
template <class A, bool kPast>
void last_states(const A* table, int64_t N, const A* x, const SegmentRun& run, A* h, int64_t apart) {
  constexpr int64_t W = kLanes<A>;
  const int64_t length = SegmentTables<A>::row(N);
  const auto vectors = [&](auto V, int64_t e) {
    const auto some = [&](auto M, int64_t i) {
      last_states<A, V.value, M.value, kPast>(table + e, length, x, run.list + i, h + e, apart, 2 * N - e);
    };
    int64_t i = 0;
    for (; i + 4 <= run.count; i += 4) some(std::integral_constant<int, 4>{}, i);
    if (i + 2 <= run.count) some(std::integral_constant<int, 2>{}, i), i += 2;
    if (i < run.count) some(std::integral_constant<int, 1>{}, i);
  };
  int64_t e = 0;
  for (; e + W < 2 * N; e += 2 * W) vectors(std::integral_constant<int, 2>{}, e);
  if (e < 2 * N) vectors(std::integral_constant<int, 1>{}, e);
}

// Adds to r_l, [.., lanes] of float64, of all segments of the run.
template <class A>
void add_lags(const A* x, const A* dy, const SegmentRun& run, double* sums) {
  constexpr int64_t W = kLanes<A>, kStep = kTile * W;
  for (int64_t shift = 0;; ++shift, sums += kStep) {
    Vec<A> lag[kTile] = {};
    bool any = false;
    for (int64_t s = 0; s < run.count; ++s) {
      const int64_t tiles = ceil_div(run.list[s].steps, kTile);
      if (tiles <= shift) continue;
      any = true;
      const A *in = x + run.list[s].row * W, *out = dy + (run.list[s].row + shift * kTile) * W;
      for (int64_t m = shift; m < tiles; ++m, in += kStep, out += kStep) {
        const auto add = [&](bool first) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int i = 0; i < kTile; ++i) {
            const Vec<A> by = load(out + i * W);
#pragma GCC unroll 8
            for (int l = 0; l < kTile; ++l) {
              if (!first || l <= i) lag[l] = by * load(in + (i - l) * W) + lag[l];
            }
          }
        };
        m == shift ? add(true) : add(false);
      }
    }
    if (!any) return;
    for (int l = 0; l < kTile; ++l) add_to<A>(sums + l * W, lag[l]);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
