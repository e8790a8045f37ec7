// The backward pass of cema on the CPU, by the recurrence ("scan").
//
// Computes  the gradients of ops/cema.h. With M the adjoint of a state (dS = Re(M dh)), for tiles of T steps as in
//           cema_tiles.h: M <- q^T M + sum_i g q^(i+1) dy_i and dx_j = sum_i k_(i-j) dy_i + Re sum_n a q^(T-1-j) M,
//           which is the forward pass with time reversed; and the products of cema_products.h.
// Layout    x, y, dy, dx [B, L, D]; parameters [D, N], [D], [D, N, 2]; states [B, D, N, 2]; all compact.
// Mapping   as forward (cema.cpp). A sequence goes through time forward once, keeping the state at every block's start,
//           then backward, where every block's states are made again, into L1. Many short segments of a packed row,
//           with neither h0 nor dh, are convolutions instead (cema_segments.h).
// Traffic   6 elements; per element about 14 N + 16 N / T + T FMA: compute-bound.
// Numerics  as forward; products are summed in A over the 16 tiles of a block, in float64 over blocks and sequences, in
//           a fixed order. The steps behind the last whole tile of a sequence are done one by one, in float64.
// Limits    none on B, L, D; N >= 1.
#include "ops/cema.h"
#include "ops/cema_segments.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t K = CemaShape::kBlock;

// The workspace behind the tables, of one part.
template <class A>
struct Scratch {
  double* sums;      // [D, N, kSums]
  double* channels;  // [D, kChannelSums]
  A* states;         // [D, N, 4]: of h, then of M
  A* checkpoints;    // [blocks of a sequence, D, N, 2]
  double* lags;      // [D, most_short], of short segments
  int64_t wavelets, N, most;

  Scratch(A* memory, const CemaBackward& shape, int64_t part, int64_t first_block = 0)
      : wavelets(shape.wavelets()), N(shape.N), most(shape.most_short()) {
    const int64_t parts = shape.parts(), all = shape.columns() * CemaShape::kColumn;
    auto* wide = reinterpret_cast<double*>(memory);
    sums = wide + part * wavelets * kSums;
    channels = wide + parts * wavelets * kSums + part * all * kChannelSums;
    lags = wide + parts * (wavelets * kSums + all * kChannelSums) + part * all * most;
    auto* narrow = reinterpret_cast<A*>(wide + parts * (wavelets * kSums + all * (kChannelSums + most)));
    states = narrow + part * wavelets * 4;
    checkpoints = narrow + parts * wavelets * 4 + first_block * wavelets * 2;
  }
  // Of the vector of channels from d on, from wavelet n.
  double* sums_of(int64_t d, int64_t n) const { return sums + (d * N + n * kLanes<A>)*kSums; }
  double* channels_of(int64_t d) const { return channels + d * kChannelSums; }
  double* lags_of(int64_t d) const { return lags + d * most; }
  A* hi(int64_t d, int64_t n) const { return states + d * N * 4 + 2 * n * kLanes<A>; }
  A* lo(int64_t d, int64_t n) const { return hi(d, n) + 2 * N * kLanes<A>; }
  A* checkpoint(int64_t block, int64_t d, int64_t n) const {
    return checkpoints + (block * wavelets + d * N + n * kLanes<A>)*2;
  }
};

// Keeps the state at the block's start and, where somebody will want it, advances it to the end.
template <class T>
void checkpoint_block(const CemaBackward& args, const TileTables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                      int64_t block, int64_t steps, bool advance, int64_t d, const T* x, Next<T> next) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  alignas(64) A packed[K * W];
  if (advance) pack(x, args.D, args.D - d, steps, packed);
  next.each = ceil_div(next.rows, ceil_div(args.N, kPaired));
  for_wavelets<kPaired>(args.N, [&](auto paired, int64_t n) {
    constexpr int G = paired.value;
    A* kept = scratch.checkpoint(block, d, n);
    alignas(64) A end[2 * G * W];
    std::memcpy(kept, scratch.hi(d, n), sizeof end);
    if (!advance) return;
    std::memcpy(end, kept, sizeof end);
    advance_block<A, kAhead, false, G>(tables.row(d, n), packed, {steps / kTile, G}, end, nullptr);
    next.fetch();
    for (int g = 0; g < G; ++g) {
      carry(tables.row(d, n + g), steps == K, end + 2 * g * W, scratch.hi(d, n + g), scratch.lo(d, n + g));
    }
  });
}

