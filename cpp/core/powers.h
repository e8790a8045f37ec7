// Sums over long ranges of powers q^t of the wavelets of one vector of channels, without a recurrence over time:
//   synthesis  out_t = Re sum_n c_n q_n^t                       (the impulse response, what a state adds to the output)
//   analysis   S_n = sum_t v_t q_n^t,  U_n = sum_t t v_t q_n^t  (its adjoint, and the derivative by log q)
// for t = 0 .. L-1, any c (complex) and v (real) per lane.
//
// With t = block + j, j < 32, q^t is q^block q^j: a table of q^j in A, made in float64, and one factor q^block per
// block, carried in float64 and restarted every 2048 steps from exp(t log|q|) and the angle t arg q (reduced exactly),
// so that rounding does not add up over L. Synthesis is 2 N FMA per value, analysis 2 N (4 N and 4 N additions with U).
// A wavelet whose factor has become 0 in A (below the smallest normal number) in every lane is left out from there on.
#pragma once

#include <limits>

#include "core/slots.h"
#include "core/wavelets.h"

namespace megalodon {

constexpr int64_t kPowerSteps = 32;                 // of a block, in the table
constexpr int64_t kPowerTile = 4 * kPowerSteps;     // blocks worked on together
constexpr int64_t kPowerRestart = 16 * kPowerTile;  // steps from one exact power to the next

// Bytes of scratch memory, for N wavelets, of Powers and of `rows` rows of kLanes<A> doubles per wavelet.
constexpr int64_t powers_bytes(int64_t N) {
  return N * (2 * (kPowerSteps + 1) + 8) * kMaxVectorBytes + 8 * aligned_bytes(N * 2 * kMaxVectorBytes) +
         aligned_bytes(8 * N);
}
constexpr int64_t wavelet_rows_bytes(int64_t N, int64_t rows) { return aligned_bytes(N * rows * 2 * kMaxVectorBytes); }

namespace cpu::MEGALODON_ISA {

// Splits a number of turns (revolutions) so that t * high is exact for t < 2^26.
struct Turns {
  Double high, low;
  static Turns of(Double turns) {
    constexpr double kMagic = 6755399441055744.0 / (int64_t{1} << 26);
    const Double high = (turns + kMagic) - kMagic;
    return {high, turns - high};
  }
};

template <class A>
class Powers {
 public:
  static constexpr int64_t W = kLanes<A>;

  Powers(const Parameters<A>& parameters, int64_t d, Slot& slot) : N_(parameters.N) {
    table_ = slot.take<Vec<A>>(N_ * kRow);
    narrow_ = slot.take<Vec<A>>(N_ * 8);
    log_rho_ = slot.take<double>(N_ * W);
    high_ = slot.take<double>(N_ * W);
    low_ = slot.take<double>(N_ * W);
    block_ = slot.take<double>(N_ * 2 * W);
    current_ = slot.take<double>(N_ * 2 * W);
    live_ = slot.take<int64_t>(N_);
    for (int64_t i = 0; i < W; i += kDoubles) {
      const Sigmoid<Double> frequency = parameters.frequency(d + i);
      for (int64_t n = 0; n < N_; ++n) fill(parameters.wavelet(d + i, n, frequency), n, i);
    }
  }

  int64_t wavelets() const { return N_; }

  // q_n^t of the kDoubles lanes from i on.
  Complex<Double> power(int64_t n, int64_t i, int64_t t) const {
    const auto steps = static_cast<double>(t);
    constexpr double kMagic = 6755399441055744.0;
    const Double turns = steps * load(high_ + n * W + i);
    const Double rest = (turns - ((turns + kMagic) - kMagic)) + steps * load(low_ + n * W + i);
    Double sine, cosine;
    sincos(kTwoPi * rest, sine, cosine);
    const Double rho = exp(steps * load(log_rho_ + n * W + i));
    return {rho * cosine, rho * sine};
  }

