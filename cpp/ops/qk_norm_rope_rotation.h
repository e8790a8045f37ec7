// What turns the pairs of qk_norm_rope's tokens on the CPU, in both directions.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/elementary.h"
#include "core/simd.h"
#include "ops/qk_norm_rope.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int64_t kTurn = QkNormRope::kTurn;
constexpr int64_t kExactEvery = 64 * kTurn;  // tokens

// Cosines and sines of pairs lie in blocks of a vector of A each: its cosines, then its sines. That is what turns the
// two vectors of components at the same place of a head.
template <class A>
constexpr int64_t cosine_at(int64_t pair) {
  return pair + pair / kLanes<A> * kLanes<A>;
}

template <class A>
inline void store_rounded(A* p, Vec<double> v) {
  typedef A Rounded __attribute__((vector_size(kLanes<double> * sizeof(A))));
  const Rounded rounded = __builtin_convertvector(v, Rounded);
  std::memcpy(p, &rounded, sizeof rounded);
}

// What all parts share, in the workspace: the angle of each pair per position; the cosines and sines of kTurn times it;
// and, as A, those of k times it, 1 <= k <= kTurn.
template <class A>
class Steps {
 public:
  explicit Steps(const QkNormRope& args) : pairs_(args.pairs), table_(static_cast<double*>(args.workspace)) {
    constexpr int64_t W = kLanes<double>;
    const double rate = -2.0 / static_cast<double>(args.S) * std::log(args.rope_base);
    const int64_t most = std::min(args.sequences.tokens(), kTurn);  // others are not asked for
    for (int64_t j = 0; j < pairs_; j += W) {
      Vec<double> pair;
      for (int64_t i = 0; i < W; ++i) pair[i] = static_cast<double>(j + i);
      const Vec<double> angle = exp(pair * rate);
      Vec<double> sine, cosine, c = splat(1.0), s = {};
      sincos_of_any(angle, sine, cosine);
      const int64_t at = cosine_at<A>(j);
      for (int64_t k = 1; k <= most; ++k) {
        const Vec<double> before = c;
        c = before * cosine - s * sine;
        s = s * cosine + before * sine;
        store_rounded(row(k) + at, c);
        store_rounded(row(k) + at + kLanes<A>, s);
      }
      store(table_ + j, angle);
      store(table_ + pairs_ + at, c);
      store(table_ + pairs_ + at + kLanes<A>, s);
    }
  }

  const double* angle() const { return table_; }
  const double* turn() const { return table_ + pairs_; }
  const A* step(int64_t k) const { return row(k); }

 private:
  A* row(int64_t k) const { return reinterpret_cast<A*>(table_ + 3 * pairs_) + 2 * (k - 1) * pairs_; }

  int64_t pairs_;
  double* table_;
};

// Turns `from` by `by`, both cosines and sines in blocks for A; `out` may be one of them.
template <class A, class R>
inline void turn_rows(const R* from, const R* by, int64_t pairs, R* out) {
  for (int64_t block = 0; block < 2 * pairs; block += 2 * kLanes<A>) {
    for (int64_t j = block; j < block + kLanes<A>; j += kLanes<R>) {
      const Vec<R> c0 = load(from + j), s0 = load(from + j + kLanes<A>);
      const Vec<R> c1 = load(by + j), s1 = load(by + j + kLanes<A>);
      store(out + j, c0 * c1 - s0 * s1);
      store(out + j + kLanes<A>, s0 * c1 + c0 * s1);
    }
  }
}

// The cosines and sines of one token after another, for activations of type T. Those of the first of kTurn tokens are
// turned by all kTurn at once from those of the first before: in double, or for results of 16 bits in float, where 64
// turns add up to less than 1e-5. Those of the tokens between are one product away from the first.
template <class T>
class Rotation {
  using A = stat_t<T>;
  static constexpr bool kInFloat = sizeof(T) == 2;

