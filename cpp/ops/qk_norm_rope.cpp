// qk_norm_rope on the CPU.
//
// Computes  queries and keys from the shared z, and the gradients (ops/qk_norm_rope.h); arXiv 2404.08801.
// Layout    z, q, k (tokens, H, S); gamma, beta (2, H, S); rstd (tokens, H); a token is of a row or a packed segment.
// Mapping   fixed parts of the tokens are split over the threads. Cosines and sines of a token are made once for all
//           heads (qk_norm_rope_rotation.h); a vector of pairs is worked on as two vectors of interleaved components.
//           Forward takes the sums of heads ahead, backward works on several short ones together (core/rows.h). Outputs
//           larger than the caches go past them (core/past.h).
// Traffic   forward 3, backward 4 elements moved per element of z, about 20 and 40 FLOPs: memory-bound.
// Numerics  angles in double: exact at every kExactEvery-th token, between them one complex multiplication per kTurn
//           tokens, whose error stays below 1e-14 (in float, 1e-5, where z has 16 bits), and one in the type of the
//           sums for each token. dgamma, dbeta: a partial sum per part, added in order.
// Limits    S must be even; any B, L, H, chunk_size, position and lengths of segments.
#include "ops/qk_norm_rope.h"

#include <cmath>

#include "core/past.h"
#include "core/rows.h"
#include "ops/qk_norm_rope_rotation.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// The bytes of heads that backward works on together: a few, lest reads and writes no longer go in turns (AMD Zen 4,
// November 2026: more are slower where memory binds).
constexpr int64_t kBytesBackward = 2048;

// The sum of squares of a head of S components, lane by lane. Two vectors at a time, as the outputs that it is taken
// between, so that it is the same to the bit for the first heads of a part, of which it is taken alone.
template <class A>
struct Squares {
  Vec<A> sums[2] = {};

  void add(const Pair<A>& u) {
    for (int m = 0; m < 2; ++m) sums[m] += u.v[m] * u.v[m];
  }
  template <class T>
  void add_rest(const T* z, int64_t i, int64_t S) {
    for (; i < S; i += kLanes<A>) {
      const Vec<A> u = load(z + i, S - i);
      sums[0] += u * u;
    }
  }
  Vec<A> sum() const { return sums[0] + sums[1]; }
};

// One token and head of forward: q and k of z, whose normalised components are z * scale; past the caches, if so.
// Gives the sum of squares of the head `ahead`.
template <class T, class A>
__attribute__((always_inline)) inline Vec<A> forward_head(const QkNormRopeForward& args, int64_t at, int64_t h,
                                                          const A* turns, A scale, bool past, const T* ahead) {
  constexpr int64_t W = kLanes<A>;
  const int64_t S = args.S, D = args.H * S;
  const T* z = static_cast<const T*>(args.z) + at;
  T* q = static_cast<T*>(args.q) + at;
  T* k = static_cast<T*>(args.k) + at;
  const A *gq = static_cast<const A*>(args.gamma) + h * S, *gk = gq + D;
  const A *bq = static_cast<const A*>(args.beta) + h * S, *bk = bq + D;
  Squares<A> squares;
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) {
    const Turn<A> turn(turns + i);
    const Pair<A> u = load_pair(z + i);
    Pair<A> uq, uk;
    for (int m = 0; m < 2; ++m) {
      const int64_t j = i + m * W;
      const Vec<A> zn = u.v[m] * scale;
      uq.v[m] = turn.forth(m, zn * load(gq + j) + (zn + load(bq + j)));
      uk.v[m] = turn.forth(m, zn * load(gk + j) + (zn + load(bk + j)));
    }
    put_pair(q + i, uq, past);
    put_pair(k + i, uk, past);
    squares.add(load_pair(ahead + i));
  }
  squares.add_rest(ahead, i, S);
  for_rest(i, S, turns, [&](int64_t j, int64_t n, const Turn<A>& turn, int half) __attribute__((always_inline)) {
    const Vec<A> zn = load(z + j, n) * scale;
    store(q + j, turn.forth(half, zn * load(gq + j, n) + (zn + load(bq + j, n))), n);
    store(k + j, turn.forth(half, zn * load(gk + j, n) + (zn + load(bk + j, n))), n);
  });
  return squares.sum();
}

