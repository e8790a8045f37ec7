// Causal convolutions of many channels at once by a Fourier transform over time; every lane of a vector is a channel.
//
// A real signal of L steps is a polynomial x(t) of degree below L. In C[t] / (t^H - i) with H >= L, the product of two
// real polynomials has the steps 0 .. H-1 of their convolution as its real part and the steps H .. 2H-1 as its
// imaginary part: the real part is the causal convolution, nothing wraps around, and H points do the work of 2H.
//
// The transform evaluates by splitting: t^2h - c^2 = (t^h - c)(t^h + c) sends a(t) + t^h b(t) to a + c b and a - c b.
// One constant c serves a whole node of this tree, so it stays in a register, and nothing is ever reordered: the points
// come out in the order of the tree, which is all a product needs, and the inverse undoes the tree. A pass does three
// levels at once (radix 8) where there are 32 registers, two (radix 4) elsewhere; the root may be of radix 2 or 3 to
// reach H = 2^m and 3 * 2^m.
//
// The tree is walked depth first, transform, product and inverse together: a subtree that fits in L1 or L2 goes through
// all its passes before the next one is touched. At the leaves the last pass, the product and the first pass of the
// inverse are one, in registers.
//
// Nothing is divided by H: the caller scales one factor by 1 / H.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/complex.h"
#include "core/simd.h"
#include "core/slots.h"

namespace megalodon {

// Points of the transform for L steps: the least 2^m >= 16 or 3 * 2^m >= 24 that is at least L.
constexpr int64_t fft_points(int64_t L) {
  int64_t H = 16;
  while (H < L) H = H % 3 == 0 ? H / 3 * 4 : H / 2 * 3;
  return H;
}

// Bytes of a transformed array of one channel group, and of the constants.
constexpr int64_t fft_array_bytes(int64_t H) { return 2 * H * kMaxVectorBytes; }
constexpr int64_t fft_table_bytes(int64_t H, DType stat) { return aligned_bytes((2 * H + 16) * size_of(stat)); }

namespace cpu::MEGALODON_ISA {

constexpr int kFftRadix = kVectorBytes == 64 ? 8 : 4;

// The butterflies must be inlined whole, or their points go through memory.
#define MEGALODON_BUTTERFLY __attribute__((always_inline)) inline void

// ---- butterflies: z becomes what the children of its node hold; w are the node's constants as re, im pairs ----

// (a, b) -> (a + c b, a - c b), or with i c for c.
template <bool kTimesI, class A>
MEGALODON_BUTTERFLY split(Complex<Vec<A>>& a, Complex<Vec<A>>& b, const A* c) {
  const Vec<A> re = b.re * c[0] - b.im * c[1];
  const Vec<A> im = b.re * c[1] + b.im * c[0];
  if constexpr (kTimesI) {
    b = {a.re + im, a.im - re};
    a = {a.re - im, a.im + re};
  } else {
    b = {a.re - re, a.im - im};
    a = {a.re + re, a.im + im};
  }
}

// Twice the inverse of split.
template <bool kTimesI, class A>
MEGALODON_BUTTERFLY join(Complex<Vec<A>>& a, Complex<Vec<A>>& b, const A* c) {
  const Vec<A> re = a.re - b.re;
  const Vec<A> im = a.im - b.im;
  a = {a.re + b.re, a.im + b.im};
  if constexpr (kTimesI) {
    b = {im * c[0] - re * c[1], -(re * c[0] + im * c[1])};
  } else {
    b = {re * c[0] + im * c[1], im * c[0] - re * c[1]};
  }
}

// The levels below the first, which differs at the root.
template <int kRadix, class A>
MEGALODON_BUTTERFLY split_rest(Complex<Vec<A>>* z, const A* w) {
  if constexpr (kRadix >= 4) {
    constexpr int q = kRadix / 4;
    for (int i = 0; i < q; ++i) split<false>(z[i], z[q + i], w + 2);
    for (int i = 0; i < q; ++i) split<true>(z[2 * q + i], z[3 * q + i], w + 2);
  }
  if constexpr (kRadix == 8) {
    split<false>(z[0], z[1], w + 4);
    split<true>(z[2], z[3], w + 4);
    split<false>(z[4], z[5], w + 6);
    split<true>(z[6], z[7], w + 6);
  }
}

template <int kRadix, class A>
MEGALODON_BUTTERFLY join_rest(Complex<Vec<A>>* z, const A* w) {
  if constexpr (kRadix == 8) {
    join<false>(z[0], z[1], w + 4);
    join<true>(z[2], z[3], w + 4);
    join<false>(z[4], z[5], w + 6);
    join<true>(z[6], z[7], w + 6);
  }
  if constexpr (kRadix >= 4) {
    constexpr int q = kRadix / 4;
    for (int i = 0; i < q; ++i) join<false>(z[i], z[q + i], w + 2);
    for (int i = 0; i < q; ++i) join<true>(z[2 * q + i], z[3 * q + i], w + 2);
  }
}

template <int kRadix, class A>
MEGALODON_BUTTERFLY split_all(Complex<Vec<A>>* z, const A* w) {
  for (int i = 0; i < kRadix / 2; ++i) split<false>(z[i], z[kRadix / 2 + i], w);
  split_rest<kRadix>(z, w);
}

template <int kRadix, class A>
MEGALODON_BUTTERFLY join_all(Complex<Vec<A>>* z, const A* w) {
  join_rest<kRadix>(z, w);
  for (int i = 0; i < kRadix / 2; ++i) join<false>(z[i], z[kRadix / 2 + i], w);
}

// At the root, from real values: x holds them, z is written.
template <int kRadix, class A>
MEGALODON_BUTTERFLY split_root(const Vec<A>* x, Complex<Vec<A>>* z, const A* w) {
  if constexpr (kRadix == 3) {  // x0 + c u x1 + c^2 u^2 x2 for the three cube roots u of 1
    for (int i = 0; i < 3; ++i) {
      z[i].re = x[0] + x[1] * w[4 * i] + x[2] * w[4 * i + 2];
      z[i].im = x[1] * w[4 * i + 1] + x[2] * w[4 * i + 3];
    }
  } else {
    constexpr int h = kRadix / 2;
    for (int i = 0; i < h; ++i) {
      const Vec<A> re = x[h + i] * w[0];
      const Vec<A> im = x[h + i] * w[1];
      z[i] = {x[i] + re, im};
      z[h + i] = {x[i] - re, -im};
    }
    split_rest<kRadix>(z, w);
  }
}

// At the root, the real parts of the inverse.
template <int kRadix, class A>
MEGALODON_BUTTERFLY join_root(Complex<Vec<A>>* z, Vec<A>* x, const A* w) {
  if constexpr (kRadix == 3) {
    x[0] = z[0].re + z[1].re + z[2].re;
    x[1] = z[0].re * w[0] + z[0].im * w[1] + z[1].re * w[4] + z[1].im * w[5] + z[2].re * w[8] + z[2].im * w[9];
    x[2] = z[0].re * w[2] + z[0].im * w[3] + z[1].re * w[6] + z[1].im * w[7] + z[2].re * w[10] + z[2].im * w[11];
  } else {
    constexpr int h = kRadix / 2;
    join_rest<kRadix>(z, w);
    for (int i = 0; i < h; ++i) {
      x[i] = z[i].re + z[h + i].re;
      x[h + i] = (z[i].re - z[h + i].re) * w[0] + (z[i].im - z[h + i].im) * w[1];
    }
  }
}

// ---- the tree ----

template <class A>
class Fft {
 public:
  static constexpr int kMaxPasses = 34;

