// What the kernels of chunk_attention are made of: the operands of their products, and what a tile of scores is.
#pragma once

#include "core/mma.cuh"
#include "core/philox.h"
#include "core/tile_product.cuh"
#include "ops/chunk_attention.h"

namespace megalodon::cuda {

// The rows of one of a chunk's tensors, from its place 0 on: first those in the cache, then those of this call.
template <class T>
struct Rows {
  T* cached;
  T* fresh;
  int64_t stride, first;

  DEVICE Rows(const ChunkAttention& args, const Chunk& chunk, T* tensor, T* cache, int64_t n)
      : cached(chunk.first > 0 ? cache + (chunk.sequence * args.C * args.H + chunk.h) * n : nullptr),
        fresh(tensor + (chunk.token * args.H + chunk.h) * n),
        stride(args.H * n),
        first(chunk.first) {}
  DEVICE T* row(int64_t place) const { return (place < first ? cached : fresh) + place * stride; }
};

// Rows [begin, end) of a chunk's tensor and its columns from `column` on, as an operand: zeros beyond both.
template <class T, int V, bool along_depth>
struct RowsOperand {
  using Element = T;
  static constexpr int kPack = V;
  static constexpr bool kAlongDepth = along_depth, kChanges = false;
  Rows<const T> rows;
  int64_t begin, end, column, columns;

  DEVICE const T* line(int row) const { return begin + row < end ? rows.row(begin + row) + column : nullptr; }
  DEVICE const T* at(const T* line, int64_t depth) const {
    return line == nullptr || column + depth >= columns ? nullptr : line + depth;
  }
  DEVICE const T* at(int row, int64_t depth) const {
    const int64_t place = begin + depth;
    return place >= end || column + row >= columns ? nullptr : rows.row(place) + column + row;
  }
};

// Tiles of weights in the workspace, one after another along the depth.
template <class Tile, bool along_depth>
struct WeightsOperand {
  using Element = typename Tile::Weight;
  static constexpr int kPack = kPackOf<Element>;
  static constexpr bool kAlongDepth = along_depth, kChanges = false;
  static constexpr int kTile = Tile::kTile;
  const Element* weights;
  int64_t tile_stride;

  DEVICE const Element* line(int row) const { return weights + row * kTile; }
  DEVICE const Element* at(const Element* line, int64_t depth) const {
    return line + depth / kTile * tile_stride + depth % kTile;
  }
  DEVICE const Element* at(int row, int64_t depth) const {
    return weights + depth / kTile * tile_stride + depth % kTile * kTile + row;
  }
};

// The same, with the rows of each part of kRowColumns brought from that part's maximum to the whole row's.
template <class Tile>
struct RescaledWeightsOperand : WeightsOperand<Tile, true> {
  using Base = WeightsOperand<Tile, true>;
  static constexpr bool kChanges = true;
  using A = typename Tile::Sum;
  using Weight = typename Tile::Weight;
  const A* part_maximum;  // [parts, kTile]
  const A* maximum;       // [kTile], in shared memory

  DEVICE void change(Pack<Weight, Base::kPack>& pack, int row, int64_t depth) const {
    const A scale = exp(part_maximum[depth / Tile::kRowColumns * Tile::kTile + row] - maximum[row]);
    UNROLL
    for (int i = 0; i < Base::kPack; ++i) pack.v[i] = narrow<Weight>(widen(pack.v[i]) * scale);
  }
};

// A tile of kTile queries and kTile keys of a chunk, by its first places.
struct ScoreTile {
  Chunk chunk;
  int64_t query, key;

  DEVICE int64_t queries_end(int size) const { return query + size < chunk.keys ? query + size : chunk.keys; }
  // Whether some query sees some key, and whether every query sees every key.
  DEVICE bool any(int size) const { return query < chunk.keys && key < queries_end(size); }
  DEVICE bool all(int size) const { return key + size <= query + 1 && query + size <= chunk.keys; }
};

// A bit for each of n <= 4 keys j, j + 1 .., set where it is dropped for query i; absolute positions.
template <int n>
DEVICE unsigned dropped_keys(const ChunkAttention& args, const Chunk& chunk, uint32_t j, uint32_t i) {
  uint32_t words[4];
  const auto b = static_cast<uint32_t>(chunk.sequence), h = static_cast<uint32_t>(chunk.h);
  dropkey_words(j >> 2, i, h, b, args.seed, words, MultiplyWide{});
  unsigned bits = 0;
  const unsigned skipped = j & 3;
  UNROLL
  for (unsigned w = 0; w < 4; ++w) bits |= static_cast<unsigned>(words[w] < args.drop_below) << w;
  if (skipped + n > 4) {
    dropkey_words((j + n - 1) >> 2, i, h, b, args.seed, words, MultiplyWide{});
    UNROLL
    for (unsigned w = 0; w < 4; ++w) bits |= static_cast<unsigned>(words[w] < args.drop_below) << (w + 4);
  }
  return bits >> skipped & ((1u << n) - 1);
}

// Sets the tile's numbers to `value` where the key is dropped.
template <class Tile>
DEVICE void set_dropped(Tile& tile, const ChunkAttention& args, const ScoreTile& at, typename Tile::Sum value) {
  // First the draws, as bits: the loop around them need not be unrolled.
  static_assert(Tile::kRows * Tile::kColumns <= 64);
  uint64_t dropped = 0;
  for (int n = Tile::kRows * Tile::kColumns - Tile::kRun; n >= 0; n -= Tile::kRun) {
    const auto i = static_cast<uint32_t>(at.query + Tile::row(n / Tile::kColumns));
    const auto j = static_cast<uint32_t>(at.key + Tile::column(n % Tile::kColumns));
    dropped = dropped << Tile::kRun | dropped_keys<Tile::kRun>(args, at.chunk, at.chunk.start + j, at.chunk.start + i);
  }
  UNROLL
  for (int n = 0; n < Tile::kRows * Tile::kColumns; ++n) {
    if (dropped >> n & 1) tile.sum[n / Tile::kColumns][n % Tile::kColumns] = value;
  }
}

// Sets the scores of the keys that a query does not see to -infinity.
template <class Tile>
DEVICE void hide_keys(Tile& tile, const ChunkAttention& args, const ScoreTile& at) {
  using A = typename Tile::Sum;
  const A lowest = -static_cast<A>(INFINITY);
  if (!at.all(Tile::kTile)) {
    UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t i = at.query + Tile::row(r);
      UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (at.key + Tile::column(c) > i || i >= at.chunk.keys) tile.sum[r][c] = lowest;
      }
    }
  }
  if (args.drop_below != 0 && !args.drops_weights) set_dropped(tile, args, at, lowest);
}

// The tile into rows `begin` .. end - 1 of a chunk's tensor, from column `column` of `columns` on.
template <bool kPacked, class T, class Tile>
DEVICE void write_rows(const Tile& tile, const Rows<T>& rows, int64_t begin, int64_t end, int64_t column,
                       int64_t columns) {
  tile.template for_packs<T>([&](int r, int c, const auto& pack) {
    const int64_t place = begin + r;
    if (place >= end) return;
    T* to = rows.row(place) + column + c;
    if constexpr (kPacked) {
      if (column + c < columns) store(to, pack);
    } else {
      UNROLL
      for (int i = 0; i < Tile::kRun; ++i) {
        if (column + c + i < columns) to[i] = pack.v[i];
      }
    }
  });
}

}  // namespace megalodon::cuda
