// A tile of kTile rows and kTileColumns columns of a matrix product, sum[m, n] = sum over d of a[m, d] b[n, d], by a
// block of 256 threads: operands go through shared memory slab by slab, sums stay in registers. How a thread's sums lie
// in the tile is the tile type's affair: row(r) and column(c) say it, kRun columns from every kRun-th c on are
// neighbours.
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
  static constexpr int kTile = kSize, kTileColumns = kSize;
  static constexpr int kDepth = 16;            // of a slab
  static constexpr int kStages = 2, kLag = 0;  // slabs in shared memory; products in flight while the next one begins
  static constexpr bool kCopies = false;       // slabs hold A, transposed where need be
  static constexpr int kRows = kSize / 16, kColumns = kSize / 16, kRun = 4;
  static constexpr int kRowLanes = 16;       // neighbouring lanes that share their rows,
  static constexpr int kRowColumns = kSize;  // and so many columns of them
  static constexpr int kPad = 4;             // keeps transposing stores off the same banks
  struct alignas(16) Slab {                  // of one operand
    A v[kDepth][kSize + kPad];
  };
  struct Stage {
    Slab a, b;
  };

  A sum[kRows][kColumns];

  static DEVICE int row(int r) { return r / 4 * 64 + static_cast<int>(threadIdx.x) / 16 * 4 + r % 4; }
  static DEVICE int column(int c) { return c / 4 * 64 + static_cast<int>(threadIdx.x) % 16 * 4 + c % 4; }

  DEVICE void clear() { clear_sums(sum); }
  static DEVICE void publish() {}
  DEVICE void finish() {}

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

// One thread's part of an operand's slab of kLines rows, on its way from global to shared memory: packs of kPack
// elements that are contiguous along the operand's depth (kAlongDepth) or its rows. The operand says where the pack
// from (row, depth) on is, nullptr where there is nothing, which means zeros: at(row, depth), or at(line(row), depth)
// along the depth, since a thread's rows stay the same. If it kChanges, change(pack, row, depth) follows; if not, and
// the tile keeps the elements as they are (kCopies), packs do not pass through registers. Those that do are held there
// while the slab before is multiplied, unless that does not keep the thread (kLag).
template <class Tile, int kLines, class Operand>
struct Staged {
  using Element = typename Operand::Element;
  static constexpr int V = Operand::kPack;
  static constexpr bool kAlongDepth = Operand::kAlongDepth;
  static constexpr bool kIsAsync = Tile::kCopies && !Operand::kChanges;
  static constexpr bool kIsHeld = !kIsAsync && Tile::kLag == 0;
  static constexpr int kPacks = kLines * Tile::kDepth / V;
  static constexpr int kOwn = (kPacks + kTileThreads - 1) / kTileThreads;
  static constexpr int kPerLine = (kAlongDepth ? Tile::kDepth : kLines) / V;
  static constexpr bool kKeepsLines = kAlongDepth && (kIsAsync || kIsHeld);

  const Element* lines[kKeepsLines ? kOwn : 1];
  Pack<Element, V> packs[kIsHeld ? kOwn : 1];

  static DEVICE int pack_index(int i) { return static_cast<int>(threadIdx.x) + i * kTileThreads; }
  static DEVICE bool is_mine(int i) { return kPacks % kTileThreads == 0 || pack_index(i) < kPacks; }
  static DEVICE int row(int i) { return kAlongDepth ? pack_index(i) / kPerLine : pack_index(i) % kPerLine * V; }
  static DEVICE int depth(int i) { return kAlongDepth ? pack_index(i) % kPerLine * V : pack_index(i) / kPerLine; }

