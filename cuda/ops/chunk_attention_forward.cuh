// chunk_attention forward: the kernels of a round.
#pragma once

#include "ops/chunk_attention_rounds.cuh"

namespace megalodon::cuda {
namespace {

template <class Tile>
struct ForwardScratch {
  using A = typename Tile::Sum;
  typename Tile::Weight* weights;  // [strips, key_tiles, kTile, kTile]
  A* maxima;                       // [strips, key_tiles, parts, kTile]
  A* sums;                         // likewise
  int64_t key_tiles, strips;
  static constexpr int kParts = Tile::kTile / Tile::kRowColumns;  // of a row, each with its own maximum

  ForwardScratch(const ChunkAttentionForward& args) {
    constexpr int64_t kTile = Tile::kTile;
    key_tiles = Strips::of(args, kTile, false).partners;
    const int64_t rows = key_tiles * kTile;
    strips = args.scratch / (rows * (kTile * int64_t{sizeof(typename Tile::Weight)} + 2 * kParts * int64_t{sizeof(A)}));
    weights = reinterpret_cast<typename Tile::Weight*>(aligned(args.workspace));
    maxima = reinterpret_cast<A*>(weights + strips * rows * kTile);
    sums = maxima + strips * rows * kParts;
  }
};

// What the weights of a row of scores up to `best` are relative to where they are stored as 16-bit numbers: a power of
// two, so that bringing them to another one is exact, and of these every 32nd (f16: 16th) alone, so that the parts of a
// row seldom need it: while their largest scores are between -11 and 11 (-0.7 and 10.4) it is 1. The largest weight is
// then below 2^16 (2^15) and not below 2^-16 (2^-1). Where float has no such powers left, `best` itself.
template <class Weight>
DEVICE float reference_of(float best) {
  constexpr float kStep = std::is_same_v<Weight, bf16> ? 32 : 16, kBelow = std::is_same_v<Weight, bf16> ? 16 : 1;
  if (!(best > -0x1p20f && best < 0x1p20f)) return best;
  return floor((best * kLog2E + kBelow) / kStep) * kStep * kLn2;
}

// Block (key tile, strip).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_weigh_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  DYNAMIC_SHARED(typename Tile::Stage, slabs);
  const auto [chunk, query] = round.at(args, blockIdx.y);
  const ScoreTile at{chunk, query, int64_t{blockIdx.x} * kTile};
  if (!at.any(kTile, args.C)) return;
  const QueryRows<const T> queries(args, chunk, static_cast<const T*>(args.q), args.S);
  const KeyRows<const T> keys(args, chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache), args.S);
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, args.S, operand_of<V, true>(queries, at.query, chunk.end, 0, args.S),
           operand_of<V, true>(keys, at.key, chunk.keys, 0, args.S));
  hide_keys(tile, args, at);
  const int64_t index = blockIdx.y * scratch.key_tiles + blockIdx.x;
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    A best = -static_cast<A>(INFINITY);
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) best = tile.sum[r][c] > best ? tile.sum[r][c] : best;
    UNROLL
    for (int bits = Tile::kRowLanes / 2; bits > 0; bits /= 2) {
      const A other = shuffle_xor(best, bits);
      best = other > best ? other : best;
    }
    if constexpr (sizeof(typename Tile::Weight) < sizeof(A)) best = reference_of<typename Tile::Weight>(best);
    const A shift = best == -static_cast<A>(INFINITY) ? A(0) : best;  // nothing visible
    A sum = 0;
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) sum += tile.sum[r][c] = exp(tile.sum[r][c] - shift);
    UNROLL
    for (int bits = Tile::kRowLanes / 2; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
    if (threadIdx.x % Tile::kRowLanes == 0) {
      const int64_t part = index * scratch.kParts + Tile::column(0) / Tile::kRowColumns;
      scratch.maxima[part * kTile + Tile::row(r)] = best;
      scratch.sums[part * kTile + Tile::row(r)] = sum;
    }
  }
  if (args.drops_weights) set_dropped(tile, args, at, A(0));
  typename Tile::Weight* weights = scratch.weights + index * kTile * kTile;
  tile.template for_packs<typename Tile::Weight>(
      [&](int r, int c, const auto& pack) { store(weights + r * kTile + c, pack); });
}

// Where a block's tile of o lies: its first row, and how many rows there are.
template <class T>
struct Out {
  T* first;
  int rows;

  static DEVICE Out of(const ChunkAttentionForward& args, const Chunk& chunk, int64_t query, int64_t end) {
    return {QueryRows<T>(args, chunk, static_cast<T*>(args.o), args.E).row(query), static_cast<int>(end - query)};
  }
};

// Of the rows of a strip, in shared memory.
template <class Tile>
struct RowStatistics {
  using A = typename Tile::Sum;
  static constexpr int kTile = Tile::kTile;
  unsigned differing[kTile / 32];  // lanes with rows whose parts have different maxima
  A maximum[kTile];
  A inverse[kTile];

