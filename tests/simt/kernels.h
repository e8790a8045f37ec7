// The launchers of kernels.cu.
#pragma once

#include <cstdint>

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
};

void row_sum(Bug bug, const float* x, float* sums, float* scaled, int rows, int columns);
void scan(Bug bug, const uint32_t* x, uint32_t* y, uint64_t* states, uint32_t* ticket, int length);
void pipeline(Bug bug, const float* x, float* y, int tiles);
void reverse(Bug bug, const float* x, float* y);
void last_block(Bug bug, const float* x, float* partial, uint32_t* done, float* sum, int blocks);
void waits(Bug bug, const float* x, float* y);

}  // namespace megalodon::cuda
