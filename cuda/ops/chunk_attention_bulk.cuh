// chunk_attention: the tiles of o, dv, dk and dq of a round by tensor copies, in pairs of strips of one chunk, which
// share the slabs of v, dout, q or k.
#pragma once

#include "core/bulk_product.cuh"
#include "ops/chunk_attention_backward.cuh"
#include "ops/chunk_attention_forward.cuh"

namespace megalodon::cuda {
namespace {

// Whether copies can bring the operands: rows of this call alone, whose numbers the coordinates of a copy can hold.
bool uses_bulk(const ChunkAttention& args) {
  return !args.sliding && !args.cached && args.S > 0 && args.E > 0 && args.sequences.tokens() < int64_t{1} << 31;
}

// Rows of q, k, v or dout, n numbers for each head, as copies see them, so many at a time.
TensorMap rows_map(const char* kernel, const ChunkAttention& args, const void* tensor, int64_t n, int rows = 64) {
  return tensor_map(kernel, tensor, {n, args.H, args.sequences.tokens()}, {n, args.H * n}, rows);
}
// Tiles of weights: `lines` rows at a time.
template <class Tile>
TensorMap weights_map(const char* kernel, const void* weights, int64_t tiles, int lines) {
  return tensor_map(kernel, weights, {Tile::kTile, 1, tiles * Tile::kTile}, {Tile::kTile, Tile::kTile}, lines);
}

// The operand b: rows of a chunk and 64 columns a part, whose depth 0 is row `row` of the batch.
struct BulkRows {
  const TensorMap* map;
  int column, h, row;

  template <class Slab, class... Ranks>
  DEVICE void copy(Slab& slab, int part, int64_t depth, Barrier& barrier, Ranks... ranks) const {
    tensor_copy(slab.v + part * 64 * 64, *map, column + part * 64, h, row + static_cast<int>(depth), barrier, ranks...);
  }
};

// The operand a: tiles of weights one after another along the depth, `stride` tiles apart.
template <class Tile, bool along_depth>
struct BulkWeights {
  static constexpr bool kAlongDepth = along_depth;
  static constexpr int kTile = Tile::kTile;
  const TensorMap* map;
  int64_t tile, stride;

