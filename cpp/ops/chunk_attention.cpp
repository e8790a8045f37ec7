// chunk_attention on the CPU.
//
// Computes  softmax attention inside chunks and its gradients (ops/chunk_attention.h); section 3.4 of arXiv 2404.08801.
// Layout    q, k, v, o (B, L, H, S or E): the rows of a head are H S (H E) apart; caches (B, C, H, S or E) likewise;
//           lse, D (B, H, L). Tiles are copied into panels of the accumulator type (core/gemm.h) in the slot's scratch.
// Mapping   forward: an item is a tile of kQueries queries of one chunk and head. It walks the keys before it in blocks
//           with a running maximum and sum; queries lie across lanes, so the softmax needs no reduction over lanes.
//           Backward: an item is a group of key tiles of one chunk and head. A key tile stays while the tiles of queries
//           after it pass by; keys lie across lanes. dk and dv belong to one item; dq is summed over groups.
// Traffic   2 (S + E) FLOPs per query and key forward, 2 (3 S + 2 E) backward, the non-causal half skipped but for
//           part of a tile on the diagonal: compute-bound. A query tile reads every key and value before it once.
// Numerics  scores, weights and sums in stat; sums in the order of the keys (forward), the queries (dk, dv), the key
//           tiles of a group and then the groups (dq), whatever the number of threads. Masked and dropped weights are
//           exactly 0 and so are the outputs and gradients of a query without keys.
// Limits    any B, L, H, S, E, C and position. Scratch grows with S and E, not with L or C.
#include "ops/chunk_attention.h"

#include <cmath>

#include "core/dropkey.h"
#include "core/gemm.h"
#include "core/rows.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// One chunk of one row and head. Places 0 .. keys - 1 are its keys; those below `first` came before this call, are in
// the caches and are no queries.
struct Chunk {
  int64_t b, h, first, keys;
  int64_t token;   // place r is token `token + r` of the row
  uint32_t start;  // the absolute position of place 0
  int64_t queries() const { return keys > first ? keys - first : 0; }
};

inline Chunk chunk_of(const ChunkAttention& args, int64_t bh, int64_t c) {
  Chunk chunk{};
  chunk.b = bh / args.H;
  chunk.h = bh % args.H;
  const int64_t position = args.position == nullptr ? 0 : args.position[chunk.b];
  const int64_t m = position % args.C;
  chunk.first = c == 0 ? m : 0;
  chunk.token = c * args.C - m;
  chunk.keys = std::min(args.C, args.L - chunk.token);
  chunk.start = static_cast<uint32_t>(static_cast<uint64_t>(position - m + c * args.C));
  return chunk;
}

// The rows of keys (n = S) or values (n = E), or of their gradients, of a chunk: first from the cache, then from the
// tensor.
template <class T>
struct Rows {
  T* cached;
  T* fresh;
  int64_t stride, first;

  Rows(const ChunkAttention& args, const Chunk& chunk, void* tensor, void* cache, int64_t n)
      : cached(static_cast<T*>(cache)), fresh(static_cast<T*>(tensor)), stride(args.H * n), first(chunk.first) {
    if (first > 0) cached += (chunk.b * args.C * args.H + chunk.h) * n;
    fresh += ((chunk.b * args.L + chunk.token) * args.H + chunk.h) * n;
  }
  T* row(int64_t place) const { return (place < first ? cached : fresh) + place * stride; }
};

template <class T>
Rows<T> rows_of(const ChunkAttention& args, const Chunk& chunk, const void* tensor, const void* cache, int64_t n) {
  return Rows<T>(args, chunk, const_cast<void*>(tensor), const_cast<void*>(cache), n);
}

