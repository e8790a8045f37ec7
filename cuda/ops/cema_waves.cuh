// The three linear recurrences of CEMA over time, for the wavelets of one thread:
//
//   Forward       h <- x + q h,  y = Re sum_n c h + omega x                   (h is h / a, c = a g)
//   Adjoint       l = conj(g) dy + m,  m <- conj(q) l,  dx = sum_n a Re l + omega dy,  and sum x Re l;  time runs back
//   Sensitivity   e <- h + q e (the derivative of h by q), h <- x + q h,  and sum dy h, sum dy e
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

// ---- the table of coefficients: rows of D N doubles -----------------------------------------------------------------

enum : int64_t { kTableA, kTableQ, kTableG = 3, kTableRows = 5 };

// Sums over time and sequences for the gradients: rows of D N doubles, and one of D doubles behind them. The conjugates
// of dS/dq / a and dS/dg / a; dS/da; domega.
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
  double* carries;      // [places of the cut, D, N, numbers]: the states where the pieces but the first begin
  double* sums;         // [blocks, sums of a block]
  int64_t block_sums;   // how many
  int64_t D, N;
  int64_t first;  // of the wavelets
  CemaCut cut;
  bool keeps_ends;  // what all pieces end with goes to places of their own: CemaCut::ends
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
  DEVICE Pair<double> state(const ScanArgs<T>& args, const stat_t<T>* tensor, int64_t i, int k) const {
    if (tensor == nullptr || !has(args, k)) return {0, 0};
    const auto v = load<2>(tensor + 2 * (i * args.D * args.N + index(args, k)));
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
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t i, int k) const {
    const Pair<double> h0 = mine.state(args, args.start, i, k);
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
  DEVICE void finish_sequence(const ScanArgs<T>& args, const Mine& mine, int64_t i) const {
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (!mine.has(args, k)) continue;
      const Pair<A> last = Pair<A>::of(mine.number(args, kTableA, k) * h[k].exact());
      store(args.last + 2 * (i * args.D * args.N + mine.index(args, k)), Pack<A, 2>{last.re, last.im});
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
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t i, int k) const {
    return mine.state(args, args.start, i, k);
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
  DEVICE void finish_sequence(const ScanArgs<T>& args, const Mine& mine, int64_t i) const {
    if (args.last == nullptr) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      if (!mine.has(args, k)) continue;
      const Pair<A> last = Pair<A>::of(m[k].exact());
      store(args.last + 2 * (i * args.D * args.N + mine.index(args, k)), Pack<A, 2>{last.re, last.im});
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
  DEVICE Pair<double> start(const ScanArgs<T>& args, const Mine& mine, int64_t i, int k) const {
    const Pair<double> h0 = mine.state(args, args.start, i, k);
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
  DEVICE void finish_sequence(const ScanArgs<T>& args, const Mine& mine, int64_t i) {
    if (args.cotangent == nullptr) return;
    UNROLL
    for (int k = 0; k < kEach; ++k) {
      total_q[k] = total_q[k] + conj(mine.state(args, args.cotangent, i, k)) * e[k].exact();
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

}  // namespace megalodon::cuda
