// chunk_attention backward: the kernels of a round.
#pragma once

#include "core/reduce.cuh"
#include "ops/chunk_attention_rounds.cuh"

namespace megalodon::cuda {
namespace {

template <class Tile>
struct BackwardScratch {
  using A = typename Tile::Sum;
  typename Tile::Weight* P;   // [strips, query_tiles, kTile, kTile]
  typename Tile::Weight* dS;  // likewise
  A* D;                       // [B, H, L]
  A* dq;                      // [B, L, H, S], what earlier rounds have summed
  int64_t query_tiles, strips;

  BackwardScratch(const ChunkAttentionBackward& args) {
    constexpr int64_t kTile = Tile::kTile;
    query_tiles = Strips::of(args, kTile, true).partners;
    const int64_t strip = query_tiles * kTile * kTile;
    strips = strip == 0 ? 0 : args.scratch / (2 * strip * int64_t{sizeof(typename Tile::Weight)});
    P = reinterpret_cast<typename Tile::Weight*>(aligned(args.workspace));
    dS = P + strips * strip;
    D = reinterpret_cast<A*>(aligned(args.workspace) + args.scratch);
    dq = D + round_up(args.sequences.tokens() * args.H, 4);
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) clear_kernel(T* x, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * kTileThreads;
  for (int64_t i = int64_t{blockIdx.x} * kTileThreads + threadIdx.x; i < n; i += step) x[i] = T{};
}

template <class T>
void clear(void* x, int64_t n, void* stream) {
  if (n == 0) return;
  const int64_t blocks = ceil_div(n, 4 * kTileThreads);
  launch({"chunk_attention_clear", dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kTileThreads), 0,
          stream},
         clear_kernel<T>, static_cast<T*>(x), n);
}

// D = sum over e of do o: a warp per token and head.
template <class T, int V>
__global__ void __launch_bounds__(kTileThreads)
    chunk_attention_dot_kernel(const T* dout, const T* o, stat_t<T>* D, int64_t tokens, int64_t L, int64_t H,
                               int64_t E) {
  using A = stat_t<T>;
  constexpr int kWarps = kTileThreads / 32;
  const int64_t rows = tokens * H, step = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < rows; row += step) {
    A sum = 0;
    for (int64_t e = threadIdx.x % 32 * V; e < E; e += 32 * V) {
      const Pack<T, V> x = load<V>(dout + row * E + e), y = load<V>(o + row * E + e);
      UNROLL
      for (int i = 0; i < V; ++i) sum += widen(x.v[i]) * widen(y.v[i]);
    }
    sum = warp_sum(sum);
    const int64_t b = row / H / L, t = row / H % L, h = row % H;
    if (threadIdx.x % 32 == 0) D[(b * H + h) * L + t] = sum;
  }
}

template <class T, int V, class A>
void launch_dot(const ChunkAttentionBackward& args, A* D, void* stream) {
  const int64_t blocks = ceil_div(args.sequences.tokens() * args.H, kTileThreads / 32);
  launch({"chunk_attention_dot", dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kTileThreads), 0,
          stream},
         chunk_attention_dot_kernel<T, V>, static_cast<const T*>(args.dout), static_cast<const T*>(args.o), D,
         args.sequences.tokens(), args.sequences.length, args.H, args.E);
}