// Columns [column, column + n) of places [begin, end) into the first rows of panels of `panel_rows` rows.
template <class T, class A>
void pack_places(const Rows<T>& rows, int64_t begin, int64_t end, int64_t column, int64_t n, A* panels,
                 int64_t panel_rows, int64_t ahead = 0) {
  constexpr int64_t P = kPanel<A>;
  const int64_t middle = std::min(std::max(begin, rows.first), end);
  for (int64_t c = 0; c < n; c += P) {
    A* panel = panels + c * panel_rows;
    pack_panel(rows.row(begin) + column + c, rows.stride, middle - begin, n - c, panel, ahead);
    panel += (middle - begin) * P;
    pack_panel(rows.row(middle) + column + c, rows.stride, end - middle, n - c, panel, ahead);
  }
}

// ---- forward ----

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
      pack_places(values_, j, j + n, e, std::min(P, args_.E - e), values_packed_, n, args_.E - e >= 2 * P ? P : 0);
      A* output = output_ + e * kQueries;
      if (rescale) scale_rows(output);
      for (int64_t p = 0; p * P < queries_; ++p) {
        const A* weights = scores_ + p * args_.key_rows * P;
        for (int64_t i = 0; i < panel_queries(p); i += kMicroRows) {
          const int64_t rows = std::min<int64_t>(kMicroRows, panel_queries(p) - i);
          const int64_t count = visible(p * P + i + rows - 1, j, n);
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

template <class T>
void forward(const ChunkAttentionForward& args) {
  using A = stat_t<T>;
  parallel_for(args.deal.slots, 1, [&](int64_t begin, int64_t end) {
    A* scratch = static_cast<A*>(args.workspace) + begin * args.scratch;
    for (int64_t round = 0; round < args.deal.rounds(); ++round) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t item = args.deal.item(round, slot);
        if (item >= args.deal.items) continue;
        const int64_t tile = item % args.tiles, c = item / args.tiles % args.chunks;
        const Chunk chunk = chunk_of(args, item / args.tiles / args.chunks, c);
        if (tile * args.kQueries < chunk.queries()) ForwardTile<T>(args, chunk, tile, scratch).run();
      }
    }
  });
}

// ---- backward ----

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
  int64_t first_query(int64_t p) const {
    return std::max(int64_t{0}, key_ + p * P - place_) / kMicroRows * kMicroRows;
  }

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
        multiply(queries_ - i, columns, dout_packed_ + i * P, queries_,
                 values_transposed_ + p * P * args_.E + e * P, dweights_ + (p * queries_ + i) * P, e > 0);
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

// D = sum over e of do o, for every token and head.
template <class T>
void multiply_outputs(const ChunkAttentionBackward& args) {
  using A = stat_t<T>;
  const auto* dout = static_cast<const T*>(args.dout);
  const auto* o = static_cast<const T*>(args.o);
  auto* D = static_cast<A*>(args.workspace);
  parallel_for(args.B * args.L, grain_of_rows(args.H * args.E), [&](int64_t begin, int64_t end) {
    for (int64_t bt = begin; bt < end; ++bt) {
      for (int64_t h = 0; h < args.H; ++h) {
        const int64_t row = (bt * args.H + h) * args.E;
        Vec<A> sum = {};
        for (int64_t e = 0; e < args.E; e += kLanes<A>) {
          sum = load(dout + row + e, args.E - e) * load(o + row + e, args.E - e) + sum;
        }
        D[(bt / args.L * args.H + h) * args.L + bt % args.L] = sum_lanes<A>(sum);
      }
    }
  });
}

// dq = the sum of the groups' partial sums that reach the token, in order.
template <class T>
void add_groups(const ChunkAttentionBackward& args) {
  using A = stat_t<T>;
  const int64_t n = args.H * args.S, size = args.B * args.L * n;
  const A* partial = static_cast<const A*>(args.workspace) + args.B * args.L * args.H;
  parallel_for(args.B * args.L, grain_of_rows(n), [&](int64_t begin, int64_t end) {
    for (int64_t bt = begin; bt < end; ++bt) {
      const int64_t b = bt / args.L, t = bt % args.L;
      const int64_t m = args.position == nullptr ? 0 : args.position[b] % args.C;
      const Chunk chunk = chunk_of(args, b * args.H, (m + t) / args.C);
      const int64_t tile = (t - chunk.token - chunk.first) / args.kQueries;
      const int64_t last = std::min(chunk.keys, chunk.first + (tile + 1) * args.kQueries) - 1;
      const int64_t groups = std::min(args.groups, last / args.kKeys + 1);
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        Vec<A> sum = load(partial + bt * n + i, n - i);
        for (int64_t g = 1; g < groups; ++g) sum += load(partial + g * size + bt * n + i, n - i);
        store(static_cast<T*>(args.dq) + bt * n + i, sum, n - i);
      }
    }
  });
}

