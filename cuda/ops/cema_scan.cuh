// The scan of CEMA over time: three linear recurrences in one frame.
//
//   Forward       h <- x + q h,  y = Re sum_n c h + omega x                   (h is h / a, c = a g)
//   Adjoint       l = conj(g) dy + m,  m <- conj(q) l,  dx = sum_n a Re l + omega dy,  and sum x Re l;  time runs back
//   Sensitivity   e <- h + q e (the derivative of h by q), h <- x + q h,  and sum dy h, sum dy e
//
// A block of threads walks through a chunk of time of a tile of channels. The inputs come through a ring of tiles in
// shared memory, and outputs go back through the same tile. A channel belongs to kLanes lanes of one warp, kEach
// wavelets in the registers of each; the sums over lanes of kStep steps are made together, each lane keeping its own.
//
// Over a block of kBlock steps (as many as in cema.cpp) a state is computed in A, from its rounded value h and with q
// rounded. What those two roundings amount to, for h = h + low and q = q + delta exactly,
//   (q + delta)^s (h + low) - q^s h = s q^(s-1) delta h + q^s low + O(delta^2),
// is known when the block begins, kept in `low`, and added when it ends, so that neither adds up over time.
#pragma once

#include "core/coefficients.cuh"
#include "core/pack.cuh"
#include "core/portable.cuh"
#include "ops/cema.h"

namespace megalodon::cuda {

using Plan = CemaCudaPlan;
constexpr int kThreads = Plan::kThreads;
constexpr int kEach = Plan::kEach;
constexpr int kStages = 4;  // tiles of the ring

// ---- the table of coefficients: rows of D N doubles -----------------------------------------------------------------

enum : int64_t { kTableA, kTableQ, kTableG = 3, kTableRows = 5 };

// Sums over time and batch for the gradients: rows of D N doubles, and one of D doubles behind them. The conjugates of
// dS/dq / a and dS/dg / a; dS/da; domega.
enum : int64_t { kSumQ, kSumG = 2, kSumA = 4, kSumOmega = 5 };

// ---- complex numbers of any type ------------------------------------------------------------------------------------

template <class A>
struct Pair {
  A re, im;

  template <class B>
  DEVICE static Pair of(const Pair<B>& v) {
    return {static_cast<A>(v.re), static_cast<A>(v.im)};
  }
};
template <class A>
DEVICE Pair<A> operator*(const Pair<A>& u, const Pair<A>& v) {
  return {u.re * v.re - u.im * v.im, u.re * v.im + u.im * v.re};
}
template <class A>
DEVICE Pair<A> operator*(A u, const Pair<A>& v) {
  return {u * v.re, u * v.im};
}
template <class A>
DEVICE Pair<A> operator+(const Pair<A>& u, const Pair<A>& v) {
  return {u.re + v.re, u.im + v.im};
}
template <class A>
DEVICE Pair<A> operator-(const Pair<A>& u, const Pair<A>& v) {
  return {u.re - v.re, u.im - v.im};
}
template <class A>
DEVICE Pair<A> conj(const Pair<A>& u) {
  return {u.re, -u.im};
}
// q h + x.
template <class A>
DEVICE Pair<A> step_of(const Pair<A>& q, const Pair<A>& h, A x) {
  return {q.re * h.re + (x - q.im * h.im), q.re * h.im + q.im * h.re};
}

template <class A>
DEVICE Pair<A> power(Pair<A> q, int exponent) {  // exponent >= 0
  Pair<A> result{1, 0};
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) result = result * q;
    q = q * q;
  }
  return result;
}

// ---- coefficients and states of one wavelet -------------------------------------------------------------------------

// q, and what corrects a state over s steps of a block: q^s, s q^(s-1), and s (s-1) q^(s-2) delta.
template <class A, int kBlock>
struct Factor {
  static constexpr bool kCorrects = sizeof(A) == 4;
  struct Powers {
    Pair<A> all, first, second;
  };
  Pair<A> q;
  Pair<A> delta;  // the rest of q
  Pair<A> most;   // q^(kBlock - 2)