// Block (query tile, strip).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_weigh_backward_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  using Weight = typename Tile::Weight;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  DYNAMIC_SHARED(typename Tile::Stage, slabs);
  SHARED(ScoreTile, place);  // here the registers are those of the products
  {
    const auto [chunk, key] = round.at(args, blockIdx.y);
    const ScoreTile at{chunk, (args.sliding ? key : chunk.first) + int64_t{blockIdx.x} * kTile, key};
    if (!at.any(kTile, args.C)) return;
    if (threadIdx.x == 0) place = at;
  }
  sync_block();  // it is there
  // Rows along n numbers each: what belongs to the queries by what belongs to the keys.
  Tile tile;
  const auto set_product = [&](const void* of_queries, const void* of_keys, const void* cache, int64_t n) {
    const ScoreTile at = place;
    const QueryRows<const T> queries(args, at.chunk, static_cast<const T*>(of_queries), n);
    const KeyRows<const T> keys(args, at.chunk, static_cast<const T*>(of_keys), static_cast<const T*>(cache), n);
    tile.clear();
    multiply(tile, slabs, 0, n, operand_of<V, true>(queries, at.query, at.chunk.end, 0, n),
             operand_of<V, true>(keys, at.key, at.chunk.keys, 0, n));
  };
  set_product(args.q, args.k, args.k_cache, args.S);
  const ScoreTile at = place;
  hide_keys(tile, args, at);
  const A infinity = static_cast<A>(INFINITY);
  const auto statistic_of = [&](const A* statistics, int row, A none) {
    const int64_t query = place.query + row;
    return query < place.chunk.end ? statistics[place.chunk.statistic + query] : none;
  };
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row(r);
    A shift = statistic_of(static_cast<const A*>(args.lse), row, infinity);
    if (shift == -infinity) shift = infinity;  // a query without keys
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) {
      const A score = tile.sum[r][c], weight = exp(score - shift);
      tile.sum[r][c] = score == -infinity ? A(0) : weight;
    }
  }
  const auto tile_of = [&](Weight* tiles) {  // found anew each time: registers
    return tiles + (anew(blockIdx.y) * scratch.query_tiles + blockIdx.x) * kTile * kTile;
  };
  const auto put_tile = [&](Weight* to) {
    tile.template for_packs<Weight>([&](int r, int c, const auto& pack) { store(to + r * kTile + c, pack); });
  };
  if (args.drops_weights) {  // all of them are needed once more, where dS will be
    put_tile(tile_of(scratch.dS));
    set_dropped(tile, args, at, A(0));
    UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) tile.sum[r][c] *= static_cast<A>(args.kept_scale);
    }
  }
  put_tile(tile_of(scratch.P));
  sync_warp();  // the weights are there: lanes that share a row have stored each other's
  set_product(args.dout, args.v, args.v_cache, args.E);
  // f(sum, weight, D, whole): where weights are dropped, whole is the weight before that. Back from memory, since the
  // registers had to hold the second product.
  const auto for_weights = [&](auto drops, auto&& f) {
    const Weight* const P = tile_of(scratch.P);
    const Weight* const dS = tile_of(scratch.dS);
    UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const int row = Tile::row(r);
      const A D = statistic_of(scratch.D, row, A(0));
      UNROLL
      for (int c = 0; c < Tile::kColumns; c += Tile::kRun) {
        const auto weights = load<Tile::kRun>(P + row * kTile + Tile::column(c));
        Pack<Weight, Tile::kRun> whole{};
        if constexpr (decltype(drops)::value) whole = load<Tile::kRun>(dS + row * kTile + Tile::column(c));
        UNROLL
        for (int i = 0; i < Tile::kRun; ++i) {
          f(tile.sum[r][c + i], widen(weights.v[i]), D, widen(whole.v[i]));
        }
      }
    }
  };
  if (args.drops_weights) {
    for_weights(std::true_type{}, [](A& sum, A weight, A D, A whole) {
      sum = whole == 0 ? whole : (weight == 0 ? weight : weight * sum) - whole * D;
    });
  } else {
    for_weights(std::false_type{}, [](A& sum, A weight, A D, A) { sum = weight == 0 ? weight : weight * (sum - D); });
  }
  sync_warp();  // all weights are read: lanes that share a row store over each other's
  put_tile(tile_of(scratch.dS));
}

