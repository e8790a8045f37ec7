// What the kernels of chunk_attention are made of: the operands of their products, and what a tile of scores is.
#pragma once

#include "core/mma.cuh"
#include "core/philox.h"
#include "core/tile_product.cuh"
#include "ops/chunk_attention.h"

namespace megalodon::cuda {

// The rows of a chunk's queries, of n numbers, or of what belongs to them.
template <class T>
struct QueryRows {
  using Element = T;
  T* fresh;
  int64_t stride;

  DEVICE QueryRows(T* fresh, int64_t stride) : fresh(fresh), stride(stride) {}
  DEVICE QueryRows(const ChunkAttention& args, const Chunk& chunk, T* tensor, int64_t n)
      : fresh(tensor + (chunk.token * args.H + chunk.h) * n), stride(args.H * n) {}
  DEVICE T* row(int64_t place) const { return fresh + place * stride; }
};

// Those of its keys: from place 0 on first those in the cache, a ring, then those of this call.
template <class T>
struct KeyRows : QueryRows<T> {
  T* cached;
  int64_t slots, wrap, first;

  DEVICE KeyRows(const ChunkAttention& args, const Chunk& chunk, T* tensor, T* cache, int64_t n)
      : QueryRows<T>(args, chunk, tensor, n), slots(args.C), wrap(args.C - chunk.slot), first(chunk.cached) {
    cached = first > 0 ? cache + ((chunk.sequence * args.C + chunk.slot) * args.H + chunk.h) * n : nullptr;
  }
  DEVICE T* row(int64_t place) const {
    if (place >= first) return this->fresh + place * this->stride;
    return cached + (place < wrap ? place : place - slots) * this->stride;
  }
};

// Whether a chunk has the place, of which it has n: a tile may begin before them and end behind them.
DEVICE bool is_place(int64_t place, int64_t n) { return static_cast<uint64_t>(place) < static_cast<uint64_t>(n); }

// Rows [begin, end) of a chunk's tensor and its columns from `column` on, as an operand: zeros beyond both, and before
// place 0.
template <class Rows, int V, bool along_depth>
struct RowsOperand {
  using T = std::remove_const_t<typename Rows::Element>;
  using Element = T;
  static constexpr int kPack = V;
  static constexpr bool kAlongDepth = along_depth, kChanges = false;
  Rows rows;
  int64_t begin, end, column, columns;

  DEVICE const T* line(int row) const { return is_place(begin + row, end) ? rows.row(begin + row) + column : nullptr; }
  DEVICE const T* at(const T* line, int64_t depth) const {
    return line == nullptr || column + depth >= columns ? nullptr : line + depth;
  }
  DEVICE const T* at(int row, int64_t depth) const {
    const int64_t place = begin + depth;
    return is_place(place, end) && column + row < columns ? rows.row(place) + column + row : nullptr;
  }
};

template <int V, bool along_depth, class Rows>
DEVICE RowsOperand<Rows, V, along_depth> operand_of(const Rows& rows, int64_t begin, int64_t end, int64_t column,
                                                    int64_t columns) {
  return {rows, begin, end, column, columns};
}

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

// A tile of queries and keys of a chunk, by its first places.
struct ScoreTile {
  Chunk chunk;
  int64_t query, key;

  // Whether some query sees some key, and whether every query sees every key. Query i sees the keys i - C < j <= i.
  DEVICE bool any(int size, int64_t C) const {
    const int64_t end = query + size < chunk.end ? query + size : chunk.end;
    return query >= chunk.first && query < chunk.end && key < end && key + size > query - C + 1;
  }
  DEVICE bool all(int queries, int keys, int64_t C) const {
    return key >= 0 && key + keys <= query + 1 && query + queries <= chunk.end && key > query + queries - 1 - C;
  }
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

// A bit for each of a thread's numbers, row by row, set where the key is dropped. of_keys: rows are keys.
template <class Tile, bool of_keys = false>
DEVICE uint64_t dropped_bits(const ChunkAttention& args, const ScoreTile& at) {
  constexpr int kNumbers = Tile::kRows * Tile::kColumns, kRun = of_keys ? 1 : Tile::kRun;
  static_assert(kNumbers <= 64);
  uint64_t dropped = 0;
  ROLL for (int n = kNumbers - kRun; n >= 0; n -= kRun) {
    const int row = Tile::row(n / Tile::kColumns), column = Tile::column(n % Tile::kColumns);
    const auto i = static_cast<uint32_t>(at.query + (of_keys ? column : row));
    const auto j = static_cast<uint32_t>(at.key + (of_keys ? row : column));
    dropped = dropped << kRun | dropped_keys<kRun>(args, at.chunk, at.chunk.start + j, at.chunk.start + i);
  }
  return dropped;
}

// Sets the tile's numbers to `value` where the key is dropped.
template <bool of_keys = false, class Tile>
DEVICE void set_dropped(Tile& tile, const ChunkAttention& args, const ScoreTile& at, typename Tile::Sum value) {
  const uint64_t dropped = dropped_bits<Tile, of_keys>(args, at);
  UNROLL
  for (int n = 0; n < Tile::kRows * Tile::kColumns; ++n) {
    if (dropped >> n & 1) tile.sum[n / Tile::kColumns][n % Tile::kColumns] = value;
  }
}

// Sets the scores of the keys that a query does not see to -infinity. of_keys: rows are keys.
template <bool of_keys = false, class Tile>
DEVICE void hide_keys(Tile& tile, const ChunkAttention& args, const ScoreTile& at) {
  using A = typename Tile::Sum;
  const A lowest = -static_cast<A>(INFINITY);
  constexpr int kQueries = of_keys ? Tile::kTileColumns : Tile::kTile;
  constexpr int kKeys = of_keys ? Tile::kTile : Tile::kTileColumns;
  if (!at.all(kQueries, kKeys, args.C)) {
    // In queries and keys of the tile: those there are, and what query 0 would see, in numbers that none exceeds.
    const auto bounded = [](int64_t n) {
      constexpr int64_t most = 2 * (kQueries + kKeys);
      return static_cast<int>(n > most ? most : n < -most ? -most : n);
    };
    const int first = bounded(-at.key), queries = bounded(at.chunk.end - at.query);
    const int high = bounded(at.query - at.key), low = bounded(at.query - at.key - args.C + 1);
    UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const int row = Tile::row(r);
      UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const int column = Tile::column(c), query = of_keys ? column : row, key = of_keys ? row : column;
        const bool is_seen = query < queries && key >= first && key <= query + high && key >= query + low;
        if (!is_seen) tile.sum[r][c] = lowest;
      }
    }
  }
  if (args.drop_below != 0 && !args.drops_weights) set_dropped<of_keys>(tile, args, at, lowest);
}

// The tile into rows `begin` .. end - 1 of a chunk's tensor, from column `column` of `columns` on.
template <bool kPacked, class Rows, class Tile>
DEVICE void write_rows(const Tile& tile, const Rows& rows, int64_t begin, int64_t end, int64_t column,
                       int64_t columns) {
  using T = typename Rows::Element;
  tile.template for_packs<T>([&](int r, int c, const auto& pack) {
    const int64_t place = begin + r;
    if (!is_place(place, end)) return;
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
