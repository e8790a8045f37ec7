// How a GPU computes cema by matrix instructions (cuda/ops/cema_mma.cu): for which shapes, how time and channels are
// cut, what a channel's table holds.
#pragma once

#include "core/dtype.h"
#include "ops/cema_cut.h"

namespace megalodon {

// The table of one channel, in bytes from its beginning. Wavelets are padded with zeros to blocks of 8.
//   planes      [3][33 powers][2 padded wavelets] bf16: q^0 .. q^32 as (re, im), the sum of three numbers, each the
//               rounded rest of those before; rows are 16 bytes longer, so that the 8 rows of a matrix lie in different
//               banks
//   float       [kFloats][padded wavelets] pairs: Float says which
//   group       [padded wavelets] pairs of double: q^512
//   response    [2][32] bf16: k_0 + omega, k_1 .. k_31, as the sum of two numbers
// and what stays in global memory
//   double      [kDoubles][padded wavelets] pairs: Double says which
struct CemaMmaTable {
  static constexpr int kPowers = 33, kBlock = 8, kSteps = 32;
  // kStep q^32; kIn what sums over a tile are multiplied with to enter a state; kOut what a state is multiplied with to
  // leave it; kThrough both; kSegment + p: kOut q^(128 p).
  enum Float { kStep, kThrough, kIn, kSegment, kFloats = kSegment + 4 };
  enum Double { kOne, kTile, kInput, kDoubles };  // q, q^32, by what a state is divided in the walk

  int blocks;

  MEGALODON_HOST_DEVICE static constexpr CemaMmaTable of(int64_t N) {
    return {static_cast<int>((N + kBlock - 1) / kBlock)};
  }
  MEGALODON_HOST_DEVICE constexpr int wavelets() const { return blocks * kBlock; }
  MEGALODON_HOST_DEVICE constexpr int pitch() const { return wavelets() * 4 + 16; }
  MEGALODON_HOST_DEVICE constexpr int plane() const { return kPowers * pitch(); }
  MEGALODON_HOST_DEVICE constexpr int floats() const { return 3 * plane(); }
  MEGALODON_HOST_DEVICE constexpr int group() const { return floats() + kFloats * wavelets() * 8; }
  MEGALODON_HOST_DEVICE constexpr int response() const { return group() + wavelets() * 16; }
  MEGALODON_HOST_DEVICE constexpr int shared_bytes() const { return response() + 2 * kSteps * 2; }
  MEGALODON_HOST_DEVICE constexpr int doubles() const { return shared_bytes(); }
  MEGALODON_HOST_DEVICE constexpr int bytes() const { return doubles() + kDoubles * wavelets() * 16; }
};

struct CemaMmaPlan {
  static constexpr int64_t kTile = CemaMmaTable::kSteps;  // steps, a row of the products
  static constexpr int64_t kTiles = 16;                   // of a group: the rows of one instruction
  static constexpr int64_t kGroup = kTile * kTiles;
  static constexpr int64_t kChannels = 8;  // of a block of threads, a warp for each
  // Tables of more wavelets, for 8 channels, would not fit into the 99 KB of shared memory that all of sm_80 to sm_89
  // have; a shorter row would be mostly padding.
  static constexpr int64_t kMostWavelets = 16, kLeastSteps = kGroup, kLeastMean = kGroup / 2;
  static constexpr int64_t kLeastPiece = 4 * kGroup;  // each reads its tables once

  int64_t tiles;  // of channels
  CemaCut cut;    // into whole groups

  // Rows of packed sequences by their mean length: of those half as long as a group, half of the work is padding, and
  // the scan's would still be more.
  static constexpr bool takes(DType dtype, const Sequences& sequences, int64_t N) {
    const bool is_long = sequences.packed
                             ? sequences.tokens() >= kGroup && sequences.tokens() / sequences.count >= kLeastMean
                             : sequences.length >= kLeastSteps;
    return (dtype == DType::kBfloat16 || dtype == DType::kFloat16) && N <= kMostWavelets && is_long;
  }
  static constexpr CemaMmaPlan of(const Sequences& sequences, int64_t D) {
    const int64_t tiles = ceil_div(D, kChannels);
    return {tiles, CemaCut::of(sequences, tiles, CemaCut::kWantedBlocks / 2, kLeastPiece, kGroup)};
  }
  int64_t table_bytes(int64_t N) const { return tiles * kChannels * CemaMmaTable::of(N).bytes(); }
};

}  // namespace megalodon
