// One item of chunk_attention's backward pass: a group of key tiles of one chunk and head.
#pragma once

#include <cstring>

#include "core/dropkey.h"
#include "ops/chunk_attention_rows.h"

namespace megalodon::cpu::MEGALODON_ISA {

// How the key tiles of a chunk are dealt to its groups.
inline Deal key_tiles(const ChunkAttentionBackward& args, const Chunk& chunk) {
  return {ceil_div(chunk.keys, args.kKeys), args.groups};
}

template <class T>
class BackwardTile {
  using A = stat_t<T>;
  static constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  static constexpr int64_t kKeys = ChunkAttentionBackward::kKeys;
  static constexpr int64_t kColumns = ChunkAttentionBackward::kValuePanels * P;

 public:
  BackwardTile(const ChunkAttentionBackward& args, const Chunk& chunk, int64_t group, A* scratch)
      : args_(args),
        chunk_(chunk),
        group_(group),
        queries_in_(rows_of<const T>(args, chunk, args.q, nullptr, args.S)),
        dout_in_(rows_of<const T>(args, chunk, args.dout, nullptr, args.E)),
        statistics_((chunk.b * args.H + chunk.h) * args.L + chunk.token),
        drop_{args.seed, args.drop_below, static_cast<uint32_t>(chunk.b), static_cast<uint32_t>(chunk.h)} {
    const int64_t Sp = round_up(args.S, P), Ep = round_up(args.E, P);
    keys_packed_ = scratch;
    keys_transposed_ = keys_packed_ + kKeys * Sp;
    dk_ = keys_transposed_ + kKeys * Sp;
    values_transposed_ = dk_ + kKeys * Sp;
    dv_ = values_transposed_ + kKeys * Ep;
    queries_packed_ = dv_ + kKeys * Ep;
    dq_ = queries_packed_ + args.query_rows * Sp;
    weights_ = dq_ + args.query_rows * Sp;
    dweights_ = weights_ + args.query_rows * kKeys;
    dout_packed_ = dweights_ + args.query_rows * kKeys;
  }

  void run() {
    const Deal deal = key_tiles(args_, chunk_);
    for (int64_t round = 0; round < deal.rounds(); ++round) {
      const int64_t tile = deal.item(round, group_);
      if (tile >= deal.items) continue;
      key_ = tile * kKeys;
      keys_ = std::min(kKeys, chunk_.keys - key_);
      pack_keys();
      bool first_queries = true;
      for (int64_t i = chunk_.first; i < chunk_.keys; i += args_.kQueries) {
        place_ = i;
        queries_ = std::min(args_.kQueries, chunk_.keys - i);
        if (place_ + queries_ <= key_) continue;
        weigh();
        pass_values(!first_queries);
        pass_keys(!first_queries);
        add_to_dq(round > 0);
        first_queries = false;
      }
      write_rows(dk_, args_.dk, args_.dk_cache, args_.S);
      write_rows(dv_, args_.dv, args_.dv_cache, args_.E);
    }
  }

 private:
  int64_t panel_keys(int64_t p) const { return std::min(P, keys_ - p * P); }
  // The first query of the tile that sees a key of panel p, rounded down so that blocks of rows do not straddle it.
  int64_t first_query(int64_t p) const { return std::max(int64_t{0}, key_ + p * P - place_) / kMicroRows * kMicroRows; }

  void pack_keys() {
    const auto keys = rows_of<const T>(args_, chunk_, args_.k, args_.k_cache, args_.S);
    const auto values = rows_of<const T>(args_, chunk_, args_.v, args_.v_cache, args_.E);
    pack_places(keys, key_, key_ + keys_, 0, args_.S, keys_packed_, keys_);
    pack_places(values, key_, key_ + keys_, 0, args_.E, dv_, keys_);  // on its way to values_transposed_
    for (int64_t c = 0; c < args_.S; c += P) {
      pack_transposed(keys_packed_ + c * keys_, P, keys_, std::min(P, args_.S - c), keys_transposed_, args_.S, c);
    }
    for (int64_t c = 0; c < args_.E; c += P) {
      pack_transposed(dv_ + c * keys_, P, keys_, std::min(P, args_.E - c), values_transposed_, args_.E, c);
    }
  }

  // weights = exp(scores - lse), 0 where masked or dropped.
  void weigh() {
    pack(queries_in_.row(place_), queries_in_.stride, queries_, args_.S, queries_packed_, queries_);
    for (int64_t p = 0; p * P < keys_; ++p) {
      const int64_t i = first_query(p);
      if (i >= queries_) continue;
      multiply(queries_ - i, args_.S, queries_packed_ + i * P, queries_, keys_transposed_ + p * P * args_.S,
               weights_ + (p * queries_ + i) * P, false);
    }
    const A infinity = std::numeric_limits<A>::infinity();
    const A* lse = static_cast<const A*>(args_.lse) + statistics_;
    for (int64_t i = 0; i < queries_; ++i) {
      const int64_t visible = std::min(keys_, place_ + i + 1 - key_);
      if (drop_.any() && visible > 0) drop_row(i, visible);
      const A shift = lse[place_ + i] == -infinity ? infinity : lse[place_ + i];
      for (int64_t p = 0; p * P < keys_ && first_query(p) <= i; ++p) {
        exp_row(weights_ + (p * queries_ + i) * P, visible - p * P, shift);
      }
    }
  }