// `steps` is a multiple of T.
template <class T>
void backward_block(const CemaBackward& args, const TileTables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                    int64_t block, int64_t steps, int64_t d, const T* x_rows, const T* dy_rows, T* dx_rows,
                    Next<T> next) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  alignas(64) A x[K * W], dy[K * W], dx[K * W];
  alignas(64) A h[K / kTile * kKept * 2 * W], M[K / kTile * kKept * 2 * W];
  const int64_t lanes = args.D - d < W ? args.D - d : W, N = args.N, tiles = steps / kTile;
  pack(x_rows, args.D, lanes, steps, x);
  pack(dy_rows, args.D, lanes, steps, dy);
  next.each = ceil_div(next.rows, ceil_div(N, kKept) * ceil_div(tiles, kTogether));
  respond<A, kBack>(tables.response(d), dy, tiles, dx);
  for (int64_t n = 0; n < N; n += kKept) {
    const TileStates of{tiles, N - n < kKept ? N - n : kKept};
    for_wavelets<kPaired>(of.group, [&](auto paired, int64_t i) {
      constexpr int G = paired.value;
      alignas(64) A state[2 * G * W];
      const A* table = tables.row(d, n + i);
      std::memcpy(state, scratch.checkpoint(block, d, n + i), sizeof state);
      advance_block<A, kAhead, true, G>(table, x, of.from(i), state, h);
      std::memcpy(state, scratch.hi(d, n + i), sizeof state);
      advance_block<A, kBack, true, G>(table, dy, of.from(i), state, M);
      for (int g = 0; g < G; ++g) {
        carry(table + g * kRow * W, steps == K, state + 2 * g * W, scratch.hi(d, n + i + g), scratch.lo(d, n + i + g));
      }
      add_products<A, G>(table, tables.powers_of(d, n + i), x, dy, h, M, of, i, scratch.sums_of(d, n + i));
    });
    output_block<A, kBack>(tables.row(d, n), M, of, dx, lanes == W && n + of.group == N ? dx_rows : nullptr, args.D,
                           next.out == nullptr, -1, [&] { next.fetch(); });
  }
  add_lags(x, dy, tiles, scratch.channels_of(d));
  if (lanes < W) unpack(dx, args.D, lanes, steps, false, dx_rows);
}