  template <class Slab>
  DEVICE void copy(Slab& slab, int64_t depth, Barrier& barrier) const {
    const auto row = static_cast<int>((tile + depth / kTile * stride) * kTile), rest = static_cast<int>(depth % kTile);
    if constexpr (kAlongDepth) {
      tensor_copy(slab.v, *map, rest, 0, row, barrier);
    } else {
      for (int part = 0; part < kTile / 64; ++part) {
        tensor_copy(slab.v + part * 64 * 64, *map, part * 64, 0, row + rest, barrier);
      }
    }
  }
};

DEVICE bool is_same(const Chunk& a, const Chunk& b) { return a.token == b.token && a.h == b.h; }

// Paired block (tile of columns of o, strip), as chunk_attention_forward_kernel.
template <class T, class Tile, class Product>
__global__ void __launch_bounds__(kBulkThreads, 1)
    chunk_attention_bulk_forward_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch,
                                        GRID_CONSTANT TensorMap weights, GRID_CONSTANT TensorMap values) {
  constexpr int kTile = Tile::kTile;
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  SHARED(BulkRing<Product>, ring);
  SHARED(RowStatistics<Tile>, rows);
  SHARED(Out<T>, out);
  const auto block = PairedBlock::of<Product>(columns_of<Product>(args));
  const int64_t strip = round.count - 1 - block.strip;  // of a chunk the longest rows first; there may be none
  const auto strip_at = [&](int64_t number) { return number < 0 ? Strips::Strip{} : round.at(args, number); };
  const Strips::Strip own = strip_at(strip);
  const Chunk& chunk = own.chunk;
  const int64_t query = own.place;
  const auto end_of = [&](const Strips::Strip& s) {
    return s.place >= s.chunk.end ? 0 : s.place + kTile < s.chunk.end ? s.place + kTile : s.chunk.end;
  };
  const int64_t end = end_of(own);
  if (threadIdx.x == 0) {
    const auto partner = strip_at(round.count - 1 - block.partner);
    ring.init(bulk_slabs<Product>(0, end, is_same(chunk, partner.chunk), 0, end_of(partner)));
    out = Out<T>::of(args, chunk, query, end);
  }
  const int64_t tile_number = strip * scratch.key_tiles;
  const auto bring = [&] {
    ring.bring(slabs, BulkWeights<Tile, true>{&weights, tile_number, 1},
               BulkRows{&values, static_cast<int>(block.column), chunk.h, static_cast<int>(chunk.token)});
  };
  ring.run(bring, [&] {
    const auto* maxima = scratch.maxima + tile_number * scratch.kParts * kTile;
    const auto* sums = scratch.sums + tile_number * scratch.kParts * kTile;
    if (threadIdx.x < kTile) rows.gather(args, chunk, query, end, maxima, sums, block.column == 0);
    ring.own.arrive();
    ring.own.wait(0);
    Product tile;
    tile.clear();
    const RescaledWeightsOperand<Tile> rescaled{{}, maxima, rows.maximum};
    const bool rescales = rows.rescales();
    ring.template multiply<true>(tile, slabs, 1, [&](typename Product::Stage& stage, int64_t depth) {
      if (rescales) {
        ROLL for (int i = static_cast<int>(threadIdx.x); i < kTile * Product::kDepth / 8; i += kTileThreads) {
          const int row = i / (Product::kDepth / 8), in_slab = i % (Product::kDepth / 8) * 8;
          T* const place = Product::template place_of<true>(stage.a, row, in_slab);
          auto pack = load<8>(place);
          rescaled.change(pack, row, depth + in_slab);
          store(place, pack);
        }
      }
      return clear_behind<Product>(stage, depth, chunk.end) || rescales;
    });
    write_out<T, Tile, Product, true>(tile, rows, out, args, block.column);
  });
}

template <class T, class Tile, class Product>
void launch_bulk_forward(const ChunkAttentionForward& args, const Round& round, const ForwardScratch<Tile>& scratch,
                         void* stream) {
  const char* const kernel = "chunk_attention_bulk_forward";
  const dim3 grid = PairedBlock::grid(columns_of<Product>(args), round.count);
  launch({kernel, grid, dim3(kBulkThreads), kSlabBytes<Product>, stream, 2},
         chunk_attention_bulk_forward_kernel<T, Tile, Product>, args, round, scratch,
         weights_map<Tile>(kernel, scratch.weights, scratch.strips * scratch.key_tiles, Tile::kTile),
         rows_map(kernel, args, args.v, args.E));
}

// The operands of dv and dk.
struct BulkGradientMaps {
  TensorMap P, dS, dout, q;
};

// Paired block (tile of columns of dv, then of dk; strip), as chunk_attention_dkv_kernel.
template <class T, class Tile, class Product>
__global__ void __launch_bounds__(kBulkThreads, 1)
    chunk_attention_bulk_dkv_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch,
                                    GRID_CONSTANT BulkGradientMaps maps) {
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  SHARED(BulkRing<Product>, ring);
  const auto strip_at = [&](int64_t number) {
    return number >= round.count ? Strips::Strip{} : round.at(args, number);
  };
  const unsigned value_tiles = value_columns_of<Product>(args);
  const auto block = PairedBlock::of<Product>(value_tiles + key_columns_of<Product>(args));
  const Strips::Strip own = strip_at(block.strip);
  const Chunk& chunk = own.chunk;
  const int64_t key = own.place;
  if (threadIdx.x == 0) {
    // From the tile of the first query that sees a key: no chunk has queries that do not begin at place 0.
    const auto partner = strip_at(block.partner);
    const bool is_pair = is_same(chunk, partner.chunk) && partner.place < partner.chunk.keys;
    ring.init(bulk_slabs<Product>(key, chunk.end, is_pair, partner.place, partner.chunk.end));
  }
  const int64_t of_values = int64_t{value_tiles} * Product::kTileColumns;
  const bool is_value = block.column < of_values;
  const int64_t column = block.column - (is_value ? 0 : of_values), columns = is_value ? args.E : args.S;
  const auto bring = [&] {
    const BulkWeights<Tile, false> weights{is_value ? &maps.P : &maps.dS, block.strip * scratch.query_tiles, 1};
    ring.bring(
        slabs, weights,
        BulkRows{is_value ? &maps.dout : &maps.q, static_cast<int>(column), chunk.h, static_cast<int>(chunk.token)});
  };
  ring.run(bring, [&] {
    Product tile;
    tile.clear();
    ring.template multiply<false>(tile, slabs, 0, [&](typename Product::Stage& stage, int64_t depth) {
      return clear_behind<Product>(stage, depth, chunk.end);
    });
    const KeyRows<T> rows(args, chunk, static_cast<T*>(is_value ? args.dv : args.dk), nullptr, columns);
    write_rows<true>(tile, rows, key, chunk.keys, column, columns);
  });
}

