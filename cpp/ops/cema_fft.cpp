// cema on the CPU, by a causal convolution with the impulse response ("fft").
//
// Computes  y = k * x + b, k_t = Re sum_n a g_n q_n^t (+ omega at t = 0), b_t = Re sum_n g_n h0_n q_n^(t+1), the last
// state
//           h_n = a sum_m q_n^m x_(L-1-m) + q_n^L h0_n, and all gradients (ops/cema.h).
// Layout    as in cema.cpp; a transformed array holds H >= L (re, im) pairs of vectors of 16 channels: 128 H bytes.
// Mapping   a task is a group of channels, one per lane; it makes and transforms their responses once, then walks
//           through the batch: transform, product and inverse of a row (core/fft.h), and the sums over powers that lead
//           from and to the states (core/powers.h).
// Traffic   per element about 8 log2(H) vector operations forward and 12 log2(H) backward, whatever N; and per element
//           and wavelet that has not decayed 2 FMA for the last state, 2 for h0, 4 for dh, 4 for dh0, and once for the
//           whole batch 2 for the response and 4 for its gradient.
// Numerics  coefficients and powers in float64, the convolution in float32 (float64 for float64 x): relative RMS error
//           about 3e-7 of the row. y_t depends on later x by rounding alone. Sums over the batch in order:
//           deterministic. Subnormal numbers count as zeros.
// Limits    as those of fft_conv and cema_kernel. A NaN spreads over its row and channel, backwards in time too.
#include "core/fft.h"
#include "core/powers.h"
#include "ops/cema.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kAhead = 8;  // steps to fetch ahead

// What one task works with: the powers, the coefficients and the transformed response of one vector of channels.
template <class T>
class Column {
 public:
  using A = stat_t<T>;
  static constexpr int64_t W = kLanes<A>;

  template <class Args>
  Column(const Args& args, const Fft<A>& fft, int64_t d, int64_t lanes, Slot& slot)
      : parameters_(Parameters<A>::of(args)),
        fft_(fft),
        powers_(parameters_, d, slot),
        L_(args.fft_length()),
        d_(d),
        lanes_(lanes) {
    c_ = slot.take<double>(N() * 2 * W);
    sums_ = slot.take<double>(N() * 4 * W);
    spectrum_ = slot.take<Vec<A>>(2 * fft.points());
    extra_ = slot.take<Vec<A>>(L_);
    products(parameters_, d, c_);
    const A scale = A(1) / static_cast<A>(fft.points());
    const Vec<A> omega = load(static_cast<const A*>(args.omega) + d, lanes);
    powers_.synthesize(c_, L_, [&](int64_t t, int64_t count, const Vec<A>* tile) {
      for (int64_t i = 0; i < count; ++i) spectrum_[2 * (t + i)] = tile[i] * scale;
      if (t == 0) spectrum_[0] = (tile[0] + omega) * scale;
    });
    fft.root(spectrum_, L_, [&](int64_t t) { return spectrum_[2 * t]; });
    fft.forward(spectrum_);
  }

  int64_t N() const { return parameters_.N; }
  const Vec<A>* spectrum() const { return spectrum_; }
  const Vec<A>* extra() const { return extra_; }
  const double* sums() const { return sums_; }
  const Parameters<A>& parameters() const { return parameters_; }
  Complex<Double> power(int64_t n, int64_t i, int64_t t) const { return powers_.power(n, i, t); }

  // One wavelet of kDoubles channels from i on: a, g, and a state [D, N, 2] of one row of the batch.
  Double a(int64_t n, int64_t i) const {
    return Sigmoid<Double>::of(parameters_.gather(parameters_.alpha + n, d_ + i, N())).value;
  }
  Complex<Double> g(int64_t n, int64_t i) const {
    const Complex<Double> gamma = parameters_.gamma_of(d_ + i, n);
    const double scale = gamma_scale(N());
    return {gamma.re * scale, gamma.im * scale};
  }
  Complex<Double> state(const A* tensor, int64_t n, int64_t i) const {
    return {parameters_.gather(tensor + 2 * n, d_ + i, 2 * N()),
            parameters_.gather(tensor + 2 * n + 1, d_ + i, 2 * N())};
  }
  void put_state(A* tensor, int64_t n, int64_t i, const Complex<Double>& v) const {
    for (int64_t l = 0; l < parameters_.lanes(d_ + i); ++l) {
      A* to = tensor + ((d_ + i + l) * N() + n) * 2;
      to[0] = static_cast<A>(v.re[l]);
      to[1] = static_cast<A>(v.im[l]);
    }
  }

  // extra_m = Re sum_n c(n, i) q_n^m.
  template <class C>
  void synthesize(C&& c) {
    each([&](int64_t n, int64_t i) { store_pair(c_ + 2 * n * W, W, i, c(n, i)); });
    powers_.synthesize(c_, L_, [&](int64_t t, int64_t count, const Vec<A>* tile) {
      std::memcpy(extra_ + t, tile, count * sizeof(Vec<A>));
    });
  }