// The steps behind the last tile, fewer than T, one by one in float64; h before them is the state of the scratch, which
// becomes M.
template <class T>
void backward_tail(const CemaBackward& args, const TileTables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                   int64_t steps, int64_t sequence, int64_t d, const T* x_rows, const T* dy_rows, T* dx_rows) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t N = args.N, lanes = args.D - d;
  const auto* dh = static_cast<const A*>(args.dh);
  const Parameters<A> parameters = Parameters<A>::of(args);
  const double scale = gamma_scale(N);
  alignas(64) A x[kTile * W], dy[kTile * W], dx[kTile * W];
  pack(x_rows, args.D, lanes, steps, x);
  pack(dy_rows, args.D, lanes, steps, dy);
  for (int64_t i = 0; i < W; i += kDoubles) {
    const Double omega = parameters.gather(static_cast<const A*>(args.omega), d + i, 1);
    double* domega = scratch.channels_of(d) + kTile * W + i;
    Double from[kTile], to[kTile], grad[kTile], direct = load(domega);
    for (int64_t t = 0; t < steps; ++t) {
      from[t] = load_wide(x + t * W + i);
      to[t] = load_wide(dy + t * W + i);
      grad[t] = omega * to[t];
      direct += from[t] * to[t];
    }
    store(domega, direct);
    for (int64_t n = 0; n < N; ++n) {
      const Complex<Double> q = load_pair(tables.exact_q(d, n), W, i);
      const Complex<Double> gamma = parameters.gamma_of(d + i, n);
      const Complex<Double> g{gamma.re * scale, gamma.im * scale};
      const Double a = load_wide(tables.row(d, n) + kEnter * W + i);
      double* sums = scratch.sums_of(d, n);
      Complex<Double> h[kTile + 1], M{};  // h[t]: before step t
      h[0] = load_pair(scratch.hi(d, n), W, i);
      for (int64_t t = 0; t < steps; ++t) {
        h[t + 1] = q * h[t];
        h[t + 1].re += a * from[t];
      }
      if (dh != nullptr) {
        const A* of_row = dh + sequence * args.D * N * 2 + 2 * n;
        M = conj(Complex<Double>{parameters.gather(of_row, d + i, 2 * N), parameters.gather(of_row + 1, d + i, 2 * N)});
      }
      Complex<Double> by_g{}, by_log{};
      Double by_a = {};
      for (int64_t t = steps; t-- > 0;) {
        M = M + Complex<Double>{g.re * to[t], g.im * to[t]};
        by_g = by_g + Complex<Double>{h[t + 1].re * to[t], h[t + 1].im * to[t]};
        by_a += M.re * from[t];
        grad[t] += M.re * a;
        M = q * M;
        by_log = by_log + M * h[t];
      }
      add_pair(sums + kSumG * W, W, i, by_g);
      add_pair(sums + kSumTail * W, W, i, by_log);
      store(sums + kSumA * W + i, load(sums + kSumA * W + i) + by_a);
      store_pair(scratch.hi(d, n), W, i, M);
    }
    for (int64_t t = 0; t < steps; ++t) store_wide(dx + t * W + i, grad[t]);
  }
  unpack(dx, args.D, lanes, steps, false, dx_rows);
}

// Sequence i, the channels [d0, d1).
template <class T>
void backward_sequence(const CemaBackward& args, const TileTables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                       int64_t i, int64_t d0, int64_t d1) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t begin = args.sequences.begin(i), rest = (args.sequences.end(i) - begin) % kTile;
  const int64_t whole = args.sequences.end(i) - begin - rest, blocks = ceil_div(whole, K);
  const auto* x = static_cast<const T*>(args.x);
  const auto* dy = static_cast<const T*>(args.dy);
  auto* dx = static_cast<T*>(args.dx);
  const bool past = goes_past_caches(args.sequences.tokens() * args.D, args.D, dx);
  const auto for_block = [&](int64_t block, auto&& body) {
    const int64_t steps = whole - block * K < K ? whole - block * K : K;
    for (int64_t d = d0; d < d1; d += W) body(d, (begin + block * K) * args.D + d, steps);
  };

  for (int64_t d = d0; d < d1; d += W) {
    std::memset(scratch.hi(d, 0), 0, 4 * args.N * W * sizeof(A));
    if (args.h0 != nullptr) load_state<A>(args, args.h0, i, d, scratch.hi(d, 0), false);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for_block(block, [&](int64_t d, int64_t row, int64_t steps) {
      const bool turn = d + W >= d1;
      const T* later = x + (turn ? row + K * args.D + d0 - d : row + W);
      const Next<T> next{later, nullptr, nullptr, args.D, !turn ? steps : block + 2 < blocks ? K : 0};
      checkpoint_block<T>(args, tables, scratch, block, steps, rest > 0 || block + 1 < blocks, d, x + row, next);
    });
  }
  for (int64_t d = d0; d < d1; d += W) {
    if (rest > 0) {
      const int64_t row = (begin + whole) * args.D + d;
      backward_tail<T>(args, tables, scratch, rest, i, d, x + row, dy + row, dx + row);
      std::memset(scratch.lo(d, 0), 0, 2 * args.N * W * sizeof(A));
    } else {
      std::memset(scratch.hi(d, 0), 0, 4 * args.N * W * sizeof(A));
      if (args.dh != nullptr) load_state<A>(args, args.dh, i, d, scratch.hi(d, 0), true);
    }
  }
  for (int64_t block = blocks; block-- > 0;) {
    for_block(block, [&](int64_t d, int64_t row, int64_t steps) {
      const bool turn = d + W >= d1;
      const int64_t later = turn ? row - K * args.D + d0 - d : row + W;
      const Next<T> next{x + later, dy + later, past ? nullptr : dx + later, args.D, !turn ? steps : block > 0 ? K : 0};
      backward_block<T>(args, tables, scratch, block, steps, d, x + row, dy + row, dx + row, next);
    });
  }
  if (args.dh0 == nullptr) return;
  for (int64_t d = d0; d < d1; d += W) {
    store_state<A>(args, scratch.hi(d, 0), i, d, args.dh0, true);
  }
}

