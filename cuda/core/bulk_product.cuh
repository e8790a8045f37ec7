// The tiles of core/tile_product.cuh by tensor copies (core/bulk.cuh): two warpgroups multiply, a thread of a third
// brings their slabs. Two blocks of a cluster whose operands b are the same bring half of each slab of it to both.
#pragma once

#include "core/bulk.cuh"
#include "core/tile_product.cuh"

namespace megalodon::cuda {

constexpr int kBulkThreads = kTileThreads + 128;
// Registers of its threads from the beginning, when all have as many.
constexpr int kBulkRegisters = 65536 / kBulkThreads / 8 * 8;

// Slabs of a product, by the depths where they begin: first those shared with the other block of a pair, then the rest.
struct BulkSlabs {
  int shared, count;
  int64_t shared_begin, begin;

  template <class Tile>
  DEVICE int64_t depth(int slab) const {
    return slab < shared ? shared_begin + slab * Tile::kDepth : begin + (slab - shared) * Tile::kDepth;
  }
};

// The rest lies before what is shared, or behind it; `other` is the partner's, of the same product but for its depths.
template <class Tile>
DEVICE BulkSlabs bulk_slabs(int64_t begin, int64_t end, bool is_pair, int64_t other_begin, int64_t other_end) {
  const auto slabs = [](int64_t depths) { return depths > 0 ? static_cast<int>(ceil_div(depths, Tile::kDepth)) : 0; };
  const int count = slabs(end - begin);
  if (!is_pair) return {0, count, begin, begin};
  const int64_t shared_begin = begin > other_begin ? begin : other_begin;
  const int shared = slabs((end < other_end ? end : other_end) - shared_begin);
  return {shared, count, shared_begin, begin < shared_begin ? begin : shared_begin + shared * Tile::kDepth};
}

// A block of a grid along x alone, whose pairs are blocks with the same column of two neighbouring strips; all columns
// of a pair, then the next pair.
struct PairedBlock {
  int64_t strip, partner, column;

  template <class Tile>
  static DEVICE PairedBlock of(unsigned columns) {
    const unsigned number = blockIdx.x / 2, rank = blockIdx.x % 2;
    const int64_t pair = number / columns * 2;
    return {pair + rank, pair + (rank ^ 1), int64_t{number % columns} * Tile::kTileColumns};
  }
  static dim3 grid(unsigned columns, int64_t strips) {
    return dim3(static_cast<unsigned>(round_up(strips, 2) * columns));
  }
};

// The state of a block's ring of slabs, in shared memory.
template <class Tile>
struct BulkRing {
  static constexpr int kStages = Tile::kStages, kWarps = kTileThreads / 32;
  Barrier full[kStages];  // the slab has come
  Barrier free[kStages];  // it has been read: by the block's eight warps and by its partner's, or by the block's twice
  Barrier own;            // of the threads that multiply
  BulkSlabs slabs;

  // By one thread, before run().
  DEVICE void init(const BulkSlabs& of_product) {
    slabs = of_product;
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      free[i].init(2 * kWarps);
    }
    own.init(kTileThreads);
    fence_barrier_init();
  }

  // Registers of a thread that multiplies, and of the others.
  static constexpr int kMany = 232, kFew = 3 * kBulkRegisters - 2 * kMany;

  // By all threads, of both blocks of a pair: brings() by a warp of the third warpgroup, multiplies() by the
  // others.
  template <class Brings, class Multiplies>
  DEVICE void run(Brings&& brings, Multiplies&& multiplies) {
    sync_cluster();
    if (slabs.count == 0) return;
    if (threadIdx.x >= kTileThreads) {
      shrink_registers<kFew>();
      if (threadIdx.x < kTileThreads + 32) brings();
    } else {
      grow_registers<kMany>();
      multiplies();
      if (slabs.shared > 0) wait_cluster();  // nobody arrives here any more
    }
  }

  // By a warp, of which one thread does it. a.copy(slab, depth, barrier) asks for a whole slab; b.copy(slab, part,
  // depth, barrier, ranks...) for 64 columns of it.
  template <class A, class B>
  DEVICE void bring(typename Tile::Stage* stages, const A& a, const B& b) {
    constexpr int kParts = Tile::kTileColumns / Tile::kLine;
    const int shared = slabs.shared, count = slabs.count;
    const int rank = static_cast<int>(cluster_rank());
    const auto ask = [&](int slab) {
      const int stage = slab % kStages, parity = slab / kStages % 2;
      const int64_t depth = slabs.template depth<Tile>(slab);
      free[stage].wait(1 - parity);
      full[stage].expect(sizeof(typename Tile::Stage));
      a.copy(stages[stage].a, depth, full[stage]);
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        if (slab >= shared) {
          b.copy(stages[stage].b, part, depth, full[stage]);
        } else if (part / (kParts / 2) == rank) {
          b.copy(stages[stage].b, part, depth, full[stage], uint16_t{3});
        }
      }
    };
    ROLL for (int i = 0; i < count; ++i) {
      if (threadIdx.x % 32 == 0) ask(i);
      if (i == shared - 1) arrive_cluster();
    }
    if (shared > 0) wait_cluster();
  }

  // By the threads that multiply: tile.sum += the product. change(stage, depth) may change a slab that has come, and
  // says whether it has, the same in all threads.
  template <bool kADepth, class Change>
  DEVICE void multiply(Tile& tile, typename Tile::Stage* stages, int parity_of_own, Change&& change) {
    const int shared = slabs.shared, count = slabs.count;
    const uint32_t partner = cluster_rank() ^ 1;
    const auto release = [&](int slab) {
      Barrier& barrier = free[slab % kStages];
      if (threadIdx.x % 32 == 0) {
        if (slab < shared) {
          barrier.arrive();
          barrier.arrive_at(partner);
        } else {
          barrier.arrive(2);
        }
      }
      if (slab == shared - 1) arrive_cluster();
    };
    int i = 0;
    do {  // there is a slab: otherwise the compiler would have to wait for each product
      const int stage = i % kStages;
      full[stage].wait(i / kStages % 2);
      if (change(stages[stage], slabs.template depth<Tile>(i))) {
        tile.publish();
        own.arrive();
        own.wait(parity_of_own);
        parity_of_own ^= 1;
      }
      tile.template add<kADepth, false>(stages[stage].a, stages[stage].b);
      if (i > 0) release(i - 1);
    } while (++i < count);
    tile.finish();
    release(count - 1);
  }
};

// Zeros in b's depths from `end` on, if the slab from `depth` on has such; what copies bring there is another's.
template <class Tile>
DEVICE bool clear_behind(typename Tile::Stage& stage, int64_t depth, int64_t end) {
  if (depth + Tile::kDepth <= end) return false;
  constexpr int kPacks = Tile::kLine / 8;
  const int first = static_cast<int>(end - depth), lines = Tile::kDepth - first;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kTileColumns / 8 * lines; i += kTileThreads) {
    const int row = i / (kPacks * lines) * Tile::kLine + i % kPacks * 8;
    Tile::template put<false>(stage.b, row, first + i / kPacks % lines, Pack<typename Tile::Weight, 8>{});
  }
  return true;
}

}  // namespace megalodon::cuda
