// One item of chunk_attention's backward pass: a group of key tiles of one chunk and head.
#pragma once

#include <cstring>
#include <utility>

#include "core/dropkey.h"
#include "ops/chunk_attention_rows.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Calls body(tile) for the tiles of keys that are dealt to a group: one of every round of `groups` tiles, from
// alternate ends, since the first tiles have the most queries after them.
template <class Body>
void for_key_tiles(const ChunkAttentionBackward& args, const Chunk& chunk, int64_t group, Body&& body) {
  for (int64_t round = 0; round * args.groups * args.keys < chunk.keys; ++round) {
    const int64_t tile = round * args.groups + (round % 2 == 0 ? group : args.groups - 1 - group);
    if (tile * args.keys < chunk.keys) body(tile);
  }
}

// Calls add(group, work) for the groups of a chunk: of every tile of keys its products, and something for every key
// and query it reads.
template <class Add>
void for_groups(const ChunkAttentionBackward& args, const Chunk& chunk, Add&& add) {
  for (int64_t group = 0; group < args.groups && group * args.keys < chunk.keys; ++group) {
    int64_t work = 0;
    for_key_tiles(args, chunk, group, [&](int64_t tile) {
      const int64_t key = tile * args.keys, keys = std::min(args.keys, chunk.keys - key);
      const int64_t end = std::min(chunk.end, key + keys + args.C - 1);
      work += (keys + 16) * (end - std::max(chunk.first, key) + 16);
    });
    add(group, work);
  }
}

template <class T>
class BackwardTile {
  using A = stat_t<T>;
  using F = factor_t<T>;
  static constexpr int64_t P = kPanel<A>, W = kLanes<A>, D = kPerWord<F>;
  static constexpr int64_t kColumns = ChunkAttentionBackward::kColumns;
  static_assert(kMicroRows % D == 0, "pairs of queries lie in one block of rows");

 public:
  // sums D [B, H, L]; dq [B, L, H, S], the group's part.
  BackwardTile(const ChunkAttentionBackward& args, const Chunk& chunk, int64_t group, const A* sums, A* dq, A* scratch)
      : args_(args),
        chunk_(chunk),
        group_(group),
        queries_in_(rows_of<const T>(args, chunk, args.q, nullptr, args.S)),
        dout_in_(rows_of<const T>(args, chunk, args.dout, nullptr, args.E)),
        sums_(sums + chunk.statistic),
        dq_out_(dq + (chunk.token * args.H + chunk.h) * args.S),
        drop_{args.seed, args.drop_below, static_cast<uint32_t>(chunk.sequence), static_cast<uint32_t>(chunk.h)} {
    const int64_t Sp = round_up(args.S, P), Ep = round_up(args.E, P), K = args.keys, Q = args.queries;
    const auto take = [&scratch](int64_t n) { return std::exchange(scratch, scratch + n); };
    keys_packed_ = take(K * Sp);
    keys_transposed_ = take(K * Sp);
    dk_ = take(K * Sp);
    values_transposed_ = take(K * Ep);
    dv_ = take(K * Ep);
    queries_.along = take(Q * Sp);
    queries_.across = D == 1 ? queries_.along : take(Q * Sp);
    dq_ = take(Q * Sp);
    weights_ = take(Q * K);
    dweights_ = take(Q * K);
    weights_across_ = D == 1 ? weights_ : take(Q * K);
    dscores_.along = D == 1 ? dweights_ : take(Q * K);
    dscores_.across = D == 1 ? dweights_ : take(Q * K);
    all_weights_ = args.drops_weights ? take(Q * K) : weights_;
    dropped_ = args.drops_weights ? reinterpret_cast<uint32_t*>(take(Q * K)) : nullptr;
    for (Factors& dout : dout_) {
      dout.along = take(Q * kColumns);
      dout.across = D == 1 ? dout.along : take(Q * kColumns);
    }
  }