// Short segments, the channels [d0, d1).
template <class T>
void backward_run(const CemaBackward& args, const SegmentTables<stat_t<T>>& tables, const Scratch<stat_t<T>>& scratch,
                  const SegmentRun& run, int64_t d0, int64_t d1) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t D = args.D, all = args.sequences.tokens();
  const auto* x = static_cast<const T*>(args.x);
  const auto* dy = static_cast<const T*>(args.dy);
  auto* dx = static_cast<T*>(args.dx);
  const bool past = goes_past_caches(all * D, D, dx);
  alignas(64) A in[SegmentRun::kRows * W], out[SegmentRun::kRows * W];
  for (int64_t d = d0; d < d1; d += W) {
    const int64_t lanes = D - d < W ? D - d : W;
    run.pack(x + d, D, lanes, in);
    run.pack(dy + d, D, lanes, out);
    for (int64_t i = 0; i < run.count; ++i) {
      const SegmentRun::Segment& s = run.list[i];
      Next<T> next = run.next<T>(s, x, dy, all, D, d, d0, d1);
      convolve<T, kBack>(tables.kernel_of(d), out + s.row * W, s.steps, D, lanes, past, dx + s.begin * D + d,
                         [&] { next.fetch(); });
    }
    add_lags(in, out, run, scratch.lags_of(d));
  }
}