  DEVICE static Factor of(const Pair<double>& exact) {
    Factor f{Pair<A>::of(exact), {}, {}};
    if constexpr (kCorrects) {
      f.delta = Pair<A>::of(exact - Pair<double>::of(f.q));
      f.most = power(f.q, kBlock - 2);
    }
    return f;
  }
  DEVICE Powers over(int steps) const {
    if (steps < 2) return {q, {1, 0}, {0, 0}};  // of 1
    const auto s = static_cast<A>(steps);
    const Pair<A> before = steps == kBlock ? most : power(q, steps - 2);
    return {before * q * q, s * (before * q), (s * (s - 1)) * (before * delta)};
  }
};

// A state, as the scan uses it and, between blocks, the rest of it; inside a block what the block is to be corrected
// by.
template <class A>
struct State {
  Pair<A> value, low;

  DEVICE static State of(const Pair<double>& exact) {
    State s{Pair<A>::of(exact), {}};
    if constexpr (sizeof(A) == 4) s.low = Pair<A>::of(exact - Pair<double>::of(s.value));
    return s;
  }
  DEVICE Pair<double> exact() const { return Pair<double>::of(value) + Pair<double>::of(low); }
  DEVICE void settle() {
    if constexpr (sizeof(A) == 4) {
      settle(value.re, low.re);
      settle(value.im, low.im);
    }
  }
  DEVICE static void settle(A& value, A& low) {  // the sum and its rounding error
    const A sum = value + low;
    const A part = sum - value;
    low = (value - (sum - part)) + (low - part);
    value = sum;
  }
};

// ---- one launch -----------------------------------------------------------------------------------------------------

template <class T>
struct ScanArgs {
  using A = stat_t<T>;
  const T* in;          // [B, L, D]
  const T* other;       // Adjoint: x; Sensitivity: dy
  T* out;               // [B, L, D]
  A* partial;           // [B, L, D] sums over the wavelets before `first`; nullptr if these are all
  const double* table;  // [kTableRows, D, N]
  const A* omega;       // [D]
  const A* start;       // [B, D, N, 2]: h0, for Adjoint dh; nullptr: zeros
  const A* cotangent;   // Sensitivity: dh, or nullptr
  A* last;              // [B, D, N, 2]: h, for Adjoint dh0, or nullptr
  double* carries;      // [B, chunks - 1, D, N, numbers]: the states where the chunks but the first begin
  double* sums;         // [blocks, sums of a block]
  int64_t block_sums;   // how many
  int64_t L, D, N;
  int64_t first;  // of the wavelets
  Parts parts;
  int64_t chunks, length;
  bool packed;
};

// The wavelets of one thread: those of channel d with index n = first + k kLanes + lane.
struct Mine {
  int64_t d, lane;
  int lanes;

  template <class T>
  DEVICE bool has(const ScanArgs<T>& args, int k) const {
    return d < args.D && n(args, k) < args.N;
  }
  template <class T>
  DEVICE int64_t n(const ScanArgs<T>& args, int k) const {
    return args.first + k * lanes + lane;
  }
  template <class T>
  DEVICE int64_t index(const ScanArgs<T>& args, int k) const {
    return d * args.N + n(args, k);
  }
  template <class T>
  DEVICE double number(const ScanArgs<T>& args, int64_t row, int k) const {
    return has(args, k) ? args.table[row * args.D * args.N + index(args, k)] : 0;
  }
  template <class T>
  DEVICE Pair<double> pair(const ScanArgs<T>& args, int64_t row, int k) const {
    return {number(args, row, k), number(args, row + 1, k)};
  }
  // Of a tensor [B, D, N, 2]; zeros where there is none.
  template <class T>
  DEVICE Pair<double> state(const ScanArgs<T>& args, const stat_t<T>* tensor, int64_t b, int k) const {
    if (tensor == nullptr || !has(args, k)) return {0, 0};
    const auto v = load<2>(tensor + 2 * (b * args.D * args.N + index(args, k)));
    return {v.v[0], v.v[1]};
  }
};