  // sums(): S and, if kWeighted, U of v(t), t < L.
  template <bool kWeighted, class Value>
  void analyze(Value&& v) {
    powers_.template analyze<kWeighted>(
        [&](int64_t t, int64_t count, Vec<A>* tile) {
          for (int64_t i = 0; i < count; ++i) tile[i] = v(t + i);
        },
        L_, sums_);
  }
  Complex<Double> S(int64_t n, int64_t i) const { return load_pair(sums_ + 4 * n * W, W, i); }
  Complex<Double> U(int64_t n, int64_t i) const { return load_pair(sums_ + (4 * n + 2) * W, W, i); }

  // Calls body(n, i) for every wavelet and kDoubles lanes.
  template <class Body>
  void each(Body&& body) const {
    for (int64_t n = 0; n < N(); ++n) {
      for (int64_t i = 0; i < W; i += kDoubles) body(n, i);
    }
  }

 private:
  Parameters<A> parameters_;
  const Fft<A>& fft_;
  Powers<A> powers_;
  int64_t L_, d_, lanes_;
  double* c_;
  double* sums_;
  Vec<A>* spectrum_;
  Vec<A>* extra_;
};

inline Complex<Double> times(Double a, const Complex<Double>& z) { return {a * z.re, a * z.im}; }

// ---- forward ----

template <class T>
void forward(const CemaForward& args) {
  using A = stat_t<T>;
  const int64_t B = args.sequences.count, L = args.sequences.length, D = args.D;
  if (B * D == 0) return;
  const auto* h0 = static_cast<const A*>(args.h0);
  char* table = aligned(args.workspace);
  const Fft<A> fft(args.fft_size(), table);
  fft.fill();

  for_channels<A>(args.fft_tasks(), table + args.fft_table(), [&](int64_t d, int64_t lanes, Slot slot) {
    Column<T> column(args, fft, d, lanes, slot);
    auto* z = slot.take<Vec<A>>(2 * fft.points());
    for (int64_t b = 0; b < B; ++b) {
      const T* x = static_cast<const T*>(args.x) + b * L * D + d;
      T* y = static_cast<T*>(args.y) + b * L * D + d;
      const A* start = h0 == nullptr ? nullptr : h0 + b * D * args.N * 2;
      if (start != nullptr) {
        column.synthesize(
            [&](int64_t n, int64_t i) { return column.g(n, i) * column.power(n, i, 1) * column.state(start, n, i); });
      }
      with_lanes<A>(lanes, [&](auto full) {
        fft.root(z, L, [&](int64_t t) { return load_step<full.value>(x + t * D, lanes, kAhead * D); });
        fft.multiply(z, column.spectrum());
        fft.root_inverse(z, L, [&](int64_t t, Vec<A> v) {
          store_step<full.value>(y + t * D, start == nullptr ? v : v + column.extra()[t], lanes, kAhead * D);
        });
        column.template analyze<false>(
            [&](int64_t m) { return load_step<full.value>(x + (L - 1 - m) * D, lanes, -kAhead * D); });
      });
      A* h = static_cast<A*>(args.h) + b * D * args.N * 2;
      column.each([&](int64_t n, int64_t i) {
        Complex<Double> last = times(column.a(n, i), column.S(n, i));
        if (start != nullptr) last = last + column.power(n, i, L) * column.state(start, n, i);
        column.put_state(h, n, i, last);
      });
    }
  });
}

// ---- backward ----

// The gradients through the last state h = a V + q^L h0, V = sum_m q^m x_(L-1-m): V and W = sum_m m q^m x_(L-1-m) are
// the column's S and U. z conj(dh) has the derivatives by Re and Im of what multiplies z.
template <class T>
void add_last_state(const Column<T>& column, int64_t L, const stat_t<T>* dh, const stat_t<T>* h0, stat_t<T>* dh0,
                    double* gradients) {
  constexpr int64_t W = kLanes<stat_t<T>>;
  column.each([&](int64_t n, int64_t i) {
    const Complex<Double> dual = conj(column.state(dh, n, i));
    double* row = gradients + n * kWaveletSums * W;
    store(row + kSumInput * W + i, load(row + kSumInput * W + i) + (dual * column.S(n, i)).re);
    Complex<Double> by_log = times(column.a(n, i), dual * column.U(n, i));
    if (h0 != nullptr) {
      const Complex<Double> decay = dual * column.power(n, i, L);
      by_log = by_log + times(splat(static_cast<double>(L)), decay * column.state(h0, n, i));
      column.put_state(dh0, n, i, conj(decay));
    }
    add_pair(row + kSumLog * W, W, i, conj(by_log));
  });
}

