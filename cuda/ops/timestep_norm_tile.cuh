// A tile of timestep_norm: how the work is cut, and what a thread has of it.
#pragma once

#include "core/look_back.cuh"
#include "core/pack.cuh"
#include "ops/timestep_norm.h"

namespace megalodon::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kHeld = 4;  // steps of a warp
constexpr int kSteps = kWarps * kHeld;
constexpr int kThreads = kWarps * 32;
constexpr int kRow = kSteps + 1;  // of shared memory: a group's values by step, and no bank conflicts
static_assert(kSteps == TimestepNormChains::kSteps && kSteps == 32, "the look-back has a step per lane");
static_assert(kWindow == TimestepNormChains::kWindow && sizeof(Slot) == TimestepNormChains::kSlotBytes);

struct Plan {
  int64_t K;
  int64_t units;   // packs of a group
  int64_t chunks;  // of `lanes` packs of a group, at least 1
  int slices;      // of the groups
  int tiles;       // of a row, every group of which is one chain
  int rows;
  int lanes;        // of a group: a power of two
  int groups;       // of a slice
  bool looks_back;  // whether a sequence may have several tiles

  static Plan of(const TimestepNormChains& chains, int64_t K, int V) {
    Plan plan{};
    plan.K = K;
    plan.units = K / V;
    plan.lanes = 1;
    while (plan.lanes < 32 && plan.lanes < plan.units) plan.lanes *= 2;
    plan.chunks = plan.units <= plan.lanes ? 1 : ceil_div(plan.units, plan.lanes);
    plan.groups = 32 / plan.lanes;
    plan.slices = static_cast<int>(ceil_div(chains.G, plan.groups));
    plan.tiles = static_cast<int>(chains.tiles);
    plan.rows = static_cast<int>(chains.rows);
    plan.looks_back = !chains.one_each;
    return plan;
  }
  int64_t blocks() const { return static_cast<int64_t>(rows) * tiles * slices; }
};

// What a block works on: a piece of a sequence, and some groups. In shared memory: registers are short.
struct Tile {
  int slice, row, number, tile;  // number: of the tiles of all rows of this slice, in the order of tickets
  int sequence, first;           // first: the tile with which it begins; tiles of a row count from its end if backwards
  int length;                    // steps
  bool is_piece, is_last;        // not every number of a packed row is a piece; is_last: of its sequence
  int64_t first_row;             // among all tokens

  DEVICE static Tile of(const Plan& plan, const Sequences& sequences, uint32_t ticket, bool backwards) {
    Tile tile;
    tile.slice = static_cast<int>(ticket) % plan.slices;
    tile.number = static_cast<int>(ticket) / plan.slices;
    tile.row = tile.number % plan.rows;
    tile.tile = tile.number / plan.rows;
    const int in_time = backwards ? plan.tiles - 1 - tile.tile : tile.tile;
    const Sequences::Piece piece = sequences.piece(static_cast<int64_t>(tile.row) * plan.tiles + in_time, kSteps);
    const auto index = static_cast<int>(backwards ? piece.count - 1 - piece.index : piece.index);
    tile.sequence = static_cast<int>(piece.sequence);
    tile.first = tile.tile - index;
    tile.length = static_cast<int>(piece.tokens());
    tile.is_piece = piece.exists;
    tile.is_last = index == static_cast<int>(piece.count) - 1;
    tile.first_row = piece.begin;
    return tile;
  }
  // The slots of a group's chain.
  DEVICE Slot* slots_of(void* slots, const Plan& plan, int64_t G, int g) const {
    return static_cast<Slot*>(slots) + (row * G + g) * (plan.tiles + plan.tiles / kWindow);
  }
  // Where there is no piece.
  DEVICE void publish_nothing(void* slots, const Plan& plan, int64_t G) const {
    const int i = static_cast<int>(threadIdx.x), g = slice * plan.groups + i;
    if (i < plan.groups && g < G) publish_none(slots_of(slots, plan, G, g), plan.tiles, tile);
  }
};

// What a thread works on: packs of one group, at kHeld steps.
struct Work {
  const Tile& tile;
  int group;  // may be beyond the last
  int warp, lane, lane_of_group, group_of_slice;
  uint32_t steps;  // those of the tile that are not padded

  DEVICE Work(const Plan& plan, const Tile& of, const uint8_t* mask) : tile(of) {
    warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    lane_of_group = lane % plan.lanes;
    group_of_slice = lane / plan.lanes;
    group = tile.slice * plan.groups + group_of_slice;
    const bool exists = lane < tile.length;
    steps = ballot(exists && (mask == nullptr || mask[tile.first_row + lane] == 0));
  }
  DEVICE int step(int p) const { return p * kWarps + warp; }
  DEVICE bool has(int p) const { return (steps >> step(p) & 1) != 0; }
  // How many unpadded steps are before a step of the tile.
  DEVICE int rank(int step) const { return count_bits(steps & ((uint32_t{1} << step) - 1)); }
};

// A thread's packs of one chunk, at its steps.
template <class T, int V>
DEVICE void load_steps(Pack<T, V> (&packs)[kHeld], const void* from, const Work& work, int64_t D, int64_t column,
                       bool exists) {
  UNROLL
  for (int p = 0; p < kHeld; ++p) {
    packs[p] = {};
    if (exists && work.has(p)) {
      packs[p] = load<V>(static_cast<const T*>(from) + (work.tile.first_row + work.step(p)) * D + column);
    }
  }
}

// body(c, column, mine) for every chunk of the thread's group: the column of its pack, and whether there is one.
template <int V, class Body>
DEVICE void for_chunks(const Plan& plan, const Work& work, bool exists, Body&& body) {
  for (int64_t c = 0; c < plan.chunks; ++c) {
    const int64_t unit = c * plan.lanes + work.lane_of_group;
    body(c, work.group * plan.K + unit * V, exists && unit < plan.units);
  }
}

// Over the lanes of every group.
template <class A>
DEVICE void add_lanes(A (&sums)[kHeld], int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    UNROLL
    for (int p = 0; p < kHeld; ++p) sums[p] += shuffle_xor(sums[p], bits);
  }
}

}  // namespace
}  // namespace megalodon::cuda