  // The passes for H points; `table` (fft_table_bytes) holds the constants, which fill() writes once.
  Fft(int64_t H, char* table) : table_(reinterpret_cast<A*>(table)), H_(H) {
    int64_t rest = H;
    if (H % 3 == 0) {
      radix_[passes_++] = 3;
      rest = H / 3;
    }
    int log = 0;
    while ((int64_t{1} << log) < rest) ++log;
    constexpr int kLog = kFftRadix == 8 ? 3 : 2;
    if (log % kLog != 0) radix_[passes_++] = 1 << log % kLog;
    for (int i = 0; i < log / kLog; ++i) radix_[passes_++] = kFftRadix;
    int64_t size = H, offset = 0;
    for (int i = 0; i < passes_; ++i) {
      size_[i] = size;
      offset_[i] = offset;
      offset += H / size * constants(radix_[i]);
      size /= radix_[i];
    }
  }

  int64_t points() const { return H_; }

  void fill() const {
    for (int pass = 0; pass < passes_; ++pass) {
      const int64_t nodes = H_ / size_[pass];
      const int n = constants(radix_[pass]);
      for (int64_t p = 0; p < nodes; ++p) fill_node(radix_[pass], turns(pass, p), table_ + offset_[pass] + p * n);
    }
  }

  // The root pass: z from the real values load(t), t < L and 0 for the others, and store(t, value), t < L, of the real
  // parts of its inverse.
  template <class Load>
  void root(Vec<A>* z, int64_t L, Load&& load) const {
    root_steps(L, [&](auto radix, auto all, int64_t j) {
      constexpr int R = decltype(radix)::value;
      const int64_t h = H_ / R;
      Vec<A> x[R];
      Complex<Vec<A>> out[R];
      for (int m = 0; m < R; ++m) x[m] = all.value || j + m * h < L ? load(j + m * h) : Vec<A>{};
      split_root<R>(x, out, table_);
      for (int m = 0; m < R; ++m) put(z + 2 * (j + m * h), out[m]);
    });
  }
  template <class Store>
  void root_inverse(const Vec<A>* z, int64_t L, Store&& store) const {
    root_steps(L, [&](auto radix, auto all, int64_t j) {
      constexpr int R = decltype(radix)::value;
      const int64_t h = H_ / R;
      Vec<A> x[R];
      Complex<Vec<A>> in[R];
      for (int m = 0; m < R; ++m) in[m] = get(z + 2 * (j + m * h));
      join_root<R>(in, x, table_);
      for (int m = 0; m < R; ++m) {
        if (all.value || j + m * h < L) store(j + m * h, x[m]);
      }
    });
  }