// ---- the three recurrences, kEach wavelets at once ------------------------------------------------------------------
//
// kStates states per wavelet, kBlock steps between corrections, kReverse whether time runs back, kOther whether the
// second input is read.

template <class T>
struct Forward {
  using A = stat_t<T>;
  static constexpr int kStates = 1, kBlock = 128;
  static constexpr bool kReverse = false, kOther = false, kOutput = true;
  Factor<A, kBlock> q[kEach];
  Pair<A> c[kEach];
  State<A> h[kEach];

  DEVICE void load(const ScanArgs<T>& args, const Mine& mine) {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      q[k] = Factor<A, kBlock>::of(mine.pair(args, kTableQ, k));
      c[k] = Pair<A>::of(mine.number(args, kTableA, k) * mine.pair(args, kTableG, k));
    }
  }
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t b, int k) const {
    const Pair<double> h0 = mine.state(args, args.start, b, k);
    if (!mine.has(args, k)) return h0;
    const double a = mine.number(args, kTableA, k);
    return {h0.re / a, h0.im / a};
  }
  DEVICE State<A>& state(int k, int) { return h[k]; }
  DEVICE void begin(int steps) {
    if constexpr (!Factor<A, kBlock>::kCorrects) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      const auto p = q[k].over(steps);
      h[k].low = p.first * (q[k].delta * h[k].value) + p.all * h[k].low;
    }
  }
  template <bool kEnds>
  DEVICE A step(A x, A) {
    A y = 0;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      h[k].value = step_of(q[k].q, h[k].value, x);
      if constexpr (kEnds) continue;
      y = c[k].re * h[k].value.re + y;
      y = y - c[k].im * h[k].value.im;
    }
    return y;
  }
  DEVICE void settle() {
    UNROLL
    for (int k = 0; k < kEach; ++k) h[k].settle();
  }
  DEVICE void finish_row(const ScanArgs<T>& args, const Mine& mine, int64_t b) const {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (!mine.has(args, k)) continue;
      const Pair<A> last = Pair<A>::of(mine.number(args, kTableA, k) * h[k].exact());
      store(args.last + 2 * (b * args.D * args.N + mine.index(args, k)), Pack<A, 2>{last.re, last.im});
    }
  }
  DEVICE void finish(const ScanArgs<T>&, const Mine&, double*) const {}
};

template <class T>
struct Adjoint {
  using A = stat_t<T>;
  static constexpr int kStates = 1, kBlock = 64;
  static constexpr bool kReverse = true, kOther = true, kOutput = true;
  Factor<A, kBlock> q[kEach];  // conjugated
  Pair<A> g[kEach];            // conjugated
  A a[kEach];
  State<A> m[kEach];
  A sum[kEach] = {};  // x Re l, of a block
  double total[kEach] = {};

  DEVICE void load(const ScanArgs<T>& args, const Mine& mine) {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      q[k] = Factor<A, kBlock>::of(conj(mine.pair(args, kTableQ, k)));
      g[k] = Pair<A>::of(conj(mine.pair(args, kTableG, k)));
      a[k] = static_cast<A>(mine.number(args, kTableA, k));
    }
  }
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t b, int k) const {
    return mine.state(args, args.start, b, k);
  }
  DEVICE State<A>& state(int k, int) { return m[k]; }
  DEVICE void begin(int steps) {
    if constexpr (!Factor<A, kBlock>::kCorrects) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      const auto p = q[k].over(steps);
      m[k].low = p.first * (q[k].delta * m[k].value) + p.all * m[k].low;
    }
  }
  template <bool kEnds>
  DEVICE A step(A dy, A x) {
    A dx = 0;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      const Pair<A> l{g[k].re * dy + m[k].value.re, g[k].im * dy + m[k].value.im};
      m[k].value = q[k].q * l;
      if constexpr (kEnds) continue;
      dx = a[k] * l.re + dx;
      sum[k] = x * l.re + sum[k];
    }
    return dx;
  }
  DEVICE void settle() {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      m[k].settle();
      total[k] += static_cast<double>(sum[k]);
      sum[k] = 0;
    }
  }
  DEVICE void finish_row(const ScanArgs<T>& args, const Mine& mine, int64_t b) const {
    if (args.last == nullptr) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (!mine.has(args, k)) continue;
      const Pair<A> last = Pair<A>::of(m[k].exact());
      store(args.last + 2 * (b * args.D * args.N + mine.index(args, k)), Pack<A, 2>{last.re, last.im});
    }
  }
  DEVICE void finish(const ScanArgs<T>& args, const Mine& mine, double* sums) const {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (mine.has(args, k)) sums[kSumA * args.D * args.N + mine.index(args, k)] = total[k];
    }
  }
};