// From the sums to the raw parameters, for kDoubles channels from d on. `steps`: of the longest short segment.
template <class A>
void finish_gradients(const CemaBackward& args, A* memory, int64_t steps, int64_t d) {
  constexpr int64_t W = kLanes<A>;
  const Parameters<A> parameters = Parameters<A>::of(args);
  const int64_t lanes = parameters.lanes(d), N = args.N, parts = args.parts();
  const int64_t vector = d / W * W, i = d - vector;  // the vector of channels these are in, and where
  const double scale = gamma_scale(N);
  const Sigmoid<Double> frequency = parameters.frequency(d);
  const auto scatter = [&](void* out, int64_t offset, int64_t stride, Double v) {
    for (int64_t l = 0; l < lanes; ++l) static_cast<A*>(out)[offset + (d + l) * stride] = static_cast<A>(v[l]);
  };
  Double lag[CemaShape::kMostShort] = {}, domega = {}, dtheta = {};
  for (int64_t part = 0; part < parts; ++part) {
    const Scratch<A> scratch(memory, args, part);
    const double* sums = scratch.channels_of(vector) + i;
    for (int64_t l = 0; l < kTile; ++l) lag[l] += load(sums + l * W);
    domega += load(sums + kTile * W);
    for (int64_t l = 0; l < steps; ++l) lag[l] += load(scratch.lags_of(vector) + i + l * W);
  }
  const int64_t lags = steps > kTile ? steps : kTile;
  for (int64_t n = 0; n < N; ++n) {
    Double total[kSums] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const double* sums = Scratch<A>(memory, args, part).sums_of(vector, n) + i;
      for (int64_t s = 0; s < kSums; ++s) total[s] += load(sums + s * W);
    }
    const Wavelet<Double> w = parameters.wavelet(d, n, frequency);
    const Complex<Double> gamma = parameters.gamma_of(d, n);
    const Complex<Double> q{w.q_re(), w.q_im()}, g{gamma.re * scale, gamma.im * scale};
    Complex<Double> power{splat(1.0), Double{}}, plain{}, weighted{};  // sum_l q^l r_l, sum_l l q^l r_l
    Complex<Double> tile{};
    for (int64_t l = 0; l < lags; ++l) {
      const Complex<Double> term{power.re * lag[l], power.im * lag[l]};
      const auto order = static_cast<double>(l);
      plain = plain + term;
      weighted = weighted + Complex<Double>{order * term.re, order * term.im};
      power = power * q;
      if (l == kTile - 1) tile = {power.re * double{kTile}, power.im * double{kTile}};
    }
    const Complex<Double> a{w.a(), Double{}};
    const auto sum = [&](int64_t s) { return Complex<Double>{total[s], total[s + 1]}; };
    const Complex<Double> by_log =
        g * (sum(kSumOut) + a * weighted) + a * sum(kSumIn) + tile * sum(kSumC) + sum(kSumTail);
    const Complex<Double> by_g = sum(kSumG) + a * plain;
    WaveletSums<Double> s{};
    s.add_log_q(w, by_log.re, -by_log.im);
    s.g_re = by_g.re;
    s.g_im = -by_g.im;
    s.a = total[kSumA] + (g * plain).re;
    const auto gradient = WaveletGradient<Double>::of(w, s, gamma.re, gamma.im, scale);
    scatter(args.dalpha, n, N, gradient.alpha);
    scatter(args.ddelta, n, N, gradient.delta);
    scatter(args.dgamma, 2 * n, 2 * N, gradient.gamma_re);
    scatter(args.dgamma, 2 * n + 1, 2 * N, gradient.gamma_im);
    dtheta += gradient.theta;
  }
  scatter(args.dtheta, 0, 1, dtheta);
  scatter(args.domega, 0, 1, lag[0] + domega);
}

template <class T>
void backward(const CemaBackward& args) {
  using A = stat_t<T>;
  SegmentTables<A> tables;
  A* memory = tables.place(args.workspace, args, args.most_short(), args.h0 == nullptr && args.dh == nullptr, true);
  with_tables(args, tables, [&](int64_t part, int64_t d0, int64_t d1, const SegmentTables<A>& own) {
    const Scratch<A> scratch(memory, args, part, args.first_block(part));
    const int64_t channels = round_up(d1 - d0, CemaShape::kColumn);
    std::memset(scratch.sums_of(d0, 0), 0, channels * args.N * kSums * sizeof(double));
    std::memset(scratch.channels_of(d0), 0, channels * kChannelSums * sizeof(double));
    std::memset(scratch.lags_of(d0), 0, channels * scratch.most * sizeof(double));
    for_segments(
        args.sequences, args.first(part), args.first(part + 1), own.steps,
        [&](const SegmentRun& run) { backward_run<T>(args, own, scratch, run, d0, d1); },
        [&](int64_t i) { backward_sequence<T>(args, own, scratch, i, d0, d1); });
  });
  parallel_for(args.columns(), 1 + 64 / (CemaShape::kColumn * args.N), [&](int64_t begin, int64_t end) {
    for (int64_t d = begin * CemaShape::kColumn; d < end * CemaShape::kColumn && d < args.D; d += kDoubles) {
      finish_gradients<A>(args, memory, tables.steps, d);
    }
  });
}

}  // namespace

void cema_backward(const CemaBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