// Block (tile of columns of dv, then of dk; strip). Product: their tile, whose rows are those of Tile, the scores'.
template <class T, class Tile, class Product, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Product, kPacked>)
    chunk_attention_dkv_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch) {
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  const auto [chunk, key] = round.at(args, blockIdx.y);
  if (key >= chunk.keys || chunk.queries() == 0) return;
  const int64_t value_tiles = ceil_div(args.E, Product::kTileColumns);
  const bool is_value = blockIdx.x < value_tiles;
  const int64_t column = (is_value ? blockIdx.x : blockIdx.x - value_tiles) * Product::kTileColumns,
                columns = is_value ? args.E : args.S;
  const QueryRows<const T> rows(args, chunk, static_cast<const T*>(is_value ? args.dout : args.q), columns);
  // The first query's tile; sliding, those before it have none.
  const int64_t first = args.sliding ? (chunk.first - key) / kTile : 0;
  const WeightsOperand<Tile, false> weights{
      (is_value ? scratch.P : scratch.dS) + (blockIdx.y * scratch.query_tiles + first) * kTile * kTile, kTile * kTile};
  // From the tile of the first query that sees a key.
  const int64_t begin = key <= chunk.first ? 0 : (key - chunk.first) / kTile * kTile;
  Product tile;
  tile.clear();
  multiply(tile, slabs, begin, chunk.queries(), weights,
           operand_of<V, false>(rows, chunk.first, chunk.end, column, columns));
  const KeyRows<T> out(args, chunk, static_cast<T*>(is_value ? args.dv : args.dk),
                       static_cast<T*>(is_value ? args.dv_cache : args.dk_cache), columns);
  write_rows<kPacked>(tile, out, key, chunk.keys, column, columns);
}

// The chunks that a round has strips of may have tiles of queries with the numbers of strips of other rounds.
struct Queries {
  int64_t first, end;
  explicit Queries(const Round& round) {
    const auto& [strips, first_strip, count] = round;
    if (strips.sliding) {
      first = first_strip;
      end = first_strip + count + strips.partners - 1;
    } else if (strips.packed) {
      first = first_strip - (strips.tiles - 1);
      end = first_strip + count + strips.tiles - 1;
    } else {
      first = first_strip / strips.tiles * strips.tiles;
      end = round_up(first_strip + count, strips.tiles);
    }
    first = first < 0 ? 0 : first;
    end = end < strips.count ? end : strips.count;
  }
};

// A tile of queries whose dq a round adds to: the keys from `key` to `end` whose strips it has, of which the first is
// number `strip` of the round, `skipped` after the chunk's first.
struct QueryWork {
  Chunk chunk;
  int64_t query, queries_end, key, end, strip, skipped, index, step;

  static DEVICE QueryWork of(const ChunkAttention& args, const Round& round, int64_t number, int64_t tile) {
    const auto [chunk, query, first_strip, first_key, index, step] = round.strips.queries_at(args, number);
    const bool is_tile = query >= chunk.first && query < chunk.end;
    const int64_t queries_end = query + tile < chunk.end ? query + tile : chunk.end;
    const int64_t skipped = first_strip < round.first ? round.first - first_strip : 0;
    const int64_t key = first_key + skipped * tile;
    const int64_t round_end = first_key + (round.first + round.count - first_strip) * tile;
    const int64_t end = !is_tile ? key : round_end < queries_end ? round_end : queries_end;
    return {chunk, query, queries_end, key, end, first_strip + skipped - round.first, skipped, index, step};
  }
  DEVICE bool any() const { return key < end; }
  // Of dS, the tile that belongs to the first key, and how far the next one is.
  DEVICE int64_t tile(int64_t query_tiles) const { return strip * query_tiles + index + skipped * step; }
  DEVICE int64_t stride(int64_t query_tiles) const { return query_tiles + step; }
};

// Adds what earlier rounds have summed, and writes the sums, or dq if they are complete.
template <class T, bool kPacked, class Product, class A>
DEVICE void write_dq(Product& tile, const ChunkAttentionBackward& args, const QueryWork& work, int64_t column, A* dq) {
  const QueryRows<A> sums(args, work.chunk, dq, args.S);  // used where a chunk takes several rounds
  if (work.skipped > 0) {
    const int64_t left = args.S - column;
    const int rows = static_cast<int>(work.queries_end - work.query);
    const int columns = left < Product::kTileColumns ? static_cast<int>(left) : Product::kTileColumns;
    UNROLL
    for (int r = 0; r < Product::kRows; ++r) {
      const A* const row = sums.row(work.query + Product::row(r)) + column;
      UNROLL
      for (int c = 0; c < Product::kColumns; ++c) {
        if (Product::row(r) < rows && Product::column(c) < columns) tile.sum[r][c] += row[Product::column(c)];
      }
    }
  }
  if (work.end < work.queries_end) {
    write_rows<kPacked>(tile, sums, work.query, work.queries_end, column, args.S);
  } else {
    const QueryRows<T> rows(args, work.chunk, static_cast<T*>(args.dq), args.S);
    write_rows<kPacked>(tile, rows, work.query, work.queries_end, column, args.S);
  }
}