template <class T>
struct Sensitivity {
  using A = stat_t<T>;
  static constexpr int kStates = 2, kBlock = 64;
  static constexpr bool kReverse = false, kOther = true, kOutput = false;
  Factor<A, kBlock> q[kEach];
  Pair<A> g[kEach];
  State<A> h[kEach], e[kEach];
  Pair<A> sum_h[kEach] = {}, sum_e[kEach] = {};  // dy times them, of a block
  A sum_omega = 0;
  Pair<double> total_g[kEach] = {}, total_q[kEach] = {};
  double total_omega = 0;

  DEVICE void load(const ScanArgs<T>& args, const Mine& mine) {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      q[k] = Factor<A, kBlock>::of(mine.pair(args, kTableQ, k));
      g[k] = Pair<A>::of(mine.pair(args, kTableG, k));
    }
  }
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t b, int k) const {
    const Pair<double> h0 = mine.state(args, args.start, b, k);
    if (!mine.has(args, k)) return h0;
    const double a = mine.number(args, kTableA, k);
    return {h0.re / a, h0.im / a};
  }
  DEVICE State<A>& state(int k, int i) { return i == 0 ? h[k] : e[k]; }
  DEVICE void begin(int steps) {
    if constexpr (!Factor<A, kBlock>::kCorrects) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      const auto p = q[k].over(steps);
      const Pair<A> first = p.first * q[k].delta;
      e[k].low = first * e[k].value + p.second * h[k].value + (p.all * e[k].low + p.first * h[k].low);
      h[k].low = first * h[k].value + p.all * h[k].low;
    }
  }
  template <bool kEnds>
  DEVICE A step(A x, A dy) {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      e[k].value = {q[k].q.re * e[k].value.re + (h[k].value.re - q[k].q.im * e[k].value.im),
                    q[k].q.re * e[k].value.im + (h[k].value.im + q[k].q.im * e[k].value.re)};
      h[k].value = step_of(q[k].q, h[k].value, x);
      if constexpr (kEnds) continue;
      sum_h[k] = {dy * h[k].value.re + sum_h[k].re, dy * h[k].value.im + sum_h[k].im};
      sum_e[k] = {dy * e[k].value.re + sum_e[k].re, dy * e[k].value.im + sum_e[k].im};
    }
    if constexpr (!kEnds) sum_omega = x * dy + sum_omega;
    return 0;
  }
  DEVICE void settle() {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      h[k].settle();
      e[k].settle();
      total_g[k] = total_g[k] + Pair<double>::of(sum_h[k]);
      total_q[k] = total_q[k] + Pair<double>::of(g[k] * sum_e[k]);
      sum_h[k] = sum_e[k] = {};
    }
    total_omega += static_cast<double>(sum_omega);
    sum_omega = 0;
  }
  DEVICE void finish_row(const ScanArgs<T>& args, const Mine& mine, int64_t b) {
    if (args.cotangent == nullptr) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      total_q[k] = total_q[k] + conj(mine.state(args, args.cotangent, b, k)) * e[k].exact();
    }
  }
  DEVICE void finish(const ScanArgs<T>& args, const Mine& mine, double* sums) const {
    const int64_t row = args.D * args.N;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (!mine.has(args, k)) continue;
      double* to = sums + mine.index(args, k);
      to[kSumQ * row] = total_q[k].re;
      to[(kSumQ + 1) * row] = total_q[k].im;
      to[kSumG * row] = total_g[k].re;
      to[(kSumG + 1) * row] = total_g[k].im;
    }
    if (mine.lane == 0 && mine.d < args.D && args.first == 0) sums[kSumOmega * row + mine.d] = total_omega;
  }
};

