// One item of chunk_attention's forward pass: a tile of queries of one chunk and head.
#pragma once

#include <cmath>

#include "core/dropkey.h"
#include "ops/chunk_attention_rows.h"

namespace megalodon::cpu::MEGALODON_ISA {

// One panel of queries across lanes: what is subtracted from their scores, the sum of their weights, and the factor
// that the last block put on the past.
template <class A>
struct Softmax {
  Vec<A> shift[2], sum[2], scale[2];
};

// A shift follows the maximum only where that has grown by more than this: weights up to e^8 do no harm, and most
// blocks leave the outputs so far as they are.
constexpr int kSlack = 8;

// The greatest of the scores[keys, P]. The panel's first query sees the keys from `oldest` up to `visible`, its lane i
// those from oldest + i up to visible + i; the others' scores are masked here.
template <class A>
void mask_and_maximum(A* scores, int64_t keys, int64_t oldest, int64_t visible, Vec<A> (&best)[2]) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>;
  const Vec<A> lowest = splat(-std::numeric_limits<A>::infinity());
  Vec<A> lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = static_cast<A>(i);
  best[0] = best[1] = lowest;
  const int64_t all = std::min(keys, std::max<int64_t>(visible + 1, 0));
  const int64_t seen_by_all = std::min(keys, std::max<int64_t>(oldest + P - 1, 0));
  for (int64_t j = 0; j < seen_by_all; ++j) {
    for (int half = 0; half < 2; ++half) {
      A* s = scores + j * P + half * W;
      store(s, lane + static_cast<A>(half * W) > splat(static_cast<A>(j - oldest)) ? lowest : load(s));
      if (j < all) best[half] = maximum(load(s), best[half]);
    }
  }
  for (int64_t j = seen_by_all; j < all; ++j) {
    best[0] = maximum(load(scores + j * P), best[0]);
    best[1] = maximum(load(scores + j * P + W), best[1]);
  }
  for (int64_t j = all; j < keys; ++j) {
    for (int half = 0; half < 2; ++half) {
      A* s = scores + j * P + half * W;
      store(s, lane + static_cast<A>(half * W) < splat(static_cast<A>(j - visible)) ? lowest : load(s));
      best[half] = maximum(load(s), best[half]);
    }
  }
}

// scores[keys, P] become words of the factor weights[words, P] (core/gemm.h) in their place. dropped: bits of the
// queries for every key, whose weights count in the sum alone; or nullptr.
template <class F, class A>
void softmax_block(A* scores, int64_t keys, int64_t oldest, int64_t visible, const uint32_t* dropped,
                   Softmax<A>& state) {
  constexpr int64_t P = kPanel<A>, W = kLanes<A>, D = kPerWord<F>;
  const Vec<A> lowest = splat(-std::numeric_limits<A>::infinity());
  Vec<A> best[2], shift[2], sum[2];
  mask_and_maximum(scores, keys, oldest, visible, best);
  for (int half = 0; half < 2; ++half) {
    const Vec<A> before = state.shift[half];
    const Vec<A> after = best[half] > before + kSlack ? best[half] : before;
    shift[half] = after == lowest ? Vec<A>{} : after;  // nothing visible yet
    state.scale[half] = after == before ? splat(A(1)) : weight_of(before - shift[half]);
    sum[half] = state.sum[half] * state.scale[half];
    state.shift[half] = after;
  }
  // Runs of keys have sums of their own: many small weights beside a large one are not rounded to it one by one.
  constexpr int64_t kRun = 16;
  for (int64_t begin = 0; begin < keys; begin += kRun) {
    const int64_t end = begin + kRun < keys ? begin + kRun : keys;
    Vec<A> of_run[2] = {};
    for (int64_t j = begin; j < end; j += D) {
      for (int half = 0; half < 2; ++half) {
        Vec<A> e = weight_of(load(scores + j * P + half * W) - shift[half]);
        of_run[half] += e;
        if (dropped != nullptr) e = without<A>(e, dropped[j] >> half * W);
#if defined(__AVX512BF16__)
        if constexpr (D == 2) {
          Vec<A> second = {};
          if (j + 1 < keys) second = weight_of(load(scores + (j + 1) * P + half * W) - shift[half]);
          of_run[half] += second;
          if (dropped != nullptr && j + 1 < keys) second = without<A>(second, dropped[j + 1] >> half * W);
          e = pair_up(e, second);
        }
#endif
        store(scores + j / D * P + half * W, e);
      }
    }
    for (int half = 0; half < 2; ++half) sum[half] += of_run[half];
  }
  state.sum[0] = sum[0];
  state.sum[1] = sum[1];
}

