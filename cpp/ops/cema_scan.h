// The inner parts of the CEMA scan: tables of coefficients, one time block of the recurrence and of its adjoint, and
// the carry between blocks.
//
// The scan works on h' = h / a, so that x enters as it is: h'_t = x_t + q h'_(t-1), y_t = Re sum_n c h'_t with c = a g.
// A sigmoid(alpha) below kLeastInput (alpha < -46) counts as kLeastInput there, so that h0 / a stays finite.
//
// Tables are by column (16 channels), then vector of channels, then wavelet, then entry, then lane.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/wavelets.h"
#include "ops/cema.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr double kLeastInput = 1e-20;
constexpr int64_t kColumn = CemaShape::kColumn;

// Wavelets worked on together: as many as the registers hold.
constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;
constexpr int kAdjointGroup = kVectorBytes == 64 ? 2 : 1;

// Entries of the tables, each one vector of channels. Narrow (type A): q and the output coefficient, c or g. Wide
// (float64): a, and for a float32 scan q, P = q^T and E = (q rounded to float32)^T, T the length of a full time block.
enum : int64_t { kQ = 0, kOut = 2, kNarrow = 4 };
enum : int64_t { kA = 0, kQ64 = 1, kP = 3, kE = 5 };
template <class A>
constexpr int64_t kWide = std::is_same_v<A, float> ? 7 : 1;

// ---- tables ----

// The tables of the vector of channels from d on. The output coefficient is c = a g, or g where `unscaled`. The powers
// are filled in only if `steps`, the length of a full time block, is not 0.
template <class A>
void make_tables(const Parameters<A>& parameters, int64_t d, bool unscaled, int64_t steps, A* narrow, double* wide) {
  constexpr int64_t W = kLanes<A>;
  const double scale = gamma_scale(parameters.N);
  for (int64_t i = 0; i < W; i += kDoubles) {
    const Sigmoid<Double> frequency = parameters.frequency(d + i);
    for (int64_t n = 0; n < parameters.N; ++n) {
      const Wavelet<Double> w = parameters.wavelet(d + i, n, frequency);
      const Complex<Double> gamma = parameters.gamma_of(d + i, n);
      const Double a = w.a() < kLeastInput ? splat(kLeastInput) : w.a();
      const Double out_scale = unscaled ? splat(scale) : scale * a;
      const Complex<Double> q{w.q_re(), w.q_im()};
      A* row = narrow + n * kNarrow * W;
      store_pair(row + kQ * W, W, i, q);
      store_pair(row + kOut * W, W, i, Complex<Double>{gamma.re * out_scale, gamma.im * out_scale});
      double* wide_row = wide + n * kWide<A> * W;
      store(wide_row + kA * W + i, a);
      if constexpr (std::is_same_v<A, float>) {
        store_pair(wide_row + kQ64 * W, W, i, q);
        if (steps == 0) continue;
        store_pair(wide_row + kP * W, W, i, power(q, steps));
        store_pair(wide_row + kE * W, W, i, power(load_pair(row + kQ * W, W, i), steps));
      }
    }
  }
}

// ---- the carry between time blocks ----

// The state after `steps` steps from the state H, exact for what was carried in: the block gave `end`, computed in
// float32 from H rounded and with q rounded. H <- end + P H - E round(H), so that neither rounding adds up over the
// blocks. `backward`: the adjoint's, with conj(q). With float64 there is nothing to correct.
template <class A>
inline void carry(const A* narrow, const double* wide, int64_t steps, bool full, bool backward, const A* end,
                  double* H) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t i = 0; i < W; i += kDoubles) {
    Complex<Double> next = load_pair(end, W, i);
    if constexpr (std::is_same_v<A, float>) {
      Complex<Double> P, E;
      if (full) {
        P = load_pair(wide + kP * W, W, i);
        E = load_pair(wide + kE * W, W, i);
      } else {
        P = power(load_pair(wide + kQ64 * W, W, i), steps);
        E = power(load_pair(narrow + kQ * W, W, i), steps);
      }
      if (backward) {
        P = conj(P);
        E = conj(E);
      }
      const Complex<Double> h = load_pair(H, W, i);
      A rounded[2 * kDoubles];
      store_pair(rounded, kDoubles, 0, h);
      next = next + P * h - E * load_pair(rounded, kDoubles, 0);
    }
    store_pair(H, W, i, next);
  }
}

template <class A>
inline void round_state(const double* H, A* state) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t i = 0; i < 2 * W; i += kDoubles) store_wide(state + i, load(H + i));
}

// ---- one time block, G wavelets of one vector of channels ----