// ---- the frame ------------------------------------------------------------------------------------------------------

template <class T, int kLanes>
struct Tiles {
  static constexpr int kChannels = kThreads / kLanes;
  static constexpr int kPack = kPackOf<T>;
  static constexpr int kFit = 8192 / (kChannels * static_cast<int>(sizeof(T)));
  static constexpr int kRows = kFit < 32 ? kFit : 32;  // steps
  static constexpr int kStep = kLanes < 4 ? 4 : kLanes;
  // Rows are longer by what lets the lanes of a channel, each in its row, meet different banks.
  static constexpr int kPad = kLanes == 1 ? 0 : (32 / kLanes + kPack - 1) / kPack * kPack;
  static constexpr int kPitch = kChannels + kPad;
  static constexpr int kSize = kRows * kPitch;
  static_assert(kRows % kStep == 0 && 64 % kRows == 0);
  static constexpr int64_t bytes(int inputs) { return int64_t{kStages} * inputs * kSize * sizeof(T); }
};

// The tile a thread is at: a row of the batch and steps [first, first + rows) of it, in the direction of the walk.
struct Cursor {
  int64_t b, first, rows;
};

// Rows of one array [B, L, D], from or to a tile; channels beyond D read as zeros. body(element of the tile, of the
// array, whether it exists), 16 bytes at a time or one element.
template <class T, int kLanes, bool kReverse, class Body>
DEVICE void for_elements(const ScanArgs<T>& args, const Cursor& at, int width, Body&& body) {
  using Tile = Tiles<T, kLanes>;
  const int64_t d0 = static_cast<int64_t>(blockIdx.x) * Tile::kChannels;
  const int64_t t0 = kReverse ? args.L - 1 - at.first : at.first;
  const int64_t base = (at.b * args.L + t0) * args.D + d0;
  const int64_t stride = kReverse ? -args.D : args.D;
  const int wide = Tile::kChannels / width;
  for (int i = threadIdx.x; i < at.rows * wide; i += kThreads) {
    const int row = i / wide, column = i % wide * width;
    body(row * Tile::kPitch + column, base + row * stride + column, d0 + column < args.D);
  }
}

template <class T, int kLanes, bool kReverse>
DEVICE void load_tile(const ScanArgs<T>& args, const Cursor& at, const T* from, T* tile) {
  if (args.packed) {
    for_elements<T, kLanes, kReverse>(args, at, kPackOf<T>, [&](int to, int64_t i, bool exists) {
      async_copy16(tile + to, exists ? from + i : from, exists);
    });
  } else {
    for_elements<T, kLanes, kReverse>(args, at, 1,
                                      [&](int to, int64_t i, bool exists) { tile[to] = exists ? from[i] : T{}; });
  }
}

template <class T, int kLanes, bool kReverse>
DEVICE void store_tile(const ScanArgs<T>& args, const Cursor& at, const T* tile, T* to) {
  if (args.packed) {
    for_elements<T, kLanes, kReverse>(args, at, kPackOf<T>, [&](int from, int64_t i, bool exists) {
      if (exists) store(to + i, load<kPackOf<T>>(tile + from));
    });
  } else {
    for_elements<T, kLanes, kReverse>(args, at, 1, [&](int from, int64_t i, bool exists) {
      if (exists) to[i] = tile[from];
    });
  }
}

// The sums over kLanes lanes, `apart` from each other, of v[0 .. kStep-1]: lane i keeps kStep / kLanes of them, from
// v[i kStep / kLanes] on, in v[0] and what follows.
template <int kLanes, int kStep, class A>
DEVICE void sum_over_lanes(A (&v)[kStep], int lane, int apart) {
  UNROLL
  for (int bit = kLanes / 2; bit > 0; bit /= 2) {
    const int half = bit * (kStep / kLanes);
    const bool upper = (lane & bit) != 0;
    UNROLL
    for (int i = 0; i < kStep / 2; ++i) {
      if (i >= half) break;
      const A sent = upper ? v[i] : v[i + half];
      const A kept = upper ? v[i + half] : v[i];
      v[i] = kept + shuffle_xor(sent, bit * apart);
    }
  }
}