// Calls add(tile, work) for the tiles of a chunk: its products, and something for every key and query it reads.
template <class Add>
void for_query_tiles(const ChunkAttentionForward& args, const Chunk& chunk, Add&& add) {
  for (int64_t tile = 0; tile * args.queries < chunk.queries(); ++tile) {
    const int64_t queries = std::min(args.queries, chunk.queries() - tile * args.queries);
    const int64_t keys = std::min(chunk.first + tile * args.queries + queries / 2, args.C);
    add(tile, (queries + 16) * (keys + 16));
  }
}

template <class T>
class ForwardTile {
  using A = stat_t<T>;
  using F = factor_t<T>;
  static constexpr int64_t P = kPanel<A>, W = kLanes<A>, D = kPerWord<F>;
  static constexpr int64_t kKeys = ChunkAttentionForward::kKeys;
  static constexpr int64_t kColumns = ChunkAttentionForward::kColumns;
  static constexpr int64_t kPanels = ChunkAttentionForward::kMostQueries / P;  // of queries
  static constexpr int64_t kRows = 4 * kMicroRows;                             // of keys, between turns of packing

 public:
  ForwardTile(const ChunkAttentionForward& args, const Chunk& chunk, int64_t tile, A* scratch)
      : args_(args),
        chunk_(chunk),
        keys_(rows_of<const T>(args, chunk, args.k, args.k_cache, args.S)),
        values_(rows_of<const T>(args, chunk, args.v, args.v_cache, args.E)),
        place_(chunk.first + tile * args.queries),
        queries_(std::min(args.queries, chunk.end - place_)),
        begin_(std::max<int64_t>(place_ - args.C + 1, 0)),
        end_(place_ + queries_),
        drop_{args.seed, args.drop_below, static_cast<uint32_t>(chunk.sequence), static_cast<uint32_t>(chunk.h)} {
    queries_packed_ = scratch;
    keys_packed_ = queries_packed_ + args.queries * round_up(args.S, P);
    scores_ = keys_packed_ + args.key_rows * round_up(args.S, P);
    values_packed_[0] = scores_ + args.key_rows * args.queries;
    const int64_t Ep = round_up(args.E, P);
    values_packed_[1] = values_packed_[0] + args.key_rows * std::min(kColumns, Ep);
    output_ = values_packed_[0] + args.key_rows * std::min(2 * kColumns, Ep);
  }

  void run() {
    const auto queries = rows_of<const T>(args_, chunk_, args_.q, nullptr, args_.S);
    const auto query = [&](int64_t i) { return queries.row(place_ + i); };
    pack_transposed<F>(query, queries_, args_.S, queries_packed_);
    for (int64_t p = 0; p * P < queries_; ++p) {
      softmax_[p].shift[0] = softmax_[p].shift[1] = splat(-std::numeric_limits<A>::infinity());
      softmax_[p].sum[0] = softmax_[p].sum[1] = Vec<A>{};
    }
    next_keys_ = packer_of_keys(begin_);
    for (int64_t j = begin_; j < end_; j += kKeys) {
      next_keys_.finish();
      next_values_ = packer_of_values(j, 0);
      score(j, std::min(kKeys, end_ - j));
      add_values(j, std::min(kKeys, end_ - j));
    }
    if (args_.E == 0) finish(0);
  }

 private:
  int64_t panel_queries(int64_t p) const { return std::min(P, queries_ - p * P); }
  // How many of n keys from place j on query i of the tile sees.
  int64_t visible(int64_t i, int64_t j, int64_t n) const { return std::min(n, place_ + i + 1 - j); }

  Packer<T> packer_of_keys(int64_t j) const {
    return {keys_, j, std::min(j + kKeys, end_), 0, args_.S, {keys_packed_, nullptr}};
  }
  Packer<T> packer_of_values(int64_t j, int64_t e) const {
    const int64_t n = std::min(kColumns, args_.E - e);
    return {values_, j, std::min(j + kKeys, end_), e, n, {nullptr, values_packed_[e / kColumns % 2]}};
  }

