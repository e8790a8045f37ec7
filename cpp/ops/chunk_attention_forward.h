// One item of chunk_attention's forward pass: a tile of queries of one chunk and head.
#pragma once

#include <cmath>

#include "core/dropkey.h"
#include "ops/chunk_attention_rows.h"

namespace megalodon::cpu::MEGALODON_ISA {

// One panel of queries across lanes: their running maximum, sum, and the factor that the last block put on the past.
template <class A>
struct Softmax {
  Vec<A> best[2], sum[2], scale[2];
};

// scores[keys, P] becomes exp(scores - maximum). The panel's first query sees keys up to `visible`, its lane i up to
// visible + i, beyond which scores are masked here.
template <class A>
void softmax_block(A* scores, int64_t keys, int64_t visible, Softmax<A>& state) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  const Vec<A> lowest = splat(-std::numeric_limits<A>::infinity());
  Vec<A> lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = static_cast<A>(i);
  Vec<A> best[2] = {state.best[0], state.best[1]};
  for (int64_t j = 0; j < keys; ++j) {
    A* row = scores + j * P;
    for (int half = 0; half < 2; ++half) {
      Vec<A> s = load(row + half * W);
      if (j > visible) {
        s = lane + static_cast<A>(half * W) < splat(static_cast<A>(j - visible)) ? lowest : s;
        store(row + half * W, s);
      }
      best[half] = maximum(s, best[half]);
    }
  }
  Vec<A> shift[2], sum[2];
  for (int half = 0; half < 2; ++half) {
    shift[half] = best[half] == lowest ? Vec<A>{} : best[half];  // nothing visible yet
    state.scale[half] = exp(state.best[half] - shift[half]);
    sum[half] = state.sum[half] * state.scale[half];
    state.best[half] = best[half];
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int half = 0; half < 2; ++half) {
      const Vec<A> e = exp(load(scores + j * P + half * W) - shift[half]);
      store(scores + j * P + half * W, e);
      sum[half] += e;
    }
  }
  state.sum[0] = sum[0];
  state.sum[1] = sum[1];
}

template <class T>
class ForwardTile {
  using A = stat_t<T>;
  static constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  static constexpr int64_t kQueries = ChunkAttentionForward::kQueries, kKeys = ChunkAttentionForward::kKeys;
  static constexpr int64_t kPanels = kQueries / P;  // of queries
  // Rows of values to prefetch per product of kMicroRows queries, so that a panel is there when it is packed.
  static constexpr int64_t kAhead = kKeys * kMicroRows / kQueries + kMicroRows;

 public:
  ForwardTile(const ChunkAttentionForward& args, const Chunk& chunk, int64_t tile, A* scratch)
      : args_(args),
        chunk_(chunk),
        keys_(rows_of<const T>(args, chunk, args.k, args.k_cache, args.S)),
        values_(rows_of<const T>(args, chunk, args.v, args.v_cache, args.E)),
        place_(chunk.first + tile * kQueries),
        queries_(std::min(kQueries, chunk.keys - place_)),
        drop_{args.seed, args.drop_below, static_cast<uint32_t>(chunk.b), static_cast<uint32_t>(chunk.h)} {
    queries_packed_ = scratch;
    keys_packed_ = queries_packed_ + kQueries * args.S;
    scores_ = keys_packed_ + args.key_rows * round_up(args.S, P);
    values_packed_ = scores_ + args.key_rows * kQueries;
    output_ = values_packed_ + args.key_rows * P;
  }

  void run() {
    const auto queries = rows_of<const T>(args_, chunk_, args_.q, nullptr, args_.S);
    pack_transposed(queries.row(place_), queries.stride, queries_, args_.S, queries_packed_, args_.S);
    for (Softmax<A>& state : softmax_) {
      for (int half = 0; half < 2; ++half) {
        state.best[half] = splat(-std::numeric_limits<A>::infinity());
        state.sum[half] = Vec<A>{};
      }
    }
    const int64_t end = place_ + queries_;
    for (int64_t j = 0; j < end; j += kKeys) {
      const int64_t n = std::min(kKeys, end - j);
      score(j, n);
      add_values(j, n);
    }
    finish();
  }