// One chunk of the rows of one part. kEnds: only the state a chunk ends with, having begun with zeros, goes to where
// the next one begins.
template <class T, int kLanes, class Waves, bool kEnds>
DEVICE void scan(const ScanArgs<T>& args, T* ring) {
  using A = stat_t<T>;
  using Tile = Tiles<T, kLanes>;
  constexpr bool kReverse = Waves::kReverse, kOther = Waves::kOther && !kEnds, kOutput = Waves::kOutput && !kEnds;
  constexpr int kApart = 32 / kLanes;  // channels of a warp
  constexpr int kRows = Tile::kRows, kStep = kOutput ? Tile::kStep : 4, kOwn = kStep / kLanes;
  const int chunks = static_cast<int>(args.chunks) - (kEnds ? 1 : 0);
  const int64_t part = blockIdx.y / chunks, chunk = blockIdx.y % chunks;
  const int64_t begin = chunk * args.length;
  const int64_t end = args.L - begin < args.length ? args.L : begin + args.length;
  const int lane = lane_index() / kApart;  // of the channel
  const int column = static_cast<int>(threadIdx.x) / 32 * kApart + lane_index() % kApart;
  const Mine mine{static_cast<int64_t>(blockIdx.x) * Tile::kChannels + column, lane, kLanes};
  const bool exists = mine.d < args.D;
  const A omega = kOutput && exists ? args.omega[mine.d] : A(0);
  const bool is_last_group = args.first + int64_t{kEach} * kLanes >= args.N;
  const int64_t carried = 2 * Waves::kStates;  // doubles per wavelet

  Waves waves;
  waves.load(args, mine);

  const int64_t past = args.parts.end(part);
  const auto at_row = [&](int64_t b, int64_t first) {
    return Cursor{b, first, b < past ? (end - first < kRows ? end - first : kRows) : 0};
  };
  const auto after = [&](const Cursor& at) {
    const int64_t first = at.first + kRows;
    return first < end ? at_row(at.b, first) : at_row(at.b + 1, begin);
  };
  Cursor ahead = at_row(args.parts.begin(part), begin);
  Cursor at = ahead;
  int filled = 0;  // the stage to be filled next
  const auto fill = [&] {
    T* tile = ring + filled * (Waves::kOther ? 2 : 1) * Tile::kSize;
    if (ahead.b < past) {
      load_tile<T, kLanes, kReverse>(args, ahead, args.in, tile);
      if constexpr (kOther) load_tile<T, kLanes, kReverse>(args, ahead, args.other, tile + Tile::kSize);
      ahead = after(ahead);
    }
    async_commit();
    filled = (filled + 1) % kStages;
  };
  UNROLL
  for (int i = 0; i < kStages - 1; ++i) fill();

  for (int stage = 0; at.b < past; stage = (stage + 1) % kStages) {
    async_wait<kStages - 2>();
    sync_block();  // the tile is there, and the one to be filled next has been stored
    fill();
    T* tile = ring + stage * (Waves::kOther ? 2 : 1) * Tile::kSize;
    const T* other = kOther ? tile + Tile::kSize : nullptr;
    const int rows = static_cast<int>(at.rows);

    if (at.first == begin) {
      UNROLL
      for (int k = 0; k < kEach; ++k) {
        Pair<double> from[Waves::kStates] = {};
        if (!kEnds && chunk == 0) from[0] = waves.start(args, mine, at.b, k);
        if (!kEnds && chunk > 0 && mine.has(args, k)) {
          const double* slot =
              args.carries + ((at.b * (args.chunks - 1) + chunk - 1) * args.D * args.N + mine.index(args, k)) * carried;
          UNROLL
          for (int i = 0; i < Waves::kStates; ++i) from[i] = {slot[2 * i], slot[2 * i + 1]};
        }
        UNROLL
        for (int i = 0; i < Waves::kStates; ++i) waves.state(k, i) = State<A>::of(from[i]);
      }
    }
    if ((at.first - begin) % Waves::kBlock == 0 && rows > 0) {
      waves.begin(static_cast<int>(end - at.first < Waves::kBlock ? end - at.first : Waves::kBlock));
    }

    const auto input = [&](int t) { return widen(tile[t * Tile::kPitch + column]); };
    const auto advance = [&](int t) {
      return waves.template step<kEnds>(input(t), kOther ? widen(other[t * Tile::kPitch + column]) : A(0));
    };
    const auto write = [&](int t, A sum) {
      sum += args.first == 0 ? omega * input(t) : A(0);
      if (args.partial != nullptr && exists) {
        const int64_t step = at.first + t;
        A& so_far = args.partial[(at.b * args.L + (kReverse ? args.L - 1 - step : step)) * args.D + mine.d];
        if (args.first > 0) sum += so_far;
        so_far = sum;
      }
      tile[t * Tile::kPitch + column] = narrow<T>(sum);
    };
    int t0 = 0;
    for (; t0 + kStep <= rows; t0 += kStep) {
      A v[kStep];
      UNROLL
      for (int j = 0; j < kStep; ++j) {
        if (kStep > 8 && j % 8 == 0) sync_warp();  // the registers do not suffice for reading all steps ahead
        v[j] = advance(t0 + j);
      }
      if constexpr (kOutput) {
        sum_over_lanes<kLanes, kStep>(v, lane, kApart);
        if constexpr (kLanes > 1) sync_warp();  // all lanes have read what is overwritten
        UNROLL
        for (int j = 0; j < kOwn; ++j) write(t0 + lane * kOwn + j, v[j]);
      }
    }
    for (; t0 < rows; ++t0) {  // the end of the chunk
      A v = advance(t0);
      if constexpr (kOutput) {
        UNROLL
        for (int bit = kLanes / 2; bit > 0; bit /= 2) v += shuffle_xor(v, bit * kApart);
        if constexpr (kLanes > 1) sync_warp();
        if (lane == 0) write(t0, v);
      }
    }

    const Cursor next = after(at);
    if (next.b != at.b || (next.first - begin) % Waves::kBlock == 0) waves.settle();
    if (next.b != at.b) {
      if constexpr (kEnds) {
        UNROLL
        for (int k = 0; k < kEach; ++k) {
          if (!mine.has(args, k)) continue;
          double* slot =
              args.carries + ((at.b * (args.chunks - 1) + chunk) * args.D * args.N + mine.index(args, k)) * carried;
          UNROLL
          for (int i = 0; i < Waves::kStates; ++i) {
            const Pair<double> state = waves.state(k, i).exact();
            slot[2 * i] = state.re;
            slot[2 * i + 1] = state.im;
          }
        }
      } else if (chunk == args.chunks - 1) {
        waves.finish_row(args, mine, at.b);
      }
    }
    if constexpr (kOutput) {
      if (is_last_group) {
        sync_block();  // the outputs of all channels are in the tile
        store_tile<T, kLanes, kReverse>(args, at, tile, args.out);
      }
    }
    at = next;
  }
  if constexpr (!kEnds) waves.finish(args, mine, args.sums + blockIdx.y * args.block_sums);
}

template <class T, int kLanes, bool kEnds>
__global__ void __launch_bounds__(kThreads) cema_forward_kernel(ScanArgs<T> args) {
  DYNAMIC_SHARED(T, ring);
  scan<T, kLanes, Forward<T>, kEnds>(args, ring);
}

// Two independent scans, one half of the grid each: the longer one first.
template <class T, int kLanes, bool kEnds>
__global__ void __launch_bounds__(kThreads) cema_backward_kernel(ScanArgs<T> sensitivity, ScanArgs<T> adjoint) {
  DYNAMIC_SHARED(T, ring);
  if (blockIdx.z == 0) {
    scan<T, kLanes, Sensitivity<T>, kEnds>(sensitivity, ring);
  } else {
    scan<T, kLanes, Adjoint<T>, kEnds>(adjoint, ring);
  }
}

}  // namespace megalodon::cuda