  // All passes but the root's. forward: k becomes its transform. multiply: x becomes the inverse of x k, k transformed.
  // inverse: s becomes its inverse.
  void forward(Vec<A>* k) const {
    walk<1, 0>({k}, [&](int64_t p, const A* w) { split_leaf(k + p, w); });
  }
  void multiply(Vec<A>* x, const Vec<A>* k) const {
    walk<1, 1>({x}, [&](int64_t p, const A* w) {
      Complex<Vec<A>> z[R];
      for (int m = 0; m < R; ++m) z[m] = get(x + p + 2 * m);
      split_all<R>(z, w);
      for (int m = 0; m < R; ++m) z[m] = z[m] * get(k + p + 2 * m);
      join_all<R>(z, w);
      for (int m = 0; m < R; ++m) put(x + p + 2 * m, z[m]);
    });
  }
  void inverse(Vec<A>* s) const {
    walk<0, 1>({s}, [&](int64_t p, const A* w) {
      Complex<Vec<A>> z[R];
      for (int m = 0; m < R; ++m) z[m] = get(s + p + 2 * m);
      join_all<R>(z, w);
      for (int m = 0; m < R; ++m) put(s + p + 2 * m, z[m]);
    });
  }
  // s += the transform of x times that of r; r becomes the inverse of r k, with k and s transformed. x is used up.
  void multiply_both(Vec<A>* r, Vec<A>* x, const Vec<A>* k, Vec<A>* s) const {
    walk<2, 1>({r, x}, [&](int64_t p, const A* w) {
      split_leaf(x + p, w);
      Complex<Vec<A>> z[R];
      for (int m = 0; m < R; ++m) z[m] = get(r + p + 2 * m);
      split_all<R>(z, w);
      for (int m = 0; m < R; ++m) {
        const Complex<Vec<A>> both = z[m] * get(x + p + 2 * m);
        const Complex<Vec<A>> sum = get(s + p + 2 * m);
        put(s + p + 2 * m, sum + both);
        z[m] = z[m] * get(k + p + 2 * m);
      }
      join_all<R>(z, w);
      for (int m = 0; m < R; ++m) put(r + p + 2 * m, z[m]);
    });
  }

 private:
  static constexpr int R = kFftRadix;

  static constexpr int constants(int radix) { return radix == 3 ? 12 : radix == 8 ? 8 : radix; }

  static Complex<Vec<A>> get(const Vec<A>* z) { return {z[0], z[1]}; }
  static void put(Vec<A>* z, Complex<Vec<A>> value) {
    z[0] = value.re;
    z[1] = value.im;
  }
  static MEGALODON_BUTTERFLY split_leaf(Vec<A>* z, const A* w) {
    Complex<Vec<A>> v[R];
    for (int m = 0; m < R; ++m) v[m] = get(z + 2 * m);
    split_all<R>(v, w);
    for (int m = 0; m < R; ++m) put(z + 2 * m, v[m]);
  }

  // The node's modulus is t^size - e^(2 pi i turns): 1/4 at the root, and from a node to its child m by the digits of
  // m.
  double turns(int pass, int64_t p) const {
    double turns = 0.25;
    for (int i = 0; i < pass; ++i) {
      const int64_t below = size_[i] / size_[pass] / radix_[i];
      const int64_t child = p / below % radix_[i];
      if (radix_[i] == 3) {
        turns = (turns + static_cast<double>(child)) / 3;
        continue;
      }
      for (int bit = radix_[i] / 2; bit > 0; bit /= 2) turns = (turns + ((child & bit) != 0 ? 1 : 0)) / 2;
    }
    return turns;
  }