// The gradients through b_t = Re sum_n g h0 q^(t+1): the column's S and U are those of dy.
template <class T>
void add_first_state(const Column<T>& column, bool add, const stat_t<T>* h0, stat_t<T>* dh0, double* gradients) {
  constexpr int64_t W = kLanes<stat_t<T>>;
  column.each([&](int64_t n, int64_t i) {
    const Complex<Double> q = column.power(n, i, 1);
    const Complex<Double> from = column.state(h0, n, i);
    const Complex<Double> E = q * column.S(n, i);
    const Complex<Double> gE = column.g(n, i) * E;
    double* row = gradients + n * kWaveletSums * W;
    add_pair(row + kSumOutput * W, W, i, conj(from * E));
    add_pair(row + kSumLog * W, W, i, conj(column.g(n, i) * from * (E + q * column.U(n, i))));
    const Complex<Double> so_far = add ? column.state(dh0, n, i) : Complex<Double>{};
    column.put_state(dh0, n, i, so_far + conj(gE));
  });
}

template <class T>
void backward_row(const CemaBackward& args, const Fft<stat_t<T>>& fft, Column<T>& column, int64_t b, int64_t d,
                  int64_t lanes, Vec<stat_t<T>>* reversed, Vec<stat_t<T>>* z, Vec<stat_t<T>>* sum, double* gradients) {
  using A = stat_t<T>;
  const int64_t L = args.sequences.length, D = args.D;
  const int64_t first = b * L * D + d, last = first + (L - 1) * D;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* x = static_cast<const T*>(args.x);
  auto* dx = static_cast<T*>(args.dx);
  const auto of_row = [&](const void* p) {
    return p == nullptr ? nullptr : static_cast<A*>(const_cast<void*>(p)) + b * D * args.N * 2;
  };
  const A* dh = of_row(args.dh);
  const A* h0 = of_row(args.h0);
  A* dh0 = of_row(args.dh0);

  if (dh != nullptr) {
    column.synthesize([&](int64_t n, int64_t i) { return times(column.a(n, i), conj(column.state(dh, n, i))); });
  }
  with_lanes<A>(lanes, [&](auto full) {
    fft.root(reversed, L, [&](int64_t t) { return load_step<full.value>(dy + last - t * D, lanes, -kAhead * D); });
    fft.root(z, L, [&](int64_t t) { return load_step<full.value>(x + first + t * D, lanes, kAhead * D); });
    fft.multiply_both(reversed, z, column.spectrum(), sum);
    fft.root_inverse(reversed, L, [&](int64_t t, Vec<A> v) {
      store_step<full.value>(dx + last - t * D, dh == nullptr ? v : v + column.extra()[t], lanes, -kAhead * D);
    });
  });
  if (dh != nullptr) {
    column.template analyze<true>([&](int64_t m) { return load(x + last - m * D, lanes); });
    add_last_state(column, L, dh, h0, dh0, gradients);
  }
  if (h0 != nullptr) {
    column.template analyze<true>([&](int64_t t) { return load(dy + first + t * D, lanes); });
    add_first_state(column, dh != nullptr, h0, dh0, gradients);
  }
}

template <class T>
void backward(const CemaBackward& args) {
  using A = stat_t<T>;
  constexpr int64_t W = kLanes<A>;
  const int64_t L = args.fft_length();
  char* table = aligned(args.workspace);
  const Fft<A> fft(args.fft_size(), table);
  fft.fill();

  for_channels<A>(args.fft_tasks(), table + args.fft_table(), [&](int64_t d, int64_t lanes, Slot slot) {
    const int64_t H = fft.points();
    Column<T> column(args, fft, d, lanes, slot);
    auto* gradients = slot.take<double>(args.N * kWaveletSums * W);
    auto* reversed = slot.take<Vec<A>>(2 * H);
    auto* z = slot.take<Vec<A>>(2 * H);
    auto* sum = slot.take<Vec<A>>(2 * H);
    std::memset(gradients, 0, args.N * kWaveletSums * W * sizeof(double));
    std::memset(sum, 0, 2 * H * sizeof(Vec<A>));
    for (int64_t b = 0; b < args.sequences.count; ++b) {
      backward_row(args, fft, column, b, d, lanes, reversed, z, sum, gradients);
    }

    fft.inverse(sum);
    const A scale = A(1) / static_cast<A>(H);
    fft.root_inverse(sum, L, [&](int64_t t, Vec<A> v) { sum[2 * t] = v * scale; });
    const auto dk = [&](int64_t t) { return sum[2 * (L - 1 - t)]; };
    store(static_cast<A*>(args.domega) + d, L > 0 ? dk(0) : Vec<A>{}, lanes);
    column.template analyze<true>(dk);
    add_response_gradients(column.parameters(), d, column.sums(), gradients);
    write_gradients(args, column.parameters(), d, gradients);
  });
}

}  // namespace

void cema_fft_forward(const CemaForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void cema_fft_backward(const CemaBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