// The heads of a part. While the outputs of one are made, the squares of the second next are summed, and the root and
// the division of the next are taken.
template <class T, class A>
void forward_part(const QkNormRopeForward& args, int64_t part, A norm, bool past, Rotation<T>& rotation) {
  const int64_t S = args.S;
  int64_t token = args.parts.begin(part), h = 0;
  const int64_t first = token * args.H, last = args.parts.end(part) * args.H;
  if (first == last) return;
  const auto head = [&](int64_t r) {  // beyond the last, which is not asked for, the last
    return static_cast<const T*>(args.z) + std::min(r, last - 1) * S;
  };
  const auto sum = [&](const T* z) {
    Squares<A> squares;
    int64_t i = 0;
    for (; i + 2 * kLanes<A> <= S; i += 2 * kLanes<A>) squares.add(load_pair(z + i));
    squares.add_rest(z, i, S);
    return squares.sum();
  };
  const auto scale_of = [&](int64_t r, Vec<A> squares) {
    const A rstd = A(1) / std::sqrt(sum_lanes<A>(squares) / static_cast<A>(S) + static_cast<A>(args.eps));
    if (r < last) static_cast<A*>(args.rstd)[r] = rstd;
    return rstd * norm;
  };
  A scale = scale_of(first, sum(head(first)));
  Vec<A> squares = sum(head(first + 1));
  for (int64_t r = first; r < last; ++r) {
    if (h == 0) rotation.move_to(token);
    const A next = scale_of(r + 1, squares);
    squares = forward_head<T, A>(args, r * S, h, rotation.now(), scale, past, head(r + 2));
    if (++h == args.H) h = 0, ++token;
    scale = next;
  }
}

template <class T>
void forward(const QkNormRopeForward& args) {
  using A = stat_t<T>;
  const int64_t S = args.S;
  const Steps<A> steps(args);
  const A norm = A(1) / std::sqrt(static_cast<A>(S));
  const int64_t count = 2 * args.sequences.tokens() * args.H * S;
  const bool past =
      leaves_caches(count, S, static_cast<T*>(args.q)) && leaves_caches(count, S, static_cast<T*>(args.k));

  parallel_for(args.parts.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Rotation<T> rotation(args, steps, part);
      forward_part<T, A>(args, part, norm, past, rotation);
    }
    if (past) finish_puts();
  });
}

// One token and head of backward, first walk: adds to sums [4, H S] (dgamma, then dbeta), fills dzn, and gives the sum
// of dzn * zn.
template <class T, class A>
__attribute__((always_inline)) inline Vecs<A, 1> backward_sum(const QkNormRopeBackward& args, int64_t at, int64_t h,
                                                              const A* turns, A rstd, A norm, A* sums, A* dzn) {
  constexpr int64_t W = kLanes<A>;
  const int64_t S = args.S, D = args.H * S;
  const T* z = static_cast<const T*>(args.z) + at;
  const T* dq = static_cast<const T*>(args.dq) + at;
  const T* dk = static_cast<const T*>(args.dk) + at;
  const A *gq = static_cast<const A*>(args.gamma) + h * S, *gk = gq + D;
  A *dgq = sums + h * S, *dgk = dgq + D, *dbq = dgk + D, *dbk = dbq + D;
  Vec<A> dot = {};
  // What is turned back, uq and uk, and the normalised zn: adds to the sums; gives dzn. The sums are loaded before they
  // are stored: that their places are alike, D being a multiple of 1024, costs time.
  const auto add = [&](int64_t i, int64_t n, Vec<A> uq, Vec<A> uk, Vec<A> zn) __attribute__((always_inline)) {
    const Vec<A> to[4] = {load(dbq + i, n), load(dbk + i, n), load(dgq + i, n), load(dgk + i, n)};
    const Vec<A> scaled = zn * norm;
    const Vec<A> d = ((uq * load(gq + i, n) + uq) + (uk * load(gk + i, n) + uk)) * norm;
    store(dbq + i, to[0] + uq, n);
    store(dbk + i, to[1] + uk, n);
    store(dgq + i, uq * scaled + to[2], n);
    store(dgk + i, uk * scaled + to[3], n);
    store(dzn + i, d, n);
    dot = d * zn + dot;
  };
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) {
    const Turn<A> turn(turns + i);
    const Pair<A> gq_turned = load_pair(dq + i), gk_turned = load_pair(dk + i), u = load_pair(z + i);
    for (int m = 0; m < 2; ++m) {
      add(i + m * W, W, turn.back(m, gq_turned.v[m]), turn.back(m, gk_turned.v[m]), u.v[m] * rstd);
    }
  }
  for_rest(i, S, turns, [&](int64_t j, int64_t n, const Turn<A>& turn, int half) __attribute__((always_inline)) {
    add(j, n, turn.back(half, load(dq + j, n)), turn.back(half, load(dk + j, n)), load(z + j, n) * rstd);
  });
  return {{dot}};
}