template <class T>
void backward(const ChunkAttentionBackward& args) {
  using A = stat_t<T>;
  const int64_t rows = args.B * args.L * args.H;
  if (args.k_cache != nullptr) {
    std::memset(args.dk_cache, 0, args.B * args.C * args.H * args.S * sizeof(T));
    std::memset(args.dv_cache, 0, args.B * args.C * args.H * args.E * sizeof(T));
  }
  multiply_outputs<T>(args);
  parallel_for(args.deal.slots, 1, [&](int64_t begin, int64_t end) {
    A* scratch = static_cast<A*>(args.workspace) + rows + args.groups * rows * args.S + begin * args.scratch;
    for (int64_t round = 0; round < args.deal.rounds(); ++round) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t item = args.deal.item(round, slot);
        if (item >= args.deal.items) continue;
        const int64_t group = item % args.groups, c = item / args.groups % args.chunks;
        const Chunk chunk = chunk_of(args, item / args.groups / args.chunks, c);
        if (chunk.queries() > 0) BackwardTile<T>(args, chunk, group, scratch).run();
      }
    }
  });
  add_groups<T>(args);
}

}  // namespace

void chunk_attention_forward(const ChunkAttentionForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void chunk_attention_backward(const ChunkAttentionBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_chunk_attention_forward_outputs(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                         int64_t chunk_size, double dropout_p, int64_t seed,
                                                         const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                         const DLTensor* v_cache, const DLTensor* position,
                                                         megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("chunk_attention");
    check_chunk_attention(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache, position,
                          Outputs(outputs));
  });
}

extern "C" int megalodon_chunk_attention_forward(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                 int64_t chunk_size, double dropout_p, int64_t seed,
                                                 const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                 const DLTensor* v_cache, const DLTensor* position, DLTensor* o,
                                                 DLTensor* lse, DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("chunk_attention");
    const ChunkAttentionForward args = check_chunk_attention(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens,
                                                             k_cache, v_cache, position, {o, lse, workspace});
    check_positions(c, args.position, args.B);
    run_on(c, args, cpu::chunk_attention_forward, stream);
  });
}

extern "C" int megalodon_chunk_attention_backward_outputs(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                          const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                          int64_t chunk_size, double dropout_p, int64_t seed,
                                                          const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                          const DLTensor* v_cache, const DLTensor* position,
                                                          megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("chunk_attention_backward");
    check_chunk_attention_backward(c, dout, q, k, v, o, lse, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache,
                                   position, Outputs(outputs));
  });
}

extern "C" int megalodon_chunk_attention_backward(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                  const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                  int64_t chunk_size, double dropout_p, int64_t seed,
                                                  const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                  const DLTensor* v_cache, const DLTensor* position, DLTensor* dq,
                                                  DLTensor* dk, DLTensor* dv, DLTensor* dk_cache, DLTensor* dv_cache,
                                                  DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("chunk_attention_backward");
    const ChunkAttentionBackward args =
        check_chunk_attention_backward(c, dout, q, k, v, o, lse, chunk_size, dropout_p, seed, cu_seqlens, k_cache,
                                       v_cache, position, {dq, dk, dv, dk_cache, dv_cache, workspace});
    check_positions(c, args.position, args.B);
    run_on(c, args, cpu::chunk_attention_backward, stream);
  });
}
#endif