// Paired block (tile of columns of dq, query tile), as chunk_attention_dq_kernel.
template <class T, class Tile, class Product>
__global__ void __launch_bounds__(kBulkThreads, 1)
    chunk_attention_bulk_dq_kernel(ChunkAttentionBackward args, Round round, Queries tiles,
                                   BackwardScratch<Tile> scratch, GRID_CONSTANT TensorMap weights,
                                   GRID_CONSTANT TensorMap keys) {
  constexpr int kTile = Tile::kTile;
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  SHARED(BulkRing<Product>, ring);
  SHARED(QueryWork, work);
  const auto block = PairedBlock::of<Product>(key_columns_of<Product>(args));
  if (threadIdx.x == 0) {
    const auto work_at = [&](int64_t index) {
      const int64_t number = tiles.end - 1 - index;  // of a chunk the longest rows first
      return number < tiles.first ? QueryWork{} : QueryWork::of(args, round, number, kTile);
    };
    work = work_at(block.strip);
    const QueryWork partner = work_at(block.partner);
    const bool is_pair = is_same(work.chunk, partner.chunk) && work.key == partner.key;
    ring.init(bulk_slabs<Product>(0, work.end - work.key, is_pair, 0, partner.end - partner.key));
  }
  const auto bring = [&] {
    ring.bring(
        slabs, BulkWeights<Tile, true>{&weights, work.tile(scratch.query_tiles), work.stride(scratch.query_tiles)},
        BulkRows{&keys, static_cast<int>(block.column), work.chunk.h, static_cast<int>(work.chunk.token + work.key)});
  };
  ring.run(bring, [&] {
    Product tile;
    tile.clear();
    ring.template multiply<true>(tile, slabs, 0, [&](typename Product::Stage& stage, int64_t depth) {
      return clear_behind<Product>(stage, depth, work.chunk.end - work.key);
    });
    write_dq<T, true>(tile, args, work, block.column, scratch.dq);
  });
}

template <class T, class Tile, class Product>
void launch_bulk_backward(const ChunkAttentionBackward& args, const Round& round, const BackwardScratch<Tile>& scratch,
                          void* stream) {
  const int64_t tiles = scratch.strips * scratch.query_tiles;
  const dim3 threads(kBulkThreads);
  {
    const char* const kernel = "chunk_attention_bulk_dkv";
    const BulkGradientMaps maps{weights_map<Tile>(kernel, scratch.P, tiles, 64),
                                weights_map<Tile>(kernel, scratch.dS, tiles, 64),
                                rows_map(kernel, args, args.dout, args.E), rows_map(kernel, args, args.q, args.S)};
    const dim3 grid = PairedBlock::grid(value_columns_of<Product>(args) + key_columns_of<Product>(args), round.count);
    launch({kernel, grid, threads, kSlabBytes<Product>, stream, 2}, chunk_attention_bulk_dkv_kernel<T, Tile, Product>,
           args, round, scratch, maps);
  }
  {
    const char* const kernel = "chunk_attention_bulk_dq";
    const Queries queries(round);
    const dim3 grid = PairedBlock::grid(key_columns_of<Product>(args), queries.end - queries.first);
    launch({kernel, grid, threads, kSlabBytes<Product>, stream, 2}, chunk_attention_bulk_dq_kernel<T, Tile, Product>,
           args, round, queries, scratch, weights_map<Tile>(kernel, scratch.dS, tiles, Tile::kTile),
           rows_map(kernel, args, args.k, args.S));
  }
}

}  // namespace
}  // namespace megalodon::cuda