// The second: dz.
template <class T, class A>
__attribute__((always_inline)) inline void backward_row(const T* z, const A* dzn, A rstd, A slope, int64_t S, T* dz,
                                                        bool past) {
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * W <= S; i += 2 * W) {
    Pair<A> u = load_pair(z + i);
    for (int m = 0; m < 2; ++m) u.v[m] = (load(dzn + i + m * W) - u.v[m] * slope) * rstd;
    put_pair(dz + i, u, past);
  }
  for (; i < S; i += W) {
    const int64_t n = S - i;
    store(dz + i, (load(dzn + i, n) - load(z + i, n) * slope) * rstd, n);
  }
}

template <class T>
void backward(const QkNormRopeBackward& args) {
  using A = stat_t<T>;
  const int64_t S = args.S, D = args.H * S, parts = args.parts.parts;
  const A norm = A(1) / std::sqrt(static_cast<A>(S));
  auto* partial = reinterpret_cast<A*>(args.scratch(parts));
  A* dzn = partial + parts * 4 * D;
  static_assert(kRowsTogether<A> <= QkNormRopeBackward::kMostRows);
  const bool past = leaves_caches(args.sequences.tokens() * D, S, static_cast<T*>(args.dz));
  const Steps<A> steps(args);

  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Rotation<T> rotation(args, steps, part);
      A* sums = partial + part * 4 * D;
      std::memset(sums, 0, 4 * D * sizeof(A));
      A* dzns = dzn + part * kRowsTogether<A> * 2 * args.pairs;
      int64_t token = args.parts.begin(part), h = 0;
      const int64_t first = token * args.H, last = args.parts.end(part) * args.H;
      for_rows<A>(first, last, 3 * S * sizeof(T) + S * sizeof(A), kBytesBackward,
                  [&](int64_t r, auto rows) __attribute__((always_inline)) {
                    const A* rstd = static_cast<const A*>(args.rstd) + r;
                    const Vecs<A, 1> dots = sum_rows<A, 1>(rows, [&](int64_t k) __attribute__((always_inline)) {
                      if (h == 0) rotation.move_to(token);
                      const Vecs<A, 1> dot = backward_sum<T, A>(args, (r + k) * S, h, rotation.now(), rstd[k], norm,
                                                                sums, dzns + k * 2 * args.pairs);
                      if (++h == args.H) h = 0, ++token;
                      return dot;
                    });
                    A means[kLanes<A>];
                    store(means, dots.v[0] / static_cast<A>(S));
                    for (int64_t k = 0; k < rows; ++k) {
                      const int64_t at = (r + k) * S;
                      backward_row<T, A>(static_cast<const T*>(args.z) + at, dzns + k * 2 * args.pairs, rstd[k],
                                         rstd[k] * means[k], S, static_cast<T*>(args.dz) + at, past);
                    }
                  });
    }
    if (past) finish_puts();
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
    c.not_negative("position", args.position, args.sequences.count);
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
    c.not_negative("position", args.position, args.sequences.count);
    run_on(c, args, cpu::qk_norm_rope_backward, cuda::qk_norm_rope_backward, stream);
  });
}
#endif