  // Calls out(t, count, tile) with out_t .. out_(t+count-1) in tile, for t = 0, kPowerTile, ..; c is [N, 2, W].
  template <class Out>
  void synthesize(const double* c, int64_t L, Out&& out) {
    Vec<A> tile[kPowerTile];
    int64_t live = all_live();
    for (int64_t t = 0; t < L; t += kPowerTile) {
      live = factors(live, t, [&](int64_t n, int64_t i) { return load_pair(c + 2 * n * W, W, i); });
      if (live == 0) {
        std::memset(tile, 0, sizeof tile);
      } else {
        for (int64_t j = 0; j < kPowerSteps; j += kWidth) synthesize_steps(live, j, tile);
      }
      out(t, L - t < kPowerTile ? L - t : kPowerTile, tile);
    }
  }

  // in(t, count, tile) writes v_t .. v_(t+count-1) to tile. sums is [N, 4, W]: S, then U (0 unless kWeighted).
  template <bool kWeighted, class In>
  void analyze(In&& in, int64_t L, double* sums) {
    Vec<A> tile[kPowerTile];
    std::memset(sums, 0, N_ * 4 * W * sizeof(double));
    int64_t live = all_live();
    for (int64_t t = 0; t < L && live > 0; t += kPowerTile) {
      const int64_t count = L - t < kPowerTile ? L - t : kPowerTile;
      in(t, count, tile);
      if (count < kPowerTile) std::memset(tile + count, 0, (kPowerTile - count) * sizeof(Vec<A>));
      live = factors(live, t, [](int64_t, int64_t) { return Complex<Double>{splat(1.0), splat(0.0)}; });
      for (int64_t l = 0; l < live; ++l) analyze_wavelet<kWeighted>(l, t, tile, sums + live_[l] * 4 * W);
    }
  }

 private:
  static constexpr int64_t kRow = 2 * (kPowerSteps + 1);     // one more, so that rows do not share cache sets
  static constexpr int kWidth = kVectorBytes == 64 ? 4 : 2;  // steps in registers

  void fill(const Wavelet<Double>& w, int64_t n, int64_t i) {
    Double log_rho = {};
    for (int64_t l = 0; l < kDoubles; ++l) {
      Wavelet<double> one{};
      one.alpha.value = w.alpha.value[l];
      one.delta.value = w.delta.value[l];
      one.rho = w.rho[l];
      log_rho[l] = one.log_rho();
    }
    store(log_rho_ + n * W + i, log_rho);
    const Turns turns = Turns::of(w.phi * (1.0 / kTwoPi));
    store(high_ + n * W + i, turns.high);
    store(low_ + n * W + i, turns.low);
    const Complex<Double> q{w.q_re(), w.q_im()};
    Complex<Double> p{splat(1.0), Double{}};
    for (int64_t j = 0; j < kPowerSteps; ++j) {
      store_pair(reinterpret_cast<A*>(table_ + n * kRow + 2 * j), W, i, p);
      p = p * q;
    }
    store_pair(block_ + 2 * n * W, W, i, power(n, i, kPowerSteps));
  }

  int64_t all_live() {
    for (int64_t n = 0; n < N_; ++n) live_[n] = n;
    return N_;
  }

  // The factors start(n, i) q_n^b of the four blocks b of the tile at t, in narrow_ for those wavelets of live_ that
  // are still alive; current_ keeps them for the next tile, and holds the first in between. Returns how many are alive.
  template <class Start>
  int64_t factors(int64_t live, int64_t t, Start&& start) {
    int64_t kept = 0;
    for (int64_t l = 0; l < live; ++l) {
      const int64_t n = live_[l];
      Vec<A>* to = narrow_ + 8 * kept;
      double* current = current_ + 2 * n * W;
      double size = 0;
      for (int64_t i = 0; i < W; i += kDoubles) {
        Complex<Double> v;
        if (t % kPowerRestart == 0) {
          v = start(n, i);
          if (t > 0) v = v * power(n, i, t);
        } else {
          v = load_pair(current, W, i);
        }
        size += sum_lanes<double>((v.re < 0 ? -v.re : v.re) + (v.im < 0 ? -v.im : v.im));
        const Complex<Double> step = load_pair(block_ + 2 * n * W, W, i);
        for (int64_t b = 0; b < 4; ++b) {
          store_pair(reinterpret_cast<A*>(to + 2 * b), W, i, v);
          v = v * step;
        }
        store_pair(current, W, i, v);
      }
      if (!(size < static_cast<double>(std::numeric_limits<A>::min()))) live_[kept++] = n;  // NaN lives
    }
    return kept;
  }

