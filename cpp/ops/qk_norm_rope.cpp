// qk_norm_rope on the CPU.
//
// Computes  queries and keys from the shared z, and the gradients (ops/qk_norm_rope.h); arXiv 2404.08801.
// Layout    z, q, k (B, L, H, S); gamma, beta (2, H, S); rstd (B, L, H).
// Mapping   fixed parts of the tokens are split over the threads. Cosines and sines of a token are made once for all
//           heads; a vector of pairs is worked on as two vectors of interleaved components.
// Traffic   forward 3, backward 4 elements moved per element of z, about 20 and 40 FLOPs: memory-bound.
// Numerics  angles in double: exact at every kExactEvery-th token, between them one complex multiplication per token,
//           whose error stays below 1e-14. dgamma, dbeta: a partial sum per part, added in order.
// Limits    S must be even; any B, L, H, chunk_size and position.
#include "ops/qk_norm_rope.h"

#include <cmath>

#include "core/rows.h"
#include "core/trig.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kExactEvery = 64;

// The tables that all parts share: the angle of each pair per position, and its cosine and sine.
void make_steps(const QkNormRope& args, double* table) {
  constexpr int64_t W = kLanes<double>;
  const double rate = -2.0 / static_cast<double>(args.S) * std::log(args.rope_base);
  for (int64_t j = 0; j < args.pairs; j += W) {
    Vec<double> pair;
    for (int64_t i = 0; i < W; ++i) pair[i] = static_cast<double>(j + i);
    const Vec<double> angle = exp(pair * rate);
    Vec<double> sine, cosine;
    sin_cos(angle, sine, cosine);
    store(table + j, angle);
    store(table + args.pairs + j, cosine);
    store(table + 2 * args.pairs + j, sine);
  }
}

// The cosines and sines of one token after another.
template <class A>
class Rotation {
 public:
  Rotation(const QkNormRope& args, const double* table, double* scratch)
      : args_(args),
        table_(table),
        cosine_(scratch),
        sine_(scratch + args.pairs),
        cosines_(reinterpret_cast<A*>(scratch + 2 * args.pairs)),
        sines_(reinterpret_cast<A*>(scratch + 3 * args.pairs)) {}

  const A* cosines() const { return cosines_; }
  const A* sines() const { return sines_; }

  // To token bt, which follows the one before.
  void move_to(int64_t bt) {
    const int64_t b = bt / args_.L, t = bt % args_.L, C = args_.C;
    const int64_t start = args_.position == nullptr ? 0 : args_.position[b] % C;
    const int64_t place = (start + t % C) % C;
    const bool exact = since_ == 0 || t == 0 || place == 0;
    since_ = exact ? kExactEvery : since_;
    --since_;
    constexpr int64_t W = kLanes<double>;
    for (int64_t j = 0; j < args_.pairs; j += W) {
      Vec<double> c, s;
      if (exact) {
        sin_cos(load(table_ + j) * static_cast<double>(place), s, c);
      } else {
        const Vec<double> c0 = load(cosine_ + j), s0 = load(sine_ + j);
        const Vec<double> c1 = load(table_ + args_.pairs + j), s1 = load(table_ + 2 * args_.pairs + j);
        c = c0 * c1 - s0 * s1;
        s = s0 * c1 + c0 * s1;
      }
      store(cosine_ + j, c);
      store(sine_ + j, s);
      for (int64_t i = 0; i < W; ++i) cosines_[j + i] = static_cast<A>(c[i]);
      for (int64_t i = 0; i < W; ++i) sines_[j + i] = static_cast<A>(s[i]);
    }
  }

 private:
  const QkNormRope& args_;
  const double* table_;
  double *cosine_, *sine_;
  A *cosines_, *sines_;
  int64_t since_ = 0;  // tokens until the next exact one
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
  Vec<A> cosine[2], sine[2];  // sine: -, + alternating

  Turn(const A* cosines, const A* sines) {
    constexpr auto kSequence = std::make_integer_sequence<int, kLanes<A>>{};
    Vec<A> sign;
    for (int i = 0; i < kLanes<A>; ++i) sign[i] = i % 2 == 0 ? A(-1) : A(1);
    const Vec<A> c = load(cosines), s = load(sines);
    cosine[0] = repeat_half<A, 0>(c, kSequence);
    cosine[1] = repeat_half<A, 1>(c, kSequence);
    sine[0] = repeat_half<A, 0>(s, kSequence) * sign;
    sine[1] = repeat_half<A, 1>(s, kSequence) * sign;
  }
  Vec<A> forth(int half, Vec<A> u) const { return u * cosine[half] + swap(u) * sine[half]; }
  Vec<A> back(int half, Vec<A> u) const { return u * cosine[half] - swap(u) * sine[half]; }
  static Vec<A> swap(Vec<A> u) { return swap_pairs<A>(u, std::make_integer_sequence<int, kLanes<A>>{}); }
};

