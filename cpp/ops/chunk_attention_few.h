// chunk_attention of a chunk of few keys, such as a short packed segment: row by row, without the panels of the tiles.
#pragma once

#include <cmath>

#include "ops/chunk_attention_rows.h"

namespace megalodon::cpu::MEGALODON_ISA {

template <class T>
class FewKeys {
  using A = stat_t<T>;
  static constexpr int64_t W = kLanes<A>;
  static constexpr int64_t kMost = kPerWord<factor_t<T>> == 2 ? 5 : 8;  // beyond, tiles are faster (AMD Zen 4)

 public:
  // Whether a chunk is one of these: no query of another chunk sees its keys, and its own see all before them. Such a
  // chunk is one item, since tiles have at least 32 queries or keys.
  static bool are(const ChunkAttention& args, const Chunk& chunk) {
    return chunk.keys <= kMost && chunk.keys <= args.C && chunk.end == chunk.keys && args.drop_below == 0;
  }

  FewKeys(const ChunkAttention& args, const Chunk& chunk)
      : args_(args),
        chunk_(chunk),
        queries_(rows_of<const T>(args, chunk, args.q, nullptr, args.S)),
        keys_(rows_of<const T>(args, chunk, args.k, args.k_cache, args.S)),
        values_(rows_of<const T>(args, chunk, args.v, args.v_cache, args.E)) {}

  void forward(const ChunkAttentionForward& args) const {
    const auto out = rows_of<T>(args, chunk_, args.o, nullptr, args.E);
    for (int64_t i = chunk_.first; i < chunk_.end; ++i) {
      A weights[kMost];
      scores_of(i, weights);
      A best = -std::numeric_limits<A>::infinity();
      for (int64_t j = 0; j <= i; ++j) best = weights[j] > best ? weights[j] : best;
      const A shift = std::isinf(best) && best < 0 ? A(0) : best;
      weigh(i, shift, weights);
      A sum = 0;
      for (int64_t j = 0; j <= i; ++j) sum += weights[j];
      static_cast<A*>(args.lse)[chunk_.statistic + i] = shift + std::log(sum);
      const A inverse = sum == 0 ? A(0) : 1 / sum;
      combine(values_, 0, i + 1, weights, 1, inverse, out.row(i), args.E);
    }
  }

  // sums D [B, H, L]; dq [B, L, H, S], the part of the chunk's first keys.
  void backward(const ChunkAttentionBackward& args, const A* sums, A* dq) const {
    const auto douts = rows_of<const T>(args, chunk_, args.dout, nullptr, args.E);
    const auto dk = rows_of<T>(args, chunk_, args.dk, args.dk_cache, args.S);
    const auto dv = rows_of<T>(args, chunk_, args.dv, args.dv_cache, args.E);
    A weights[kMost * kMost], dscores[kMost * kMost];  // [queries, keys]
    for (int64_t i = chunk_.first; i < chunk_.end; ++i) {
      A *w = weights + i * kMost, *ds = dscores + i * kMost;
      const A lse = static_cast<const A*>(args.lse)[chunk_.statistic + i],
              infinity = std::numeric_limits<A>::infinity();
      scores_of(i, w);
      weigh(i, lse == -infinity ? infinity : lse, w);
      for (int64_t j = 0; j <= i; ++j) {
        const A d = dot(douts.row(i), values_.row(j), args.E);
        ds[j] = w[j] == 0 ? w[j] : w[j] * (d - sums[chunk_.statistic + i]);
      }
      combine(keys_, 0, i + 1, ds, 1, A(1), dq + ((chunk_.token + i) * args.H + chunk_.h) * args.S, args.S);
    }
    for (int64_t j = 0; j < chunk_.keys; ++j) {
      const int64_t first = std::max(j, chunk_.first);
      combine(douts, first, chunk_.end, weights + first * kMost + j, kMost, A(1), dv.row(j), args.E);
      combine(queries_, first, chunk_.end, dscores + first * kMost + j, kMost, A(1), dk.row(j), args.S);
    }
  }

 private:
  static A dot(const T* a, const T* b, int64_t n) {
    Vec<A> sum = {};
    for (int64_t i = 0; i < n; i += W) sum = load(a + i, n - i) * load(b + i, n - i) + sum;
    return sum_lanes<A>(sum);
  }

  void scores_of(int64_t i, A* scores) const {
    for (int64_t j = 0; j <= i; ++j) scores[j] = dot(queries_.row(i), keys_.row(j), args_.S);
  }

  // exp(scores - shift) in their place.
  static void weigh(int64_t i, A shift, A* scores) {
    for (int64_t j = 0; j <= i; j += W) store(scores + j, weight_of(load(scores + j, i + 1 - j) - shift), i + 1 - j);
  }

  // out[n] = scale times the sum of rows [begin, end), each times its number.
  template <class U>
  static void combine(const Rows<const T>& rows, int64_t begin, int64_t end, const A* numbers, int64_t stride, A scale,
                      U* out, int64_t n) {
    for (int64_t c = 0; c < n; c += W) {
      Vec<A> sum = {};
      for (int64_t r = begin; r < end; ++r) {
        sum = load(rows.row(r) + c, n - c) * numbers[(r - begin) * stride] + sum;
      }
      store(out + c, sum * scale, n - c);
    }
  }

  const ChunkAttention& args_;
  const Chunk chunk_;
  const Rows<const T> queries_, keys_, values_;
};

}  // namespace megalodon::cpu::MEGALODON_ISA