  // By the threads of as many rows.
  DEVICE void gather(const ChunkAttentionForward& args, const Chunk& chunk, int64_t query, int64_t end, const A* maxima,
                     const A* sums, bool writes) {
    const int row = static_cast<int>(threadIdx.x);
    const A lowest = -static_cast<A>(INFINITY);
    A best = lowest;
    const int64_t parts = ceil_div(end, Tile::kRowColumns);
    for (int64_t part = 0; part < parts; ++part) {
      const A other = maxima[part * kTile + row];
      best = other > best ? other : best;
    }
    const A shift = best == lowest ? A(0) : best;
    A sum = 0;
    bool differs = false;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t i = part * kTile + row;
      differs |= maxima[i] != best && maxima[i] != lowest;
      sum += sums[i] * exp(maxima[i] - shift);
    }
    const unsigned lanes = ballot(differs);
    if (row % 32 == 0) differing[row / 32] = lanes;
    maximum[row] = shift;
    inverse[row] = sum == 0 ? A(0) : static_cast<A>(args.kept_scale) / sum;
    if (writes && query + row < end) static_cast<A*>(args.lse)[chunk.statistic + query + row] = best + log(sum);
  }
  DEVICE bool rescales() const {
    bool any = sizeof(typename Tile::Weight) == sizeof(A);
    UNROLL
    for (int i = 0; i < kTile / 32; ++i) any |= differing[i] != 0;
    return any;
  }
};

template <class T, class Tile, class Product, bool kPacked>
DEVICE void write_out(Product& tile, const RowStatistics<Tile>& rows, const Out<T>& out,
                      const ChunkAttentionForward& args, int64_t column) {
  UNROLL
  for (int r = 0; r < Product::kRows; ++r) {
    UNROLL
    for (int c = 0; c < Product::kColumns; ++c) tile.sum[r][c] *= rows.inverse[Product::row(r)];
  }
  write_rows<kPacked>(tile, QueryRows<T>{out.first, args.H * args.E}, 0, out.rows, column, args.E);
}

// Block (tile of columns of o, strip). The first one of the columns also writes lse. Product: the tile of o, whose rows
// are those of Tile, the scores'.
template <class T, class Tile, class Product, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Product, kPacked>)
    chunk_attention_forward_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  static_assert(Product::kTile == kTile);
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  SHARED(RowStatistics<Tile>, rows);
  SHARED(Out<T>, out);                                 // here the registers are those of the product
  const int64_t strip = round.count - 1 - blockIdx.y;  // of a chunk the longest rows first
  const auto [chunk, query] = round.at(args, strip);
  if (query >= chunk.end) return;
  const int64_t end = query + kTile < chunk.end ? query + kTile : chunk.end;
  if (threadIdx.x == 0) out = Out<T>::of(args, chunk, query, end);
  const int64_t column = int64_t{blockIdx.x} * Product::kTileColumns;
  const A* maxima = scratch.maxima + strip * scratch.key_tiles * scratch.kParts * kTile;
  const A* sums = scratch.sums + strip * scratch.key_tiles * scratch.kParts * kTile;
  if (threadIdx.x < kTile) rows.gather(args, chunk, query, end, maxima, sums, blockIdx.x == 0);
  sync_block();  // the rows' maxima and sums are there, and where o lies
  const KeyRows<const T> values(args, chunk, static_cast<const T*>(args.v), static_cast<const T*>(args.v_cache),
                                args.E);
  const auto values_operand = operand_of<V, false>(values, 0, chunk.keys, column, args.E);
  const WeightsOperand<Tile, true> weights{scratch.weights + strip * scratch.key_tiles * kTile * kTile, kTile * kTile};
  Product tile;
  tile.clear();
  if (rows.rescales()) {
    multiply(tile, slabs, 0, end, RescaledWeightsOperand<Tile>{weights, maxima, rows.maximum}, values_operand);
  } else if constexpr (sizeof(typename Tile::Weight) < sizeof(A)) {
    multiply(tile, slabs, 0, end, weights, values_operand);
  }
  write_out<T, Tile, Product, kPacked>(tile, rows, out, args, column);
}

// One block even where E is 0, since it writes lse.
template <class Product>
MEGALODON_HOST_DEVICE unsigned columns_of(const ChunkAttentionForward& args) {
  return static_cast<unsigned>(args.E == 0 ? 1 : ceil_div(args.E, Product::kTileColumns));
}

template <class T, class Tile, class Product, bool kPacked>
void launch_forward(const ChunkAttentionForward& args, const Round& round, const ForwardScratch<Tile>& scratch,
                    void* stream) {
  launch({"chunk_attention_forward", dim3(columns_of<Product>(args), static_cast<unsigned>(round.count)),
          dim3(kTileThreads), kSlabBytes<Product>, stream},
         chunk_attention_forward_kernel<T, Tile, Product, kPacked>, args, round, scratch);
}

// launch_product(args, round, scratch, stream): the tiles of o.
template <class T, class Tile, bool kPacked, class Launch>
void forward(const ChunkAttentionForward& args, void* stream, Launch&& launch_product) {
  const ForwardScratch<Tile> scratch(args);
  for_rounds(Strips::of(args, Tile::kTile, false), scratch.strips, [&](const Round& round) {
    launch({"chunk_attention_weigh", dim3(static_cast<unsigned>(scratch.key_tiles), static_cast<unsigned>(round.count)),
            dim3(kTileThreads), kSlabBytes<Tile>, stream},
           chunk_attention_weigh_kernel<T, Tile, kPacked>, args, round, scratch);
    launch_product(args, round, scratch, stream);
  });
}

}  // namespace
}  // namespace megalodon::cuda
