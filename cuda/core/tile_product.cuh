// A square tile of a matrix product, sum[m, n] = sum over d of a[m, d] b[n, d], by a block of 256 threads: operands go
// through shared memory slab by slab, sums stay in registers. How a thread's sums lie in the tile is the tile type's
// affair: row(r) and column(c) say it, kRun columns from every kRun-th c on are neighbours.
#pragma once

#include "core/pack.cuh"
#include "core/portable.cuh"

namespace megalodon::cuda {

constexpr int kTileThreads = 256;

template <class A, int kRows, int kColumns>
DEVICE void clear_sums(A (&sum)[kRows][kColumns]) {
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    UNROLL
    for (int c = 0; c < kColumns; ++c) sum[r][c] = 0;
  }
}

// Products in A, by plain multiply-adds: a thread holds squares of 4 x 4 sums, 64 rows and columns apart.
template <class A, int kSize>
struct FmaTile {
  using Sum = A;
  using Weight = A;  // what intermediate matrices are stored as
  static constexpr int kTile = kSize;
  static constexpr int kDepth = 16;  // of a slab
  static constexpr int kRows = kSize / 16, kColumns = kSize / 16, kRun = 4;
  static constexpr int kRowLanes = 16;       // neighbouring lanes that share their rows,
  static constexpr int kRowColumns = kSize;  // and so many columns of them
  static constexpr int kPad = 4;             // keeps transposing stores off the same banks
  struct alignas(16) Slab {                  // of one operand
    A v[kDepth][kSize + kPad];
  };
  using Slabs = Slab[2][2];  // stages, operands

  A sum[kRows][kColumns];

  static DEVICE int row(int r) { return r / 4 * 64 + static_cast<int>(threadIdx.x) / 16 * 4 + r % 4; }
  static DEVICE int column(int c) { return c / 4 * 64 + static_cast<int>(threadIdx.x) % 16 * 4 + c % 4; }

  DEVICE void clear() { clear_sums(sum); }

  // Neighbouring elements of an operand, from (row, depth) on, into its slab.
  template <bool kAlongDepth, class T, int V>
  static DEVICE void put(Slab& slab, int row, int depth, const Pack<T, V>& pack) {
    if constexpr (kAlongDepth) {
      UNROLL
      for (int i = 0; i < V; ++i) slab.v[depth + i][row] = widen(pack.v[i]);
    } else {
      UNROLL
      for (int i = 0; i < V; ++i) slab.v[depth][row + i] = widen(pack.v[i]);
    }
  }

  template <bool kADepth, bool kBDepth>
  DEVICE void add(const Slab& a_slab, const Slab& b_slab) {
    UNROLL
    for (int d = 0; d < kDepth; ++d) {
      Pack<A, 4> a[kRows / 4], b[kColumns / 4];
      UNROLL
      for (int g = 0; g < kRows / 4; ++g) a[g] = load<4>(&a_slab.v[d][row(4 * g)]);
      UNROLL
      for (int g = 0; g < kColumns / 4; ++g) b[g] = load<4>(&b_slab.v[d][column(4 * g)]);
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        UNROLL
        for (int c = 0; c < kColumns; ++c) sum[r][c] += a[r / 4].v[r % 4] * b[c / 4].v[c % 4];
      }
    }
  }
};

// One thread's part of an operand's slab, on its way from global to shared memory. An operand has load(row, depth), the
// kPack elements from there on, contiguous along its depth (kAlongDepth) or its rows; zeros where there are none.
template <class Tile, class Operand>
struct Staged {
  static constexpr int V = Operand::kPack;
  static constexpr int kPacks = Tile::kTile * Tile::kDepth / V;
  static constexpr int kHeld = (kPacks + kTileThreads - 1) / kTileThreads;
  static constexpr int kPerLine = (Operand::kAlongDepth ? Tile::kDepth : Tile::kTile) / V;

  Pack<typename Operand::Element, V> packs[kHeld];

  static DEVICE int line(int p) { return p / kPerLine; }
  static DEVICE int place(int p) { return p % kPerLine * V; }

  DEVICE void fetch(const Operand& operand, int64_t depth) {
    UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const int p = static_cast<int>(threadIdx.x) + i * kTileThreads;
      if (kPacks % kTileThreads != 0 && p >= kPacks) return;
      packs[i] =
          Operand::kAlongDepth ? operand.load(line(p), depth + place(p)) : operand.load(place(p), depth + line(p));
    }
  }
  DEVICE void put(typename Tile::Slab& slab) const {
    UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const int p = static_cast<int>(threadIdx.x) + i * kTileThreads;
      if (kPacks % kTileThreads != 0 && p >= kPacks) return;
      const int row = Operand::kAlongDepth ? line(p) : place(p);
      const int depth = Operand::kAlongDepth ? place(p) : line(p);
      Tile::template put<Operand::kAlongDepth>(slab, row, depth, packs[i]);
    }
  }
};

// tile.sum += the product over the depths [begin, end); the operands may be read up to the next multiple of a slab.
// While one slab is multiplied, the next one is on its way from memory.
template <class Tile, class A, class B>
DEVICE void multiply(Tile& tile, typename Tile::Slabs& slabs, int64_t begin, int64_t end, const A& a, const B& b) {
  if (begin >= end) return;
  Staged<Tile, A> staged_a;
  Staged<Tile, B> staged_b;
  staged_a.fetch(a, begin);
  staged_b.fetch(b, begin);
  sync_block();  // the slabs of an earlier product have been read
  staged_a.put(slabs[0][0]);
  staged_b.put(slabs[0][1]);
  sync_block();  // the first slab is there
  int stage = 0;
  for (int64_t depth = begin; depth < end; depth += Tile::kDepth) {
    const int64_t next = depth + Tile::kDepth;
    if (next < end) {
      staged_a.fetch(a, next);
      staged_b.fetch(b, next);
    }
    tile.template add<A::kAlongDepth, B::kAlongDepth>(slabs[stage][0], slabs[stage][1]);
    stage ^= 1;
    if (next < end) {
      staged_a.put(slabs[stage][0]);
      staged_b.put(slabs[stage][1]);
      sync_block();  // the next slab is there, and the one before it has been read
    }
  }
}

}  // namespace megalodon::cuda