  void synthesize_steps(int64_t live, int64_t j, Vec<A>* tile) const {
    Vec<A> sum[4][kWidth] = {};
    for (int64_t l = 0; l < live; ++l) {
      const Vec<A>* p = table_ + live_[l] * kRow + 2 * j;
      const Vec<A>* f = narrow_ + 8 * l;
      for (int b = 0; b < 4; ++b) {
        for (int k = 0; k < kWidth; ++k) {
          sum[b][k] = f[2 * b] * p[2 * k] + sum[b][k];
          sum[b][k] = sum[b][k] - f[2 * b + 1] * p[2 * k + 1];
        }
      }
    }
    for (int b = 0; b < 4; ++b) {
      for (int k = 0; k < kWidth; ++k) tile[b * kPowerSteps + j + k] = sum[b][k];
    }
  }

  // From the last step down: after step j, re is the sum over i >= j, and the sum of those for j >= 1 is the sum of j
  // v_j.
  template <bool kWeighted>
  void analyze_wavelet(int64_t l, int64_t t, const Vec<A>* tile, double* sums) const {
    constexpr int kBlocks = kVectorBytes == 64 || !kWeighted ? 4 : 2;
    const int64_t n = live_[l];
    const Vec<A>* p = table_ + n * kRow;
    for (int64_t first = 0; first < 4; first += kBlocks) {
      Complex<Vec<A>> s[kBlocks] = {}, u[kBlocks] = {};
      for (int64_t j = kPowerSteps; j-- > 0;) {
        for (int b = 0; b < kBlocks; ++b) {
          const Vec<A> v = tile[(first + b) * kPowerSteps + j];
          s[b].re = v * p[2 * j] + s[b].re;
          s[b].im = v * p[2 * j + 1] + s[b].im;
          if (kWeighted && j > 0) u[b] = u[b] + s[b];
        }
      }
      for (int b = 0; b < kBlocks; ++b) {
        A rows[4 * W];
        store(rows, s[b].re);
        store(rows + W, s[b].im);
        store(rows + 2 * W, u[b].re);
        store(rows + 3 * W, u[b].im);
        add_block(l, first + b, t, kWeighted, rows, sums);
      }
    }
  }

  // sums += q^block (s, u + block s).
  void add_block(int64_t l, int64_t b, int64_t t, bool weighted, const A* rows, double* sums) const {
    const auto start = static_cast<double>(t + b * kPowerSteps);
    for (int64_t i = 0; i < W; i += kDoubles) {
      const Complex<Double> factor = load_pair(reinterpret_cast<const A*>(narrow_ + 8 * l + 2 * b), W, i);
      const Complex<Double> s = load_pair(rows, W, i);
      store_pair(sums, W, i, load_pair(sums, W, i) + factor * s);
      if (!weighted) continue;
      const Complex<Double> u = load_pair(rows + 2 * W, W, i);
      store_pair(sums + 2 * W, W, i,
                 load_pair(sums + 2 * W, W, i) + factor * Complex<Double>{u.re + start * s.re, u.im + start * s.im});
    }
  }

  int64_t N_;
  Vec<A>* table_;    // [N, kRow]: q^j as (re, im)
  Vec<A>* narrow_;   // [live, 4, 2]: the factors of the tile
  double* log_rho_;  // [N, W]
  double* high_;     // [N, W], with low_ arg q in turns
  double* low_;
  double* block_;    // [N, 2, W]: q^kPowerSteps
  double* current_;  // [N, 2, W]
  int64_t* live_;    // [N]
};

}  // namespace cpu::MEGALODON_ISA
}  // namespace megalodon
