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
};

// Block (tile of columns of o, strip). The first one of the columns also writes lse. Product: the tile of o, whose rows
// are those of Tile, the scores'.
template <class T, class Tile, class Product, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Product, kPacked>)
    chunk_attention_forward_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  static_assert(Product::kTile == kTile);
  DYNAMIC_SHARED(typename Product::Stage, slabs);
  SHARED(unsigned, differing, [kTile / 32]);  // lanes with rows whose parts have different maxima
  SHARED(A, maximum, [kTile]);
  SHARED(A, inverse, [kTile]);
  SHARED(Out<T>, out);                                 // here the registers are those of the product
  const int64_t strip = round.count - 1 - blockIdx.y;  // of a chunk the longest rows first
  const auto [chunk, query] = round.at(args, strip);
  if (query >= chunk.end) return;
  const int64_t end = query + kTile < chunk.end ? query + kTile : chunk.end;
  if (threadIdx.x == 0) {
    out = {QueryRows<T>(args, chunk, static_cast<T*>(args.o), args.E).row(query), static_cast<int>(end - query)};
  }
  const int64_t column = int64_t{blockIdx.x} * Product::kTileColumns;
  const A* maxima = scratch.maxima + strip * scratch.key_tiles * scratch.kParts * kTile;
  const A* sums = scratch.sums + strip * scratch.key_tiles * scratch.kParts * kTile;
  if (threadIdx.x < kTile) {
    const A lowest = -static_cast<A>(INFINITY);
    A best = lowest;
    const int64_t parts = ceil_div(end, Tile::kRowColumns);
    for (int64_t part = 0; part < parts; ++part) {
      const A other = maxima[part * kTile + threadIdx.x];
      best = other > best ? other : best;
    }
    const A shift = best == lowest ? A(0) : best;
    A sum = 0;
    bool differs = false;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t i = part * kTile + threadIdx.x;
      differs |= maxima[i] != best && maxima[i] != lowest;
      sum += sums[i] * exp(maxima[i] - shift);
    }
    const unsigned lanes = ballot(differs);
    if (threadIdx.x % 32 == 0) differing[threadIdx.x / 32] = lanes;
    maximum[threadIdx.x] = shift;
    inverse[threadIdx.x] = sum == 0 ? A(0) : static_cast<A>(args.kept_scale) / sum;
    const int64_t place = query + threadIdx.x;
    if (blockIdx.x == 0 && place < end) {
      static_cast<A*>(args.lse)[chunk.statistic + place] = best + log(sum);
    }
  }
  sync_block();  // the rows' maxima and sums are there, and where o lies
  const KeyRows<const T> values(args, chunk, static_cast<const T*>(args.v), static_cast<const T*>(args.v_cache),
                                args.E);
  const auto values_operand = operand_of<V, false>(values, 0, chunk.keys, column, args.E);
  const WeightsOperand<Tile, true> weights{scratch.weights + strip * scratch.key_tiles * kTile * kTile, kTile * kTile};
  bool rescales = sizeof(typename Tile::Weight) == sizeof(A);
  UNROLL
  for (int i = 0; i < kTile / 32; ++i) rescales |= differing[i] != 0;
  Product tile;
  tile.clear();
  if (rescales) {
    multiply(tile, slabs, 0, end, RescaledWeightsOperand<Tile>{weights, maxima, maximum}, values_operand);
  } else if constexpr (sizeof(typename Tile::Weight) < sizeof(A)) {
    multiply(tile, slabs, 0, end, weights, values_operand);
  }
  UNROLL
  for (int r = 0; r < Product::kRows; ++r) {
    UNROLL
    for (int c = 0; c < Product::kColumns; ++c) tile.sum[r][c] *= inverse[Product::row(r)];
  }
  write_rows<kPacked>(tile, QueryRows<T>{out.first, args.H * args.E}, 0, out.rows, column, args.E);
}

template <class T, class Tile, class Product, bool kPacked>
void forward(const ChunkAttentionForward& args, void* stream) {
  const ForwardScratch<Tile> scratch(args);
  // One block even where E is 0, since it writes lse.
  const auto columns = static_cast<unsigned>(args.E == 0 ? 1 : ceil_div(args.E, Product::kTileColumns));
  for_rounds(Strips::of(args, Tile::kTile, false), scratch.strips, [&](const Round& round) {
    const auto key_tiles = static_cast<unsigned>(scratch.key_tiles), y = static_cast<unsigned>(round.count);
    launch({"chunk_attention_weigh", dim3(key_tiles, y), dim3(kTileThreads), kSlabBytes<Tile>, stream},
           chunk_attention_weigh_kernel<T, Tile, kPacked>, args, round, scratch);
    launch({"chunk_attention_forward", dim3(columns, y), dim3(kTileThreads), kSlabBytes<Product>, stream},
           chunk_attention_forward_kernel<T, Tile, Product, kPacked>, args, round, scratch);
  });
}

}  // namespace
}  // namespace megalodon::cuda