  void run() {
    bool first_keys = true;
    for_key_tiles(args_, chunk_, group_, [&](int64_t tile) {
      key_ = tile * args_.keys;
      keys_ = std::min(args_.keys, chunk_.keys - key_);
      pack_keys();
      bool first_queries = true;
      for (int64_t i = chunk_.first; i < std::min(chunk_.end, key_ + keys_ + args_.C - 1); i += args_.queries) {
        place_ = i;
        count_ = std::min(args_.queries, chunk_.end - i);
        if (place_ + count_ <= key_) continue;
        weigh();
        pass_values(!first_queries);
        pass_keys(!first_queries);
        add_to_dq(!first_keys || args_.sliding);  // which begins as 0
        first_queries = false;
      }
      write_rows(dk_, args_.dk, args_.dk_cache, args_.S);
      write_rows(dv_, args_.dv, args_.dv_cache, args_.E);
      first_keys = false;
    });
  }

 private:
  using Factors = typename Packer<T>::Factors;

  int64_t panel_keys(int64_t p) const { return std::min(P, keys_ - p * P); }
  // The first query of the tile that sees a key of panel p, rounded down so that blocks of rows do not straddle it.
  int64_t first_query(int64_t p) const { return std::max(int64_t{0}, key_ + p * P - place_) / kMicroRows * kMicroRows; }
  A* row(A* matrix, int64_t p, int64_t i) const { return matrix + (p * count_ + i) * P; }

  void pack_keys() {
    const auto keys = rows_of<const T>(args_, chunk_, args_.k, args_.k_cache, args_.S);
    const auto values = rows_of<const T>(args_, chunk_, args_.v, args_.v_cache, args_.E);
    Packer<T>(keys, key_, key_ + keys_, 0, args_.S, {nullptr, keys_packed_}).finish();
    pack_transposed<F>([&](int64_t j) { return keys.row(key_ + j); }, keys_, args_.S, keys_transposed_);
    pack_transposed<F>([&](int64_t j) { return values.row(key_ + j); }, keys_, args_.E, values_transposed_);
  }

  // weights = exp(scores - lse), 0 where masked or dropped, in all_weights not where dropped.
  void weigh() {
    Packer<T>(queries_in_, place_, place_ + count_, 0, args_.S, queries_).finish();
    for (int64_t p = 0; p * P < keys_; ++p) {
      const int64_t first = first_query(p);
      if (first >= count_) continue;
      multiply<F>(count_ - first, words_of<F>(args_.S), queries_.along + first * P, count_,
                  keys_transposed_ + p * P * words_of<F>(args_.S), row(weights_, p, first), false);
    }
    if (drop_.any()) {
      for (int64_t i = 0; i < count_; ++i) drop_row(i, std::min(keys_, place_ + i + 1 - key_));
    }
    const A infinity = std::numeric_limits<A>::infinity();
    const A* lse = static_cast<const A*>(args_.lse) + chunk_.statistic + place_;
    for (int64_t p = 0; p * P < keys_; ++p) {
      for (int64_t i = first_query(p); i < count_; ++i) {
        const A shift = lse[i] == -infinity ? infinity : lse[i];
        A* scores = row(weights_, p, i);
        const int64_t visible = std::min(panel_keys(p), place_ + i + 1 - key_ - p * P);
        for (int64_t half = 0; half < P; half += W) {
          const Vec<A> weight = weight_of(load(scores + half) - shift);
          store(scores + half, visible == P ? weight : first_lanes(weight, visible - half));
        }
        const int64_t hidden = std::min(panel_keys(p), place_ + i - args_.C + 1 - key_ - p * P);
        for (int64_t j = 0; j < hidden; ++j) scores[j] = 0;  // out of the window
        if (args_.drops_weights) drop_weights(scores, p, i);
        if (i % D == D - 1 || i + 1 == count_) pair_queries(row(weights_, p, i / D * D), i % D, weights_across_, p, i);
      }
    }
  }

  // Of pairs: the row, and the next one if there is one, as a row of a factor whose sum runs over the queries.
  void pair_queries([[maybe_unused]] const A* numbers, [[maybe_unused]] bool two, [[maybe_unused]] A* across,
                    [[maybe_unused]] int64_t p, [[maybe_unused]] int64_t i) const {
#if defined(__AVX512BF16__)
    if constexpr (D == 2) {
      A* out = across + (p * words_of<F>(count_) + i / 2) * P;
      for (int64_t half = 0; half < P; half += W) {
        store(out + half, pair_up(load(numbers + half), two ? load(numbers + P + half) : Vec<A>{}));
      }
    }
#endif
  }

