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

// What a thread works on: packs of one group, at kHeld steps of a tile, a piece of a sequence.
struct Work {
  int slice, row, number, tile;  // number: of the tiles of all rows of this slice, in the order of tickets
  int sequence, first;           // first: the tile with which it begins; tiles of a row count from its end if backwards
  bool is_piece, is_last;        // not every number of a packed row is a piece; is_last: of its sequence
  int64_t first_row;             // of the tile, among all tokens
  int group;                     // may be beyond the last
  int warp, lane, lane_of_group, group_of_slice;
  int length;      // steps of the tile
  uint32_t steps;  // those that are not padded

  DEVICE static Work of(const Plan& plan, const Sequences& sequences, uint32_t ticket, bool backwards,
                        const uint8_t* mask) {
    Work work;
    work.slice = static_cast<int>(ticket) % plan.slices;
    work.number = static_cast<int>(ticket) / plan.slices;
    work.row = work.number % plan.rows;
    work.tile = work.number / plan.rows;
    const int tile = backwards ? plan.tiles - 1 - work.tile : work.tile;
    const Sequences::Piece piece = sequences.piece(static_cast<int64_t>(work.row) * plan.tiles + tile, kSteps);
    const auto index = static_cast<int>(backwards ? piece.count - 1 - piece.index : piece.index);
    work.sequence = static_cast<int>(piece.sequence);
    work.first = work.tile - index;
    work.is_piece = piece.exists;
    work.is_last = index == static_cast<int>(piece.count) - 1;
    work.first_row = piece.begin;
    work.warp = static_cast<int>(threadIdx.x) / 32;
    work.lane = static_cast<int>(threadIdx.x) % 32;
    work.lane_of_group = work.lane % plan.lanes;
    work.group_of_slice = work.lane / plan.lanes;
    work.group = work.slice * plan.groups + work.group_of_slice;
    work.length = static_cast<int>(piece.tokens());
    const bool exists = work.lane < work.length;
    work.steps = ballot(exists && (mask == nullptr || mask[work.first_row + work.lane] == 0));
    return work;
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
      packs[p] = load<V>(static_cast<const T*>(from) + (work.first_row + work.step(p)) * D + column);
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