// h' <- x_t + q h', y_t += Re(c h'). x, y: one vector per step; state: re and im per wavelet.
template <class A, int G>
void scan_block(const A* narrow, A* state, const A* x, A* y, int64_t steps) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> qr[G], qi[G], cr[G], ci[G], hr[G], hi[G];
  for (int k = 0; k < G; ++k) {
    const A* row = narrow + k * kNarrow * W;
    qr[k] = load(row);
    qi[k] = load(row + W);
    cr[k] = load(row + 2 * W);
    ci[k] = load(row + 3 * W);
    hr[k] = load(state + 2 * k * W);
    hi[k] = load(state + (2 * k + 1) * W);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<A> xt = load(x + t * W);
    Vec<A> yt = load(y + t * W);
    for (int k = 0; k < G; ++k) {
      const Vec<A> re = qr[k] * hr[k] + (xt - qi[k] * hi[k]);
      hi[k] = qr[k] * hi[k] + qi[k] * hr[k];
      hr[k] = re;
      yt = cr[k] * hr[k] + yt;
      yt = yt - ci[k] * hi[k];
    }
    store(y + t * W, yt);
  }
  for (int k = 0; k < G; ++k) {
    store(state + 2 * k * W, hr[k]);
    store(state + (2 * k + 1) * W, hi[k]);
  }
}

// The same without the output: h' alone. With kKeep, the state before step t is kept in kept + t * 2 G W, and the last
// one behind them.
template <class A, int G, bool kKeep>
void advance_block(const A* narrow, A* state, const A* x, A* kept, int64_t steps) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> qr[G], qi[G], hr[G], hi[G];
  for (int k = 0; k < G; ++k) {
    qr[k] = load(narrow + k * kNarrow * W);
    qi[k] = load(narrow + k * kNarrow * W + W);
    hr[k] = load(state + 2 * k * W);
    hi[k] = load(state + (2 * k + 1) * W);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<A> xt = load(x + t * W);
    for (int k = 0; k < G; ++k) {
      if constexpr (kKeep) {
        store(kept + (2 * G * t + 2 * k) * W, hr[k]);
        store(kept + (2 * G * t + 2 * k + 1) * W, hi[k]);
      }
      const Vec<A> re = qr[k] * hr[k] + (xt - qi[k] * hi[k]);
      hi[k] = qr[k] * hi[k] + qi[k] * hr[k];
      hr[k] = re;
    }
  }
  A* last = kKeep ? kept + 2 * G * steps * W : state;
  for (int k = 0; k < G; ++k) {
    store(last + 2 * k * W, hr[k]);
    store(last + (2 * k + 1) * W, hi[k]);
  }
}

// Sums of one block for one wavelet, one vector each: conj-products with l (dS/dq / a) and dy (dS/dg / a), and dS/da.
enum : int64_t { kSumQ = 0, kSumG = 2, kSumA = 4, kSums = 5 };

// The adjoint, backward in time: l = conj(g) dy_t + m, dx_t += a Re l, m <- conj(q) l. kept: what advance_block kept;
// m: re and im per wavelet; a: one vector per wavelet; sums: kSums vectors per wavelet, written.
template <class A, int G>
void adjoint_block(const A* narrow, const A* a, const A* kept, A* m, const A* x, const A* dy, A* dx, A* sums,
                   int64_t steps) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> qr[G], qi[G], gr[G], gi[G], av[G], mr[G], mi[G], hr[G], hi[G];
  Vec<A> sq_re[G] = {}, sq_im[G] = {}, sg_re[G] = {}, sg_im[G] = {}, sa[G] = {};
  for (int k = 0; k < G; ++k) {
    const A* row = narrow + k * kNarrow * W;
    qr[k] = load(row);
    qi[k] = load(row + W);
    gr[k] = load(row + 2 * W);
    gi[k] = load(row + 3 * W);
    av[k] = load(a + k * W);
    mr[k] = load(m + 2 * k * W);
    mi[k] = load(m + (2 * k + 1) * W);
    hr[k] = load(kept + (2 * G * steps + 2 * k) * W);
    hi[k] = load(kept + (2 * G * steps + 2 * k + 1) * W);
  }
  for (int64_t t = steps; t-- > 0;) {
    const Vec<A> dyt = load(dy + t * W);
    const Vec<A> xt = load(x + t * W);
    Vec<A> dxt = load(dx + t * W);
    for (int k = 0; k < G; ++k) {
      const Vec<A> lr = gr[k] * dyt + mr[k];
      const Vec<A> li = mi[k] - gi[k] * dyt;
      sg_re[k] = dyt * hr[k] + sg_re[k];
      sg_im[k] = sg_im[k] - dyt * hi[k];
      sa[k] = lr * xt + sa[k];
      dxt = av[k] * lr + dxt;
      hr[k] = load(kept + (2 * G * t + 2 * k) * W);
      hi[k] = load(kept + (2 * G * t + 2 * k + 1) * W);
      sq_re[k] = lr * hr[k] + (li * hi[k] + sq_re[k]);
      sq_im[k] = li * hr[k] + (sq_im[k] - lr * hi[k]);
      mr[k] = qr[k] * lr + qi[k] * li;
      mi[k] = qr[k] * li - qi[k] * lr;
    }
    store(dx + t * W, dxt);
  }
  for (int k = 0; k < G; ++k) {
    store(m + 2 * k * W, mr[k]);
    store(m + (2 * k + 1) * W, mi[k]);
    A* out = sums + k * kSums * W;
    store(out, sq_re[k]);
    store(out + W, sq_im[k]);
    store(out + 2 * W, sg_re[k]);
    store(out + 3 * W, sg_im[k]);
    store(out + 4 * W, sa[k]);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