  DEVICE explicit Staged(const Operand& operand) {
    if constexpr (kKeepsLines) {
      UNROLL
      for (int i = 0; i < kOwn; ++i) lines[i] = is_mine(i) ? operand.line(row(i)) : nullptr;
    }
  }
  DEVICE const Element* address(const Operand& operand, int i, int64_t from) const {
    if constexpr (kKeepsLines) {
      return operand.at(lines[i], from + depth(i));
    } else if constexpr (kAlongDepth) {
      return operand.at(operand.line(row(i)), from + depth(i));
    } else {
      return operand.at(row(i), from + depth(i));
    }
  }
  static DEVICE Pack<Element, V> loaded(const Operand& operand, const Element* address, int i, int64_t from) {
    Pack<Element, V> pack = address == nullptr ? Pack<Element, V>{} : load<V>(address);
    if constexpr (Operand::kChanges) operand.change(pack, row(i), from + depth(i));
    return pack;
  }
  // Begins to bring the slab at depth `from`; nobody may be reading `slab` any more.
  template <class Slab>
  DEVICE void fetch(const Operand& operand, int64_t from, Slab& slab) {
    if constexpr (kIsAsync || kIsHeld) {
      UNROLL
      for (int i = 0; i < kOwn; ++i) {
        if (!is_mine(i)) return;
        const Element* const from_address = address(operand, i, from);
        if constexpr (kIsAsync) {
          async_copy16(Tile::template place_of<kAlongDepth>(slab, row(i), depth(i)), from_address,
                       from_address != nullptr);
        } else {
          packs[i] = loaded(operand, from_address, i, from);
        }
      }
    } else {
      ROLL for (int i = 0; i < kOwn; ++i) {
        if (!is_mine(i)) return;
        Tile::template put<kAlongDepth>(slab, row(i), depth(i), loaded(operand, address(operand, i, from), i, from));
      }
    }
  }
  // Ends it, for this thread, but for what was copied.
  template <class Slab>
  DEVICE void put(Slab& slab) const {
    if constexpr (kIsHeld) {
      UNROLL
      for (int i = 0; i < kOwn; ++i) {
        if (is_mine(i)) Tile::template put<kAlongDepth>(slab, row(i), depth(i), packs[i]);
      }
    }
  }
};

template <class Tile>
constexpr int64_t kSlabBytes = int64_t{Tile::kStages} * int64_t{sizeof(typename Tile::Stage)};

// tile.sum += the product over the depths [begin, end); the operands may be read up to the next multiple of a slab.
// While slabs are multiplied, the next kAhead of them are on their way from memory. Of a slab that is multiplied
// asynchronously (kLag 1) the memory is written again only when that has ended for all, two slabs later.
template <class Tile, class A, class B>
DEVICE void multiply(Tile& tile, typename Tile::Stage* slabs, int64_t begin, int64_t end, const A& a, const B& b) {
  if (begin >= end) return;
  constexpr int kStages = Tile::kStages, kLag = Tile::kLag, kAhead = kStages - 1 - kLag;
  static_assert(kAhead == 1 || kLag > 0);
  Staged<Tile, Tile::kTile, A> staged_a(a);
  Staged<Tile, Tile::kTileColumns, B> staged_b(b);
  const auto fetch = [&](int64_t depth, int stage) {
    if (depth < end) {
      staged_a.fetch(a, depth, slabs[stage].a);
      staged_b.fetch(b, depth, slabs[stage].b);
    }
    if constexpr (Tile::kCopies) async_commit();  // behind the end, too: the groups are counted
  };
  const auto add = [&](int stage) {
    tile.template add<A::kAlongDepth, B::kAlongDepth>(slabs[stage].a, slabs[stage].b);
  };
  sync_block();  // the slabs of an earlier product have been read
  UNROLL
  for (int i = 0; i < kAhead; ++i) fetch(begin + i * Tile::kDepth, i);
  int stage = 0;
  for (int64_t depth = begin; depth < end; depth += Tile::kDepth) {
    staged_a.put(slabs[stage].a);
    staged_b.put(slabs[stage].b);
    if constexpr (Tile::kCopies) async_wait<kAhead - 1>();
    tile.publish();
    sync_block();  // this slab is there, and the one before it, or two before it, has been read
    const int next = stage + kAhead < kStages ? stage + kAhead : stage + kAhead - kStages;
    if constexpr (kLag > 0) add(stage);
    fetch(depth + kAhead * Tile::kDepth, next);
    if constexpr (kLag == 0) add(stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  tile.finish();
}

}  // namespace megalodon::cuda
