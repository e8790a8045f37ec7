// The rounds of chunk_attention: as many strips of tiles of weights as the scratch has room for.
#pragma once

#include "ops/chunk_attention.h"
#include "ops/chunk_attention_tiles.cuh"

namespace megalodon::cuda {
namespace {

// The strips of a round: of `heads` chunks of heads from `head` on, the `tiles` tiles from `tile` on.
struct Round {
  int64_t head, heads, tile, tiles;

  DEVICE int64_t strip() const { return blockIdx.z * tiles + blockIdx.y; }
  DEVICE Chunk chunk(const ChunkAttention& args) const {
    const int64_t index = head + blockIdx.z;
    return chunk_of(args, index / args.chunks, index % args.chunks);
  }
};

// Calls round(Round) until all strips have been visited: of several heads each, or, where they do not fit, of a part
// of one head.
template <class Body>
void for_rounds(int64_t heads, int64_t tiles, int64_t strips, Body&& body) {
  constexpr int64_t kMaxHeads = 65535;  // of a grid's z
  const int64_t together = strips / tiles < 1 ? 1 : strips / tiles < kMaxHeads ? strips / tiles : kMaxHeads;
  const int64_t most = strips < tiles ? strips : tiles;
  for (int64_t head = 0; head < heads; head += together) {
    for (int64_t tile = 0; tile < tiles; tile += most) {
      body(Round{head, heads - head < together ? heads - head : together, tile,
                 tiles - tile < most ? tiles - tile : most});
    }
  }
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Of a kernel side by side on a multiprocessor: 2 where registers for that are not too few.
template <class T, class Tile, bool kPacked>
constexpr int kBlocks = kPacked && sizeof(T) < 8 && (Tile::kTile == 64 || sizeof(T) == 2) ? 2 : 1;

char* aligned(void* workspace) {
  return reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
}

}  // namespace
}  // namespace megalodon::cuda