 public:
  Rotation(const QkNormRope& args, const Steps<A>& steps, int64_t part)
      : args_(args),
        steps_(steps),
        exact_(args.scratch(part)),
        first_(reinterpret_cast<A*>(exact_ + 2 * args.pairs)),
        other_(reinterpret_cast<A*>(exact_ + 4 * args.pairs)) {}

  const A* now() const { return now_; }

  // To the token, which follows the one before.
  void move_to(int64_t token) {
    const bool enters = places_.is_beyond(token);
    if (enters) {
      place_ = places_.enter(args_, token);
    } else if (++place_ == args_.C) {
      place_ = 0;
    }
    now_ = first_;
    if (enters || place_ == 0 || ++since_ == kExactEvery) {
      since_ = 0;
      compute();
      round();
    } else if (since_ % kTurn != 0) {
      turn_rows<A>(first_, steps_.step(since_ % kTurn), args_.pairs, other_);
      now_ = other_;
    } else if constexpr (kInFloat) {
      turn_rows<A>(first_, steps_.step(kTurn), args_.pairs, first_);
    } else {
      turn_rows<A>(exact_, steps_.turn(), args_.pairs, exact_);
      round();
    }
  }

 private:
  void compute() {
    for (int64_t j = 0; j < args_.pairs; j += kLanes<double>) {
      Vec<double> c = splat(1.0), s = {};  // the angle is 0 where segments start, which may be short ones
      if (place_ != 0) sincos_of_any(load(steps_.angle() + j) * static_cast<double>(place_), s, c);
      store(exact_ + cosine_at<A>(j), c);
      store(exact_ + cosine_at<A>(j) + kLanes<A>, s);
    }
  }

  void round() {
    for (int64_t j = 0; j < 2 * args_.pairs; j += kLanes<double>) store_rounded(first_ + j, load(exact_ + j));
  }

  const QkNormRope& args_;
  const Steps<A>& steps_;
  double* exact_;
  A *first_, *other_;
  const A* now_ = nullptr;
  QkNormRopePlaces places_;
  int64_t place_ = 0;
  int64_t since_ = 0;  // tokens since those that were computed
};

template <class A, int... lane>
inline Vec<A> swap_pairs(Vec<A> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ 1)...);
}

template <class A, int kHalf, int... lane>
inline Vec<A> repeat_half(Vec<A> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (kHalf * kLanes<A> / 2 + lane / 2)...);
}

// How to turn the two vectors of interleaved components that belong to one vector of pairs.
template <class A>
struct Turn {
  Vec<A> cosine[2], sine[2];

  explicit Turn(const A* block) {
    constexpr auto kSequence = std::make_integer_sequence<int, kLanes<A>>{};
    const Vec<A> c = load(block), s = load(block + kLanes<A>);
    cosine[0] = repeat_half<A, 0>(c, kSequence);
    cosine[1] = repeat_half<A, 1>(c, kSequence);
    sine[0] = repeat_half<A, 0>(s, kSequence);
    sine[1] = repeat_half<A, 1>(s, kSequence);
  }
  Vec<A> forth(int half, Vec<A> u) const {
    return multiply_alternating<false, A>(u, cosine[half], swap(u) * sine[half]);
  }
  Vec<A> back(int half, Vec<A> u) const { return multiply_alternating<true, A>(u, cosine[half], swap(u) * sine[half]); }
  static Vec<A> swap(Vec<A> u) { return swap_pairs<A>(u, std::make_integer_sequence<int, kLanes<A>>{}); }
};

// Calls body(i, n, turn, half) for what is left of a head from i on: n elements from i on, of which turn's `half` turns
// the pairs.
template <class A, class Body>
__attribute__((always_inline)) inline void for_rest(int64_t i, int64_t S, const A* turns, const Body& body) {
  constexpr int64_t W = kLanes<A>;
  if (i >= S) return;
  const Turn<A> turn(turns + i);
  body(i, S - i, turn, 0);
  if (i + W < S) body(i + W, S - i - W, turn, 1);
}

}  // namespace megalodon::cpu::MEGALODON_ISA