  void score(int64_t j, int64_t n) {
    next_values_.divide(ceil_div(queries_, P) * ceil_div(n, kRows));
    for (int64_t p = 0; p * P < queries_; ++p) {
      A* scores = scores_ + p * args_.key_rows * P;
      const int64_t count = visible(p * P + panel_queries(p) - 1, j, n);
      if (count <= 0) {  // the next panel's keys begin here: nothing changes
        softmax_[p].scale[0] = softmax_[p].scale[1] = splat(A(1));
        continue;
      }
      const A* queries = queries_packed_ + p * P * words_of<F>(args_.S);
      for (int64_t i = 0; i < count; i += kRows) {
        multiply<F>(std::min(kRows, count - i), words_of<F>(args_.S), keys_packed_ + i * P, n, queries, scores + i * P,
                    false);
        next_values_.turn();
      }
      uint32_t dropped[kKeys];
      if (drop_.any()) {
        const auto key = chunk_.start + static_cast<uint32_t>(j);
        const auto query = chunk_.start + static_cast<uint32_t>(place_ + p * P);
        args_.drops_weights ? drop_bits(drop_, key, count, query, P, dropped)
                            : drop_columns(drop_, key, count, query, P, scores);
      }
      const int64_t last = place_ + p * P - j;
      softmax_block<F>(scores, count, args_.sliding ? last - args_.C + 1 : -P, last,
                       args_.drops_weights ? dropped : nullptr, softmax_[p]);
    }
  }

  // While some columns of the values are multiplied, the next ones are packed, or the next block's keys.
  void add_values(int64_t j, int64_t n) {
    const bool rescale = j > begin_ && any_scale();
    const int64_t turns = ceil_div(queries_, P) * ceil_div(P, kMicroRows);
    next_keys_ = j + n < end_ ? packer_of_keys(j + n) : Packer<T>();
    for (int64_t e = 0; e < args_.E; e += kColumns) {
      next_values_.finish();
      const bool last = e + kColumns >= args_.E;
      if (!last) next_values_ = packer_of_values(j, e + kColumns);
      const int64_t panels = panels_of<A>(std::min(kColumns, args_.E - e));
      last ? next_keys_.divide(turns * panels) : next_values_.divide(turns * panels);
      for (int64_t c = 0; c < panels; ++c) {
        A* output = output_ + (e + c * P) * args_.queries;
        const A* values = values_packed_[e / kColumns % 2] + c * P * words_of<F>(n);
        if (rescale) scale_rows(output);
        for (int64_t i = 0; i < queries_; i += i % P + kMicroRows < P ? kMicroRows : P - i % P) {
          const int64_t rows = std::min({int64_t{kMicroRows}, P - i % P, queries_ - i});
          const int64_t count = visible(i + rows - 1, j, n);
          if (count > 0) {
            multiply_transposed<F>(rows, words_of<F>(count), scores_ + i / P * args_.key_rows * P + i % P, values,
                                   output + i * P, j > begin_);
          }
          last ? next_keys_.turn() : next_values_.turn();
        }
      }
      if (j + n >= end_) finish(e);
    }
  }

  bool any_scale() const {
    bool any = false;
    for (int64_t i = 0; i < queries_; ++i) any |= scale_of(i) != A(1);
    return any;
  }
  A scale_of(int64_t i) const { return softmax_[i / P].scale[i % P / W][i % W]; }

  void scale_rows(A* output) const {
    for (int64_t i = 0; i < queries_; ++i) {
      const A scale = scale_of(i);
      if (scale == A(1)) continue;
      store(output + i * P, load(output + i * P) * scale);
      store(output + i * P + W, load(output + i * P + W) * scale);
    }
  }

  // Columns e .. of the output, which are complete.
  void finish(int64_t e) const {
    const auto out = rows_of<T>(args_, chunk_, args_.o, nullptr, args_.E);
    auto* lse = static_cast<A*>(args_.lse) + chunk_.statistic + place_;
    const int64_t stop = std::min(args_.E, e + kColumns);
    for (int64_t i = 0; i < queries_; ++i) {
      const Softmax<A>& state = softmax_[i / P];
      const A sum = state.sum[i % P / W][i % W];
      const A inverse = sum == 0 ? A(0) : static_cast<A>(args_.kept_scale) / sum;
      if (e == 0) lse[i] = state.shift[i % P / W][i % W] + std::log(sum);
      T* row = out.row(place_ + i);
      for (int64_t c = e; c < stop; c += W) {
        store(row + c, load(output_ + c / P * P * args_.queries + i * P + c % P) * inverse, args_.E - c);
      }
    }
  }

  const ChunkAttentionForward& args_;
  const Chunk chunk_;
  const Rows<const T> keys_, values_;
  const int64_t place_, queries_, begin_, end_;
  const DropKey drop_;
  Packer<T> next_keys_, next_values_;
  Softmax<A> softmax_[kPanels];
  A *queries_packed_, *keys_packed_, *scores_, *values_packed_[2], *output_;
};

}  // namespace megalodon::cpu::MEGALODON_ISA