  void drop_row(int64_t i, int64_t visible) {
    if (visible <= 0) return;
    uint32_t buffer[ChunkAttentionBackward::kMostKeys + 4 * kPhiloxLanes + 3];
    const uint32_t* words = draw_row(drop_, chunk_.start + static_cast<uint32_t>(key_), visible,
                                     chunk_.start + static_cast<uint32_t>(place_ + i), buffer);
    for (int64_t p = 0; p * P < visible; ++p) {
      A* scores = row(weights_, p, i);
      const int64_t n = std::min(P, visible - p * P);
      if (args_.drops_weights) {
        uint32_t bits = 0;
        for (int64_t j = 0; j < n; ++j) bits |= uint32_t{words[p * P + j] < drop_.below} << j;
        dropped_[p * count_ + i] = bits;
        continue;
      }
      for (int64_t j = 0; j < n; ++j) {
        scores[j] = words[p * P + j] < drop_.below ? -std::numeric_limits<A>::infinity() : scores[j];
      }
    }
  }

  void drop_weights(A* weights, int64_t p, int64_t i) {
    const auto scale = static_cast<A>(args_.kept_scale);
    // Where the query sees no key of the panel there are no bits, and weights are 0.
    const uint32_t bits = key_ + p * P > place_ + i ? 0 : dropped_[p * count_ + i];
    for (int64_t half = 0; half < P; half += W) {
      const Vec<A> all = load(weights + half);
      store(row(all_weights_, p, i) + half, all);
      store(weights + half, without<A>(all * scale, bits >> half));
    }
  }

  // dweights = do v^T and dv += weights^T do, one group of columns of do after another; meanwhile the next is packed.
  void pass_values(bool accumulate) {
    const int64_t turns = ceil_div(keys_, P) * (ceil_div(count_, kRows) + kColumns / P * ceil_div(P, kMicroRows));
    Packer<T> next(dout_in_, place_, place_ + count_, 0, std::min(kColumns, args_.E), dout_[0]);
    for (int64_t e = 0; e < args_.E; e += kColumns) {
      next.finish();
      const Factors& dout = dout_[e / kColumns % 2];
      const int64_t columns = std::min(kColumns, args_.E - e), left = args_.E - e - columns;
      if (left > 0) {
        next = {dout_in_, place_, place_ + count_, e + kColumns, std::min(kColumns, left), dout_[1 - e / kColumns % 2]};
        next.divide(turns);
      }
      for (int64_t p = 0; p * P < keys_; ++p) {
        const A* values = values_transposed_ + p * P * words_of<F>(args_.E) + e / D * P;
        for (int64_t i = first_query(p); i < count_; i += kRows) {
          multiply<F>(std::min(kRows, count_ - i), words_of<F>(columns), dout.along + i * P, count_, values,
                      row(dweights_, p, i), e > 0);
          next.turn();
        }
      }
      add_products(weights_across_, dout.across, columns, dv_ + e * args_.keys, accumulate, next);
    }
    if (args_.E == 0) std::memset(dweights_, 0, count_ * round_up(keys_, P) * sizeof(A));
  }

  // sums[keys, columns] += x[queries, keys]^T y[queries, columns].
  void add_products(const A* x, const A* y, int64_t columns, A* sums, bool accumulate, Packer<T>& next) {
    const int64_t words = words_of<F>(count_);
    for (int64_t c = 0; c < columns; c += P) {
      for (int64_t p = 0; p * P < keys_; ++p) {
        const int64_t i = std::min(first_query(p), round_up(count_, D)) / D;
        for (int64_t j = 0; j < panel_keys(p); j += kMicroRows) {
          multiply_transposed<F>(std::min<int64_t>(kMicroRows, panel_keys(p) - j), words - i,
                                 x + (p * words + i) * P + j, y + (c / P * words + i) * P,
                                 sums + c * args_.keys + (p * P + j) * P, accumulate);
          next.turn();
        }
      }
    }
  }