// Calls body(i, n, turn, half) for the vectors of a head: n elements from i on, of which turn's `half` turns the pairs.
template <class A, class Body>
inline void for_pairs(int64_t S, const Rotation<A>& rotation, Body&& body) {
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) {
    const Turn<A> turn(rotation.cosines() + i / 2, rotation.sines() + i / 2);
    body(i, W, turn, 0);
    body(i + W, W, turn, 1);
  }
  if (i < S) {
    const Turn<A> turn(rotation.cosines() + i / 2, rotation.sines() + i / 2);
    body(i, S - i, turn, 0);
    if (i + W < S) body(i + W, S - i - W, turn, 1);
  }
}

template <class T, class A>
inline A sum_of_squares(const T* z, int64_t S) {
  constexpr int64_t W = kLanes<A>;
  Vec<A> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) {
    const Vec<A> u = load(z + i), v = load(z + i + W);
    sums[0] = u * u + sums[0];
    sums[1] = v * v + sums[1];
  }
  for (; i < S; i += W) {
    const Vec<A> u = load(z + i, S - i);
    sums[0] = u * u + sums[0];
  }
  return sum_lanes<A>(sums[0] + sums[1]);
}

template <class T>
void forward(const QkNormRopeForward& args) {
  using A = stat_t<T>;
  const int64_t S = args.S, D = args.H * S;
  const auto* gamma = static_cast<const A*>(args.gamma);
  const auto* beta = static_cast<const A*>(args.beta);
  auto* table = static_cast<double*>(args.workspace);
  make_steps(args, table);
  const A norm = A(1) / std::sqrt(static_cast<A>(S));

  parallel_for(args.parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Rotation<A> rotation(args, table, table + (3 + 4 * part) * args.pairs);
      for (int64_t bt = args.parts.begin(part); bt < args.parts.end(part); ++bt) {
        rotation.move_to(bt);
        for (int64_t h = 0; h < args.H; ++h) {
          const T* z = static_cast<const T*>(args.z) + bt * D + h * S;
          T* q = static_cast<T*>(args.q) + bt * D + h * S;
          T* k = static_cast<T*>(args.k) + bt * D + h * S;
          const A mean = sum_of_squares<T, A>(z, S) / static_cast<A>(S);
          const A rstd = A(1) / std::sqrt(mean + static_cast<A>(args.eps));
          static_cast<A*>(args.rstd)[bt * args.H + h] = rstd;
          const A scale = rstd * norm;
          const A *gq = gamma + h * S, *gk = gq + D, *bq = beta + h * S, *bk = bq + D;
          for_pairs<A>(S, rotation, [&](int64_t i, int64_t n, const Turn<A>& turn, int half) {
            const Vec<A> zn = load(z + i, n) * scale;
            store(q + i, turn.forth(half, zn * load(gq + i, n) + zn + load(bq + i, n)), n);
            store(k + i, turn.forth(half, zn * load(gk + i, n) + zn + load(bk + i, n)), n);
          });
        }
      }
    }
  });
}

// One token and head of backward: adds to sums [4, H S] (dgamma, then dbeta) and fills dz.
template <class T, class A>
void backward_head(const QkNormRopeBackward& args, int64_t bt, int64_t h, const Rotation<A>& rotation, A* sums,
                   A* dzn) {
  constexpr int64_t W = kLanes<A>;
  const int64_t S = args.S, D = args.H * S, at = bt * D + h * S;
  const T* z = static_cast<const T*>(args.z) + at;
  const T* dq = static_cast<const T*>(args.dq) + at;
  const T* dk = static_cast<const T*>(args.dk) + at;
  const A *gq = static_cast<const A*>(args.gamma) + h * S, *gk = gq + D;
  const A rstd = static_cast<const A*>(args.rstd)[bt * args.H + h];
  const A norm = A(1) / std::sqrt(static_cast<A>(S));
  A *dgq = sums + h * S, *dgk = dgq + D, *dbq = dgk + D, *dbk = dbq + D;
  Vec<A> dot = {};
  for_pairs<A>(S, rotation, [&](int64_t i, int64_t n, const Turn<A>& turn, int half) __attribute__((always_inline)) {
    const Vec<A> uq = turn.back(half, load(dq + i, n)), uk = turn.back(half, load(dk + i, n));
    const Vec<A> zn = load(z + i, n) * rstd;
    store(dbq + i, load(dbq + i, n) + uq, n);
    store(dbk + i, load(dbk + i, n) + uk, n);
    const Vec<A> scaled = zn * norm;
    store(dgq + i, uq * scaled + load(dgq + i, n), n);
    store(dgk + i, uk * scaled + load(dgk + i, n), n);
    const Vec<A> d = ((uq * load(gq + i, n) + uq) + (uk * load(gk + i, n) + uk)) * norm;
    store(dzn + i, d, n);
    dot = d * zn + dot;
  });
  const A mean = sum_lanes<A>(dot) / static_cast<A>(S);
  T* dz = static_cast<T*>(args.dz) + at;
  for (int64_t i = 0; i < S; i += W) {
    const int64_t n = S - i;
    store(dz + i, (load(dzn + i, n) - load(z + i, n) * rstd * mean) * rstd, n);
  }
}

