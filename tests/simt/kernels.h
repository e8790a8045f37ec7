// The launchers of kernels.cu and kernels_hopper.cu.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace megalodon::cuda {

enum class Bug {
  kNone,
  kMissingMask,
  kSharedOutOfBounds,
  kMissingBarrier,
  kDivergentBarrier,
  kDivergentShuffle,
  kOverlappingOutputs,
  kBlockOrder,
  kMissingAsyncWait,
  kMissingSyncWarp,
  kMissingFence,
  kDeadlock,
  kWrongMask,
  kSwappedFragments,
  kDivergentMatrix,
  kMismatchedOperations,
  kGlobalOutOfBounds,
  kMissingRelease,
  kShortAsyncWait,
  kMissingProxyFence,
  kMissingWgmmaFence,
  kMissingWgmmaWait,
  kEarlySums,
  kOverwrittenOperand,
  kOldSums,
  kMissingFullWait,
  kMissingFreeWait,
  kEarlyRelease,
  kEarlyLastRelease,
  kMissingClusterSync,
  kMissingBarrierFence,
  kEarlyExit,
  kFewBytes,
  kManyBytes,
  kManyArrivals,
  kUnwaitedCopy,
};

// Calls choose(std::integral_constant<Bug, bug>).
template <Bug... kBugs, class Choose>
void with_bug(Bug bug, Choose&& choose) {
  bool found = ((bug == kBugs && (choose(std::integral_constant<Bug, kBugs>{}), true)) || ...);
  if (!found) throw std::runtime_error("this kernel has no such mistake");
}

void row_sum(Bug bug, const float* x, float* sums, float* scaled, int rows, int columns);
void scan(Bug bug, const uint32_t* x, uint32_t* y, uint64_t* states, uint32_t* ticket, int length);
void pipeline(Bug bug, const float* x, float* y, int tiles);
void reverse(Bug bug, const float* x, float* y);
void last_block(Bug bug, const float* x, float* partial, uint32_t* done, float* sum, int blocks);
// Raw: four 8 x 8 matrices of 16-bit patterns -> what every lane takes of each, as they are and transposed [2][32][4].
void load_matrices(const uint16_t* matrices, uint32_t* taken);
// a [16, 16] and b [16, 8], bf16 -> a b [4][16][8]: each of the two given with its depth contiguous or not.
void matrix_product(Bug bug, const float* a, const float* b, float* products);
// a [64, 128] and b [128, 128], rows and columns along the depth, bf16 -> a b [64, 128].
void warpgroup_product(Bug bug, const float* a, const float* b, float* product);
// a [64, 64] and b [128, 64], bf16 -> (a b^T) b [64, 64].
void chained_products(Bug bug, const float* a, const float* b, float* product);
// Tiles of 8 x 64 16-bit numbers -> their sum, twice [2][512].
void tensor_tiles(Bug bug, const uint16_t* x, uint32_t* sums, int tiles);
// Numbers [2, 32], in packs of four, of which the second time only the last are taken -> sums over the two times
// [3][32]: of the upper half of each pack, and twice of whole packs.
void several_readers(Bug bug, const float* x, float* sums, int turns);
// a [64, 64] and b [64, 64], bf16 -> a b^T [64, 64] and the sums of the first 32 rows of b, twice [2][32].
void mixed_readers(Bug bug, const float* a, const float* b, float* product, float* sums);
void waits(Bug bug, const float* x, float* y);

}  // namespace megalodon::cuda