  // From dweights the scores' gradients; dk += dscores^T q and dq = dscores k.
  void pass_keys(bool accumulate) {
    const A* sums = sums_ + place_;
    for (int64_t p = 0; p * P < keys_; ++p) {
      for (int64_t i = first_query(p); i < count_; ++i) {
        A* dscores = row(dweights_, p, i);
        const A *weights = row(weights_, p, i), *all_weights = row(all_weights_, p, i);
        for (int64_t half = 0; half < P; half += W) {
          const Vec<A> w = load(weights + half);
          if (args_.drops_weights) {
            const Vec<A> all = load(all_weights + half), kept = w == 0 ? w : w * load(dscores + half);
            store(dscores + half, all == 0 ? all : kept - all * sums[i]);
          } else {
            store(dscores + half, w == 0 ? w : w * (load(dscores + half) - sums[i]));
          }
        }
        pair_keys(dscores, p, i);
        if (i % D == D - 1 || i + 1 == count_) {
          pair_queries(row(dweights_, p, i / D * D), i % D, dscores_.across, p, i);
        }
      }
    }
    Packer<T> nothing;
    add_products(dscores_.across, queries_.across, args_.S, dk_, accumulate, nothing);
    for (int64_t i = 0; i < count_; i += kMicroRows) {
      const int64_t rows = std::min<int64_t>(kMicroRows, count_ - i);
      const int64_t visible = std::max(int64_t{0}, std::min(keys_, place_ + i + rows - key_));
      for (int64_t c = 0; c < args_.S; c += P) {
        multiply<F>(rows, words_of<F>(visible), dscores_.along + i * P, count_, keys_packed_ + c * words_of<F>(keys_),
                    dq_ + c * count_ + i * P, false);
      }
    }
  }

  // Of pairs: the panel's row as words of a factor whose sum runs over the keys.
  void pair_keys([[maybe_unused]] const A* numbers, [[maybe_unused]] int64_t p, [[maybe_unused]] int64_t i) const {
#if defined(__AVX512BF16__)
    if constexpr (D == 2) {
      const auto low = reinterpret_cast<__m512>(load(numbers)), high = reinterpret_cast<__m512>(load(numbers + W));
      const auto words = reinterpret_cast<Vec<A>>(_mm512_cvtne2ps_pbh(high, low));
      store(dscores_.along + (p / 2 * count_ + i) * P + p % 2 * W, words);
    }
#endif
  }

  void add_to_dq(bool accumulate) {
    const int64_t stride = args_.H * args_.S;
    A* dq = dq_out_ + place_ * stride;
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t s = 0; s < args_.S; s += W) {
        Vec<A> sum = load(dq_ + s / P * P * count_ + i * P + s % P);
        if (accumulate) sum += load(dq + i * stride + s, args_.S - s);
        store(dq + i * stride + s, sum, args_.S - s);
      }
    }
  }

  void write_rows(const A* sums, void* fresh, void* cache, int64_t n) const {
    const auto out = rows_of<T>(args_, chunk_, fresh, cache, n);
    for (int64_t j = 0; j < keys_; ++j) {
      T* row = out.row(key_ + j);
      for (int64_t c = 0; c < n; c += W) store(row + c, load(sums + c / P * P * args_.keys + j * P + c % P), n - c);
    }
  }

  static constexpr int64_t kRows = 4 * kMicroRows;  // of queries, between turns of packing

  const ChunkAttentionBackward& args_;
  const Chunk chunk_;
  const int64_t group_;
  const Rows<const T> queries_in_, dout_in_;
  const A* sums_;  // of place 0
  A* dq_out_;      // likewise
  const DropKey drop_;
  int64_t key_ = 0, keys_ = 0, place_ = 0, count_ = 0;  // the tiles' first places and sizes
  A *keys_packed_, *keys_transposed_, *dk_, *values_transposed_, *dv_, *dq_;
  A *weights_, *all_weights_, *dweights_, *weights_across_;
  uint32_t* dropped_;  // [panels of keys, queries] bits of the keys
  Factors queries_, dscores_, dout_[2];
};

}  // namespace megalodon::cpu::MEGALODON_ISA