template <class T>
void backward(const QkNormRopeBackward& args) {
  using A = stat_t<T>;
  const int64_t D = args.H * args.S, parts = args.parts.parts;
  auto* table = static_cast<double*>(args.workspace);
  auto* partial = reinterpret_cast<A*>(table + (3 + 4 * parts) * args.pairs);
  A* dzn = partial + parts * 4 * D;
  make_steps(args, table);

  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Rotation<A> rotation(args, table, table + (3 + 4 * part) * args.pairs);
      A* sums = partial + part * 4 * D;
      std::memset(sums, 0, 4 * D * sizeof(A));
      for (int64_t bt = args.parts.begin(part); bt < args.parts.end(part); ++bt) {
        rotation.move_to(bt);
        for (int64_t h = 0; h < args.H; ++h) {
          backward_head<T, A>(args, bt, h, rotation, sums, dzn + part * 2 * args.pairs);
        }
      }
    }
  });
  // dgamma and dbeta are two outputs: two strided sums
  for (int64_t i = 0; i < 2 * D; i += kLanes<A>) {
    const int64_t n = 2 * D - i;
    Vec<A> dgamma = {}, dbeta = {};
    for (int64_t p = 0; p < parts; ++p) {
      dgamma += load(partial + p * 4 * D + i, n);
      dbeta += load(partial + p * 4 * D + 2 * D + i, n);
    }
    store(static_cast<A*>(args.dgamma) + i, dgamma, n);
    store(static_cast<A*>(args.dbeta) + i, dbeta, n);
  }
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_qk_norm_rope_forward_outputs(const DLTensor* z, const DLTensor* gamma, const DLTensor* beta,
                                                      int64_t num_heads, int64_t chunk_size, double rope_base,
                                                      const DLTensor* position, double eps, const DLTensor* cu_seqlens,
                                                      megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("qk_norm_rope");
    check_qk_norm_rope(c, z, gamma, beta, num_heads, chunk_size, rope_base, position, eps, cu_seqlens,
                       Outputs(outputs));
  });
}

extern "C" int megalodon_qk_norm_rope_forward(const DLTensor* z, const DLTensor* gamma, const DLTensor* beta,
                                              int64_t num_heads, int64_t chunk_size, double rope_base,
                                              const DLTensor* position, double eps, const DLTensor* cu_seqlens,
                                              DLTensor* q, DLTensor* k, DLTensor* rstd, DLTensor* workspace,
                                              void* stream) {
  return guarded([&] {
    Checker c("qk_norm_rope");
    const QkNormRopeForward args = check_qk_norm_rope(c, z, gamma, beta, num_heads, chunk_size, rope_base, position,
                                                      eps, cu_seqlens, {q, k, rstd, workspace});
    c.not_negative("position", args.position, args.B);
    run_on(c, args, cpu::qk_norm_rope_forward, cuda::qk_norm_rope_forward, stream);
  });
}

extern "C" int megalodon_qk_norm_rope_backward_outputs(const DLTensor* dq, const DLTensor* dk, const DLTensor* z,
                                                       const DLTensor* gamma, const DLTensor* beta,
                                                       const DLTensor* rstd, int64_t num_heads, int64_t chunk_size,
                                                       double rope_base, const DLTensor* position, double eps,
                                                       const DLTensor* cu_seqlens, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("qk_norm_rope_backward");
    check_qk_norm_rope_backward(c, dq, dk, z, gamma, beta, rstd, num_heads, chunk_size, rope_base, position, eps,
                                cu_seqlens, Outputs(outputs));
  });
}

extern "C" int megalodon_qk_norm_rope_backward(const DLTensor* dq, const DLTensor* dk, const DLTensor* z,
                                               const DLTensor* gamma, const DLTensor* beta, const DLTensor* rstd,
                                               int64_t num_heads, int64_t chunk_size, double rope_base,
                                               const DLTensor* position, double eps, const DLTensor* cu_seqlens,
                                               DLTensor* dz, DLTensor* dgamma, DLTensor* dbeta, DLTensor* workspace,
                                               void* stream) {
  return guarded([&] {
    Checker c("qk_norm_rope_backward");
    const QkNormRopeBackward args =
        check_qk_norm_rope_backward(c, dq, dk, z, gamma, beta, rstd, num_heads, chunk_size, rope_base, position, eps,
                                    cu_seqlens, {dz, dgamma, dbeta, workspace});
    c.not_negative("position", args.position, args.B);
    run_on(c, args, cpu::qk_norm_rope_backward, cuda::qk_norm_rope_backward, stream);
  });
}
#endif