  void drop_row(int64_t i, int64_t visible) {
    uint32_t buffer[kKeys + 4 * kPhiloxLanes + 3];
    const uint32_t* words = draw_row(drop_, chunk_.start + static_cast<uint32_t>(key_), visible,
                                     chunk_.start + static_cast<uint32_t>(place_ + i), buffer);
    for (int64_t p = 0; p * P < visible; ++p) {
      A* row = weights_ + (p * queries_ + i) * P;
      const int64_t n = std::min(P, visible - p * P);
      for (int64_t j = 0; j < n; ++j) {
        row[j] = words[p * P + j] < drop_.below ? -std::numeric_limits<A>::infinity() : row[j];
      }
    }
  }

  static void exp_row(A* row, int64_t visible, A shift) {
    for (int64_t half = 0; half < P; half += W) {
      Vec<A> e = exp(load(row + half) - shift);
      for (int64_t j = std::max(int64_t{0}, visible - half); j < W; ++j) e[j] = 0;
      store(row + half, e);
    }
  }

  // dweights = do v^T and dv += weights^T do, one group of columns of do after another.
  void pass_values(bool accumulate) {
    for (int64_t e = 0; e < args_.E; e += kColumns) {
      const int64_t columns = std::min(kColumns, args_.E - e);
      pack(dout_in_.row(place_) + e, dout_in_.stride, queries_, columns, dout_packed_, queries_);
      for (int64_t p = 0; p * P < keys_; ++p) {
        const int64_t i = first_query(p);
        if (i >= queries_) continue;
        multiply(queries_ - i, columns, dout_packed_ + i * P, queries_, values_transposed_ + p * P * args_.E + e * P,
                 dweights_ + (p * queries_ + i) * P, e > 0);
      }
      add_products(weights_, dout_packed_, columns, dv_ + e * kKeys, accumulate);
    }
    if (args_.E == 0) std::memset(dweights_, 0, queries_ * kKeys * sizeof(A));
  }

  // sums[keys, columns] += x[queries, keys]^T y[queries, columns].
  void add_products(const A* x, const A* y, int64_t columns, A* sums, bool accumulate) {
    for (int64_t c = 0; c < columns; c += P) {
      for (int64_t p = 0; p * P < keys_; ++p) {
        const int64_t i = std::min(first_query(p), queries_);
        multiply_transposed(panel_keys(p), queries_ - i, x + (p * queries_ + i) * P, y + c * queries_ + i * P,
                            sums + c * kKeys + p * P * P, accumulate);
      }
    }
  }

  // From dweights the scores' gradients; dk += dscores^T q and dq = dscores k.
  void pass_keys(bool accumulate) {
    const A* D = static_cast<const A*>(args_.workspace) + statistics_;
    for (int64_t p = 0; p * P < keys_; ++p) {
      for (int64_t i = first_query(p); i < queries_; ++i) {
        A* row = dweights_ + (p * queries_ + i) * P;
        const A* weights = weights_ + (p * queries_ + i) * P;
        for (int64_t half = 0; half < P; half += W) {
          const Vec<A> w = load(weights + half);
          store(row + half, w == 0 ? w : w * (load(row + half) - D[place_ + i]));
        }
      }
    }
    add_products(dweights_, queries_packed_, args_.S, dk_, accumulate);
    for (int64_t i = 0; i < queries_; i += kMicroRows) {
      const int64_t rows = std::min<int64_t>(kMicroRows, queries_ - i);
      const int64_t visible = std::max(int64_t{0}, std::min(keys_, place_ + i + rows - key_));
      for (int64_t c = 0; c < args_.S; c += P) {
        multiply(rows, visible, dweights_ + i * P, queries_, keys_packed_ + c * keys_, dq_ + c * queries_ + i * P,
                 false);
      }
    }
  }

  void add_to_dq(bool accumulate) {
    const int64_t stride = args_.H * args_.S;
    A* dq = static_cast<A*>(args_.workspace) + args_.B * args_.L * args_.H + group_ * args_.B * args_.L * stride;
    dq += ((chunk_.b * args_.L + chunk_.token + place_) * args_.H + chunk_.h) * args_.S;
    for (int64_t i = 0; i < queries_; ++i) {
      for (int64_t s = 0; s < args_.S; s += W) {
        Vec<A> sum = load(dq_ + s / P * P * queries_ + i * P + s % P);
        if (accumulate) sum += load(dq + i * stride + s, args_.S - s);
        store(dq + i * stride + s, sum, args_.S - s);
      }
    }
  }

  void write_rows(const A* sums, void* fresh, void* cache, int64_t n) const {
    const auto out = rows_of<T>(args_, chunk_, fresh, cache, n);
    for (int64_t j = 0; j < keys_; ++j) {
      T* row = out.row(key_ + j);
      for (int64_t c = 0; c < n; c += W) store(row + c, load(sums + c / P * P * kKeys + j * P + c % P), n - c);
    }
  }

  const ChunkAttentionBackward& args_;
  const Chunk chunk_;
  const int64_t group_;
  const Rows<const T> queries_in_, dout_in_;
  const int64_t statistics_;  // of place 0 in lse and D
  const DropKey drop_;
  int64_t key_ = 0, keys_ = 0, place_ = 0, queries_ = 0;  // the tiles' first places and sizes
  A *keys_packed_, *keys_transposed_, *dk_, *values_transposed_, *dv_;
  A *queries_packed_, *dq_, *weights_, *dweights_, *dout_packed_;
};

}  // namespace megalodon::cpu::MEGALODON_ISA