 private:
  int64_t panel_queries(int64_t p) const { return std::min(P, queries_ - p * P); }
  // How many of the n keys from place j on are visible to query i of the tile.
  int64_t visible(int64_t i, int64_t j, int64_t n) const { return std::min(n, place_ + i + 1 - j); }

  void score(int64_t j, int64_t n) {
    pack_places(keys_, j, j + n, 0, args_.S, keys_packed_, n);
    for (int64_t p = 0; p * P < queries_; ++p) {
      A* scores = scores_ + p * args_.key_rows * P;
      const int64_t count = visible(p * P + panel_queries(p) - 1, j, n);
      if (count <= 0) {  // the next panel's keys begin here: nothing changes
        softmax_[p].scale[0] = softmax_[p].scale[1] = splat(A(1));
        continue;
      }
      multiply(count, args_.S, keys_packed_, n, queries_packed_ + p * P * args_.S, scores, false);
      if (drop_.any()) {
        drop_columns(drop_, chunk_.start + static_cast<uint32_t>(j), count,
                     chunk_.start + static_cast<uint32_t>(place_ + p * P), P, scores);
      }
      softmax_block(scores, count, place_ + p * P - j, softmax_[p]);
    }
  }

  void add_values(int64_t j, int64_t n) {
    const bool accumulate = j > 0;
    const bool rescale = accumulate && any_scale();
    for (int64_t e = 0; e < args_.E; e += P) {
      pack_places(values_, j, j + n, e, std::min(P, args_.E - e), values_packed_, n);
      int64_t next = j;  // the next place whose part of the next panel is to be prefetched
      const int64_t stop = args_.E - e >= 2 * P ? j + n : j;
      A* output = output_ + e * kQueries;
      if (rescale) scale_rows(output);
      for (int64_t p = 0; p * P < queries_; ++p) {
        const A* weights = scores_ + p * args_.key_rows * P;
        for (int64_t i = 0; i < panel_queries(p); i += kMicroRows) {
          const int64_t rows = std::min<int64_t>(kMicroRows, panel_queries(p) - i);
          const int64_t count = visible(p * P + i + rows - 1, j, n);
          for (const int64_t last = std::min(stop, next + kAhead); next < last; ++next) {
            const auto* row = reinterpret_cast<const char*>(values_.row(next) + e + P);
            for (int64_t byte = 0; byte < P * int64_t{sizeof(T)}; byte += 64) __builtin_prefetch(row + byte);
          }
          if (count > 0) {
            multiply_transposed(rows, count, weights + i, values_packed_, output + (p * P + i) * P, accumulate);
          }
        }
      }
    }
  }

  bool any_scale() const {
    bool any = false;
    for (int64_t i = 0; i < queries_; ++i) any |= softmax_[i / P].scale[i % P / W][i % W] != A(1);
    return any;
  }

  void scale_rows(A* output) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const A scale = softmax_[i / P].scale[i % P / W][i % W];
      store(output + i * P, load(output + i * P) * scale);
      store(output + i * P + W, load(output + i * P + W) * scale);
    }
  }

  void finish() const {
    const auto out = rows_of<T>(args_, chunk_, args_.o, nullptr, args_.E);
    auto* lse = static_cast<A*>(args_.lse) + (chunk_.b * args_.H + chunk_.h) * args_.L + chunk_.token + place_;
    for (int64_t i = 0; i < queries_; ++i) {
      const Softmax<A>& state = softmax_[i / P];
      const A sum = state.sum[i % P / W][i % W];
      const A inverse = sum == 0 ? A(0) : A(1) / sum;
      lse[i] = state.best[i % P / W][i % W] + std::log(sum);
      T* row = out.row(place_ + i);
      for (int64_t e = 0; e < args_.E; e += W) {
        store(row + e, load(output_ + e / P * P * kQueries + i * P + e % P) * inverse, args_.E - e);
      }
    }
  }

  const ChunkAttentionForward& args_;
  const Chunk chunk_;
  const Rows<const T> keys_, values_;
  const int64_t place_, queries_;
  const DropKey drop_;
  Softmax<A> softmax_[kPanels];
  A *queries_packed_, *keys_packed_, *scores_, *values_packed_, *output_;
};

}  // namespace megalodon::cpu::MEGALODON_ISA