  // The square roots c1, c2 = sqrt(c1), c3 = sqrt(c2) of the levels, and c3 e^(i pi/4) for the right half of the third.
  static void fill_node(int radix, double turns, A* w) {
    constexpr double kTwoPi = 6.283185307179586476925;
    if (radix == 3) {
      for (int i = 0; i < 3; ++i) {
        const double angle = kTwoPi * (turns + i) / 3;
        for (int power = 1; power <= 2; ++power) {
          w[4 * i + 2 * power - 2] = static_cast<A>(std::cos(power * angle));
          w[4 * i + 2 * power - 1] = static_cast<A>(std::sin(power * angle));
        }
      }
      return;
    }
    double re = std::cos(kTwoPi * turns / radix);
    double im = std::sin(kTwoPi * turns / radix);
    if (radix == 8) {
      constexpr double kHalf = 0.70710678118654752440;
      w[6] = static_cast<A>(kHalf * (re - im));
      w[7] = static_cast<A>(kHalf * (re + im));
    }
    for (int i = radix == 8 ? 4 : radix == 4 ? 2 : 0; i >= 0; i -= 2) {
      w[i] = static_cast<A>(re);
      w[i + 1] = static_cast<A>(im);
      const double square = re * re - im * im;
      im = 2 * re * im;
      re = square;
    }
  }

  // Calls step(radix, all, j) for the butterflies of the root; `all` where all their points are below L.
  template <class Step>
  void root_steps(int64_t L, Step&& step) const {
    const auto run = [&](auto radix) {
      const int64_t h = H_ / radix.value;
      const int64_t all = L - (radix.value - 1) * h;
      int64_t j = 0;
      for (; j < all; ++j) step(radix, std::true_type{}, j);
      for (; j < h; ++j) step(radix, std::false_type{}, j);
    };
    switch (radix_[0]) {
      case 2:
        return run(std::integral_constant<int, 2>{});
      case 3:
        return run(std::integral_constant<int, 3>{});
      case 4:
        return run(std::integral_constant<int, 4>{});
      default:
        return run(std::integral_constant<int, R>{});
    }
  }

  template <int kRadix, bool kInverse>
  static void pass_of(Vec<A>* z, int64_t h, const A* w) {
    for (int64_t j = 0; j < h; ++j) {
      Complex<Vec<A>> v[kRadix];
      for (int m = 0; m < kRadix; ++m) v[m] = get(z + 2 * (j + m * h));
      if constexpr (kInverse) {
        join_all<kRadix>(v, w);
      } else {
        split_all<kRadix>(v, w);
      }
      for (int m = 0; m < kRadix; ++m) put(z + 2 * (j + m * h), v[m]);
    }
  }
  template <bool kInverse>
  static void pass(int radix, Vec<A>* z, int64_t h, const A* w) {
    if (radix == R) return pass_of<R, kInverse>(z, h, w);
    if (radix == 4) return pass_of<4, kInverse>(z, h, w);
    pass_of<2, kInverse>(z, h, w);
  }

  template <int kForward, int kInverse>
  struct Arrays {
    Vec<A>* z[kForward > kInverse ? kForward : kInverse];
  };
  // leaf(p, w): the offset of the leaf's points in the arrays and its constants.
  template <int kForward, int kInverse, class Leaf>
  void walk(Arrays<kForward, kInverse> arrays, Leaf&& leaf) const {
    const int64_t h = H_ / radix_[0];
    for (int m = 0; m < radix_[0]; ++m) node<kForward, kInverse>(arrays, 1, m * h, leaf);
  }
  template <int kForward, int kInverse, class Leaf>
  void node(const Arrays<kForward, kInverse>& arrays, int p, int64_t begin, Leaf&& leaf) const {
    const int64_t size = size_[p];
    const A* w = table_ + offset_[p] + begin / size * constants(radix_[p]);
    if (p == passes_ - 1) return leaf(2 * begin, w);
    const int radix = radix_[p];
    const int64_t h = size / radix;
    for (int i = 0; i < kForward; ++i) pass<false>(radix, arrays.z[i] + 2 * begin, h, w);
    if (p == passes_ - 2) {
      const A* next = table_ + offset_[p + 1] + begin / R * constants(R);
      for (int m = 0; m < radix; ++m) leaf(2 * (begin + m * R), next + m * constants(R));
    } else {
      for (int m = 0; m < radix; ++m) node<kForward, kInverse>(arrays, p + 1, begin + m * h, leaf);
    }
    for (int i = 0; i < kInverse; ++i) pass<true>(radix, arrays.z[i] + 2 * begin, h, w);
  }

  A* table_;
  int64_t H_;
  int passes_ = 0;
  int radix_[kMaxPasses];
  int64_t size_[kMaxPasses];
  int64_t offset_[kMaxPasses];
};

#undef MEGALODON_BUTTERFLY

}  // namespace cpu::MEGALODON_ISA
}  // namespace megalodon