// Block (query tile, tile of columns of dq), likewise.
template <class T, class Tile, class Product, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, Tile::kTile == 64 ? kBlocks<T, Product, kPacked> : 1)
    chunk_attention_dq_kernel(ChunkAttentionBackward args, Round round, Queries tiles, BackwardScratch<Tile> scratch) {
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  const auto work = QueryWork::of(args, round, tiles.end - 1 - blockIdx.x, kTile);  // of a chunk the longest rows first
  if (!work.any()) return;
  const int64_t column = int64_t{blockIdx.y} * Product::kTileColumns;
  const WeightsOperand<Tile, true> weights{scratch.dS + work.tile(scratch.query_tiles) * kTile * kTile,
                                           work.stride(scratch.query_tiles) * kTile * kTile};
  const KeyRows<const T> keys(args, work.chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache),
                              args.S);
  Product tile;
  tile.clear();
  multiply(tile, slabs, 0, work.end - work.key, weights,
           operand_of<V, false>(keys, work.key, work.chunk.keys, column, args.S));
  write_dq<T, kPacked>(tile, args, work, column, scratch.dq);
}

// Tiles of columns of dv, and of dk.
template <class Product>
MEGALODON_HOST_DEVICE unsigned value_columns_of(const ChunkAttention& args) {
  return static_cast<unsigned>(ceil_div(args.E, Product::kTileColumns));
}
template <class Product>
MEGALODON_HOST_DEVICE unsigned key_columns_of(const ChunkAttention& args) {
  return static_cast<unsigned>(ceil_div(args.S, Product::kTileColumns));
}

template <class T, class Tile, class Product, bool kPacked>
void launch_backward(const ChunkAttentionBackward& args, const Round& round, const BackwardScratch<Tile>& scratch,
                     void* stream) {
  const dim3 block(kTileThreads);
  const unsigned key_columns = key_columns_of<Product>(args), columns = value_columns_of<Product>(args) + key_columns;
  if (columns > 0) {
    launch(
        {"chunk_attention_dkv", dim3(columns, static_cast<unsigned>(round.count)), block, kSlabBytes<Product>, stream},
        chunk_attention_dkv_kernel<T, Tile, Product, kPacked>, args, round, scratch);
  }
  if (key_columns > 0) {
    const Queries queries(round);
    launch({"chunk_attention_dq", dim3(static_cast<unsigned>(queries.end - queries.first), key_columns), block,
            kSlabBytes<Product>, stream},
           chunk_attention_dq_kernel<T, Tile, Product, kPacked>, args, round, queries, scratch);
  }
}

// launch_products(args, round, scratch, stream): dv, dk and dq.
template <class T, class Tile, bool kPacked, class Launch>
void backward(const ChunkAttentionBackward& args, void* stream, Launch&& launch_products) {
  const BackwardScratch<Tile> scratch(args);
  launch_dot<T, kPacked ? kPackOf<T> : 1>(args, scratch.D, stream);
  for_rounds(Strips::of(args, Tile::kTile, true), scratch.strips, [&](const Round& round) {
    launch({"chunk_attention_weigh_backward",
            dim3(static_cast<unsigned>(scratch.query_tiles), static_cast<unsigned>(round.count)), dim3(kTileThreads),
            kSlabBytes<Tile>, stream},
           chunk_attention_weigh_backward_kernel<T, Tile, kPacked>, args, round, scratch);
    launch_products(args, round, scratch, stream);
  });
}

}  // namespace
}  // namespace megalodon::cuda
