// The rounds of chunk_attention: as many strips of tiles of weights as the scratch has room for.
#pragma once

#include "ops/chunk_attention.h"
#include "ops/chunk_attention_tiles.cuh"

namespace megalodon::cuda {
namespace {

// The strips of a round: `count` from number `first` on.
struct Round {
  Strips strips;
  int64_t first, count;

  DEVICE Strips::Strip at(const ChunkAttention& args, int64_t index) const { return strips.at(args, first + index); }
};

// Calls body(Round) until all strips have been visited, `most` of them together. Strips of a chunk of rows are in one
// round if they fit, and in rounds of their own if not; those of packed rows, whose chunks begin anywhere, and of
// windows may be in two.
template <class Body>
void for_rounds(const Strips& strips, int64_t most, Body&& body) {
  constexpr int64_t kMaxStrips = 65535;  // of a grid's y
  most = most < kMaxStrips ? most : kMaxStrips;
  const bool fit = most >= strips.tiles, overlap = strips.overlap();
  if (!overlap && fit) most -= most % strips.tiles;
  for (int64_t first = 0, count; first < strips.count; first += count) {
    count = overlap || fit ? strips.count - first : strips.tiles - first % strips.tiles;
    count = count < most ? count : most;
    body(Round{strips, first, count});
  }
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Of a kernel side by side on a multiprocessor: 2 where registers for that are not too few.
template <class T, class Tile, bool kPacked>
constexpr int kBlocks =
    kPacked && sizeof(T) < 8 && (Tile::kTile == 64 || sizeof(T) == 2) && Tile::kTileColumns <= 128 ? 2 : 1;

char* aligned(void* workspace) {
  return reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
}

}  // namespace
}  // namespace megalodon::cuda
