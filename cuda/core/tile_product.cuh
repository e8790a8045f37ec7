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

template <class T, int n>
DEVICE Pack<T, n> narrow_run(const stat_t<T>* values) {
  Pack<T, n> pack;
  UNROLL
  for (int i = 0; i < n; ++i) pack.v[i] = narrow<T>(values[i]);
  return pack;
}

// Products in A, by plain multiply-adds: a thread holds squares of 4 x 4 sums, 64 rows and columns apart.
template <class A, int kSize>
struct FmaTile {
  using Sum = A;
  using Weight = A;  // what intermediate matrices are stored as
  static constexpr int kTile = kSize;
  static constexpr int kDepth = 16;       // of a slab
  static constexpr bool kCopies = false;  // slabs hold A, transposed where need be
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

  // put(row, column, pack) for all of the thread's sums, as packs of neighbours in T.
  template <class T, class Put>
  DEVICE void for_packs(Put&& put) const {
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      UNROLL
      for (int c = 0; c < kColumns; c += kRun) put(row(r), column(c), narrow_run<T, kRun>(&sum[r][c]));
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

// One thread's part of an operand's slab, on its way from global to shared memory: packs of kPack elements that are
// contiguous along the operand's depth (kAlongDepth) or its rows. The operand says where the pack from (row, depth) on
// is, nullptr where there is nothing, which means zeros: at(row, depth), or at(line(row), depth) along the depth, since
// a thread's rows stay the same. If it kChanges, change(pack, row, depth) follows; if not, and the tile keeps the
// elements as they are (kCopies), packs do not pass through registers.
template <class Tile, class Operand>
struct Staged {
  using Element = typename Operand::Element;
  static constexpr int V = Operand::kPack;
  static constexpr bool kAlongDepth = Operand::kAlongDepth;
  static constexpr bool kIsAsync = Tile::kCopies && !Operand::kChanges;
  static constexpr int kPacks = Tile::kTile * Tile::kDepth / V;
  static constexpr int kHeld = (kPacks + kTileThreads - 1) / kTileThreads;
  static constexpr int kPerLine = (kAlongDepth ? Tile::kDepth : Tile::kTile) / V;

  const Element* lines[kAlongDepth ? kHeld : 1];
  Pack<Element, V> packs[kIsAsync ? 1 : kHeld];

  static DEVICE int pack_index(int i) { return static_cast<int>(threadIdx.x) + i * kTileThreads; }
  static DEVICE bool is_mine(int i) { return kPacks % kTileThreads == 0 || pack_index(i) < kPacks; }
  static DEVICE int row(int i) { return kAlongDepth ? pack_index(i) / kPerLine : pack_index(i) % kPerLine * V; }
  static DEVICE int depth(int i) { return kAlongDepth ? pack_index(i) % kPerLine * V : pack_index(i) / kPerLine; }

  DEVICE explicit Staged(const Operand& operand) {
    if constexpr (kAlongDepth) {
      UNROLL
      for (int i = 0; i < kHeld; ++i) lines[i] = is_mine(i) ? operand.line(row(i)) : nullptr;
    }
  }
  // Begins to bring the slab at depth `from`; nobody may be reading `slab` any more.
  DEVICE void fetch(const Operand& operand, int64_t from, typename Tile::Slab& slab) {
    UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (!is_mine(i)) return;
      const Element* address;
      if constexpr (kAlongDepth) {
        address = operand.at(lines[i], from + depth(i));
      } else {
        address = operand.at(row(i), from + depth(i));
      }
      if constexpr (kIsAsync) {
        async_copy16(Tile::template place_of<kAlongDepth>(slab, row(i), depth(i)), address, address != nullptr);
      } else {
        packs[i] = address == nullptr ? Pack<Element, V>{} : load<V>(address);
        if constexpr (Operand::kChanges) operand.change(packs[i], row(i), from + depth(i));
      }
    }
  }
  // Ends it, for this thread.
  DEVICE void put(typename Tile::Slab& slab) const {
    if constexpr (!kIsAsync) {
      UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (is_mine(i)) Tile::template put<kAlongDepth>(slab, row(i), depth(i), packs[i]);
      }
    }
  }
};

// tile.sum += the product over the depths [begin, end); the operands may be read up to the next multiple of a slab.
// While one slab is multiplied, the next one is on its way from memory.
template <class Tile, class A, class B>
DEVICE void multiply(Tile& tile, typename Tile::Slabs& slabs, int64_t begin, int64_t end, const A& a, const B& b) {
  if (begin >= end) return;
  Staged<Tile, A> staged_a(a);
  Staged<Tile, B> staged_b(b);
  const auto fetch = [&](int64_t depth, int stage) {
    staged_a.fetch(a, depth, slabs[stage][0]);
    staged_b.fetch(b, depth, slabs[stage][1]);
    if constexpr (Tile::kCopies) async_commit();
  };
  const auto put = [&](int stage) {
    staged_a.put(slabs[stage][0]);
    staged_b.put(slabs[stage][1]);
    if constexpr (Tile::kCopies) async_wait<0>();
  };
  sync_block();  // the slabs of an earlier product have been read
  fetch(begin, 0);
  put(0);
  sync_block();  // the first slab is there
  int stage = 0;
  for (int64_t depth = begin; depth < end; depth += Tile::kDepth) {
    const int64_t next = depth + Tile::kDepth;
    if (next < end) fetch(next, stage ^ 1);
    tile.template add<A::kAlongDepth, B::kAlongDepth>(slabs[stage][0], slabs[stage][1]);
    stage ^= 1;
    if (next < end) {
      put(stage);
      sync_block();  // the next slab is there, and the one before it has been read
    }
  }
}

}  // namespace megalodon::cuda
