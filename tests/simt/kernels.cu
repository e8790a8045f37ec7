// Small kernels of the kinds the library has, each right and with mistakes seeded: what the executor must pass, and
// what it must catch.
#include "core/mma.cuh"
#include "core/portable.cuh"
#include "kernels.h"

namespace megalodon::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

DEVICE float warp_sum(float value) {
  for (int bits = 16; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
  return value;
}

// ---- the sum of every row: warp sums meet in shared memory ----------------------------------------------------------

template <Bug kBug>
__global__ void row_sum_kernel(const float* x, float* sums, float* scaled, int columns) {
  SHARED(float, partial, [kWarps]);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = lane_index();
  const float* row = x + static_cast<int64_t>(blockIdx.x) * columns;
  const int end = kBug == Bug::kMissingMask ? (columns + kThreads - 1) / kThreads * kThreads : columns;
  float value = 0;
  for (int i = static_cast<int>(threadIdx.x); i < end; i += kThreads) value += row[i];
  value = warp_sum(value);
  if (lane == 0) partial[kBug == Bug::kSharedOutOfBounds ? warp + 1 : warp] = value;
  if (kBug == Bug::kDivergentBarrier && warp == 0) {
    sync_block();
  } else if (kBug != Bug::kMissingBarrier) {
    sync_block();
  }
  value = lane < kWarps ? partial[lane] : 0.0f;
  if (kBug == Bug::kDivergentShuffle) {
    if (lane < 16) value = warp_sum(value);
  } else if (kBug == Bug::kMismatchedOperations) {
    value = lane < 16 ? shuffle_xor(value, 1) : shuffle(value, lane);
  } else {
    value = warp_sum(value);
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = value;
  const int last = kBug == Bug::kGlobalOutOfBounds ? columns + 1 : columns;
  for (int i = static_cast<int>(threadIdx.x); i < last; i += kThreads) {
    const int64_t row_bytes = kBug == Bug::kOverlappingOutputs ? columns - 1 : columns;
    scaled[blockIdx.x * row_bytes + i] = (i < columns ? row[i] : 0) * value;
  }
}

// ---- inclusive scan in one pass: blocks look back at the sums their predecessors have published ---------------------

constexpr uint64_t kAggregate = uint64_t{1} << 62;
constexpr uint64_t kPrefix = uint64_t{2} << 62;

template <Bug kBug>
__global__ void scan_kernel(const uint32_t* x, uint32_t* y, uint64_t* states, uint32_t* ticket, int length) {
  SHARED(int, shared_tile);
  SHARED(uint32_t, sums, [kWarps]);
  SHARED(uint32_t, before);
  // Blocks start in any order: a tile is taken when a block runs, so that its predecessors are running, too.
  if (threadIdx.x == 0) {
    shared_tile = static_cast<int>(kBug == Bug::kBlockOrder ? blockIdx.x : atomic_add(ticket, 1));
  }
  sync_block();
  const int tile = shared_tile;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = lane_index();
  const int i = tile * kThreads + static_cast<int>(threadIdx.x);
  const uint32_t value = i < length ? x[i] : 0;
  uint32_t scan = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t lower = shuffle_up(scan, distance);
    if (lane >= distance) scan += lower;
  }
  if (lane == 31) sums[warp] = scan;
  sync_block();
  uint32_t total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) scan += sums[w];
    total += sums[w];
  }
  if (warp == 0) {
    const uint64_t first_state = (tile == 0 ? kPrefix : kAggregate) | total;
    if (lane == 0 && kBug == Bug::kMissingRelease) states[tile] = first_state;
    if (lane == 0 && kBug != Bug::kMissingRelease) store_release(&states[tile], first_state);
    uint32_t prefix = 0;
    for (int last = tile - 1; last >= 0; last -= 32) {
      uint64_t state;
      do {
        state = last >= lane ? load_acquire(&states[last - lane]) : kPrefix;
      } while (ballot(state >> 62 == 0) != 0);
      const unsigned complete = ballot(state >> 62 == 2);
      int nearest = 0;
      while (nearest < 32 && (complete >> nearest & 1) == 0) ++nearest;
      uint32_t part = lane <= nearest ? static_cast<uint32_t>(state) : 0;
      for (int bits = 16; bits > 0; bits /= 2) part += shuffle_xor(part, bits);
      prefix += part;
      if (complete != 0) break;
    }
    if (lane == 0) {
      if (tile > 0) store_release(&states[tile], kPrefix | (prefix + total));
      before = prefix;
    }
  }
  if (kBug != Bug::kMissingBarrier) sync_block();
  if (i < length) y[i] = before + scan;
}

// ---- two-stage pipeline of asynchronous copies ----------------------------------------------------------------------

template <Bug kBug>
__global__ void pipeline_kernel(const float* x, float* y, int tiles) {
  SHARED(float, stage, [2][kThreads * 4]);
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    async_copy16(&stage[tile % 2][t * 4], x + static_cast<int64_t>(tile) * kThreads * 4 + t * 4);
    async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      async_wait<kBug == Bug::kShortAsyncWait ? 2 : 1>();
    } else if (kBug != Bug::kMissingAsyncWait) {
      async_wait<0>();
    }
    sync_block();  // the neighbour's copy has landed
    const int other = kThreads * 4 - 1 - t * 4;
    for (int k = 0; k < 4; ++k) y[static_cast<int64_t>(tile) * kThreads * 4 + t * 4 + k] = stage[tile % 2][other - k];
    if (kBug != Bug::kMissingBarrier) sync_block();  // the stage may be overwritten
  }
}

// ---- a warp reverses its values through shared memory ---------------------------------------------------------------

template <Bug kBug>
__global__ void reverse_kernel(const float* x, float* y) {
  SHARED(float, values, [kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  values[t] = x[t];
  if (kBug != Bug::kMissingSyncWarp) sync_warp();
  y[t] = values[t ^ 31];
}

// ---- the last block to finish adds up what all blocks have left -----------------------------------------------------

template <Bug kBug>
__global__ void last_block_kernel(const float* x, float* partial, uint32_t* done, float* sum) {
  SHARED(bool, is_last);
  const float value = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = value;
    if (kBug != Bug::kMissingFence) fence();
    is_last = atomic_add(done, 1) == gridDim.x - 1;
    fence();
  }
  sync_block();
  if (!is_last || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) total += partial[block];
  *sum = total;
}

// ---- matrix instructions --------------------------------------------------------------------------------------------

__global__ void load_matrices_kernel(const uint16_t* matrices, uint32_t* taken) {
  struct alignas(16) Row {
    uint16_t v[8];
  };
  SHARED(Row, rows, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) rows[lane].v[i] = matrices[lane * 8 + i];
  sync_warp();  // every row is there
  uint32_t plain[4], transposed[4];
  load_matrices<false>(plain, &rows[lane]);
  load_matrices<true>(transposed, &rows[lane]);
  for (int m = 0; m < 4; ++m) {
    taken[lane * 4 + m] = plain[m];
    taken[128 + lane * 4 + m] = transposed[m];
  }
}

template <Bug kBug, class T>
__global__ void matrix_product_kernel(const float* a, const float* b, float* products) {
  struct alignas(16) Matrix {
    T v[16][24];
  };
  SHARED(Matrix, as, [2]);  // [m][depth], and [depth][m]
  SHARED(Matrix, bs, [2]);  // [n][depth], and [depth][n]; columns 8 .. 15 are 0
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, column = i % 16;
    as[0].v[row][column] = as[1].v[column][row] = narrow<T>(a[i]);
    bs[0].v[column][row] = bs[1].v[row][column] = narrow<T>(column < 8 ? b[row * 8 + column] : 0.0f);
  }
  if (kBug != Bug::kMissingSyncWarp) sync_warp();  // the matrices are there
  if (kBug == Bug::kDivergentMatrix && lane >= 16) return;
  const int in_matrix = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  for (int order = 0; order < 4; ++order) {
    uint32_t fa[4], fb[4];
    if (order % 2 == 0) {
      load_matrices<false>(fa, &as[0].v[low + in_matrix][high]);
    } else {
      load_matrices<true>(fa, &as[1].v[high + in_matrix][low]);
    }
    if (order / 2 == 0) {
      load_matrices<false>(fb, &bs[0].v[high + in_matrix][low]);
    } else {
      load_matrices<true>(fb, &bs[1].v[low + in_matrix][high]);
    }
    if (kBug == Bug::kSwappedFragments) {
      const uint32_t swapped = fa[1];
      fa[1] = fa[2];
      fa[2] = swapped;
    }
    float c[4] = {};
    mma<T>(c[0], c[1], c[2], c[3], fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) {
      products[order * 128 + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
    }
  }
}

// ---- waits that never end -------------------------------------------------------------------------------------------

__global__ void deadlock_kernel(float* y) {
  float value = 1;
  if (threadIdx.x < 16) {
    value = shuffle(value, 0);
  } else {
    sync_block();
  }
  y[threadIdx.x] = value;
}

__global__ void exits_early_kernel(const float* x, float* y, int length) {
  if (static_cast<int>(threadIdx.x) < length) y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x >= 40) return;  // barriers wait for the threads that are still there
  sync_block();
}

__global__ void wrong_mask_kernel(const float* x, float* y) {
  y[threadIdx.x] = shuffle(x[threadIdx.x], 0, 0x0000ffffu);
}

}  // namespace

void row_sum(Bug bug, const float* x, float* sums, float* scaled, int rows, int columns) {
  with_bug<Bug::kNone, Bug::kMissingMask, Bug::kSharedOutOfBounds, Bug::kDivergentBarrier, Bug::kMissingBarrier,
           Bug::kDivergentShuffle, Bug::kOverlappingOutputs, Bug::kMismatchedOperations, Bug::kGlobalOutOfBounds>(
      bug, [&](auto kBug) {
        launch({"row_sum", dim3(rows), dim3(kThreads)}, row_sum_kernel<kBug()>, x, sums, scaled, columns);
      });
}

void scan(Bug bug, const uint32_t* x, uint32_t* y, uint64_t* states, uint32_t* ticket, int length) {
  with_bug<Bug::kNone, Bug::kBlockOrder, Bug::kMissingBarrier, Bug::kMissingRelease>(bug, [&](auto kBug) {
    launch({"scan", dim3((length + kThreads - 1) / kThreads), dim3(kThreads)}, scan_kernel<kBug()>, x, y, states,
           ticket, length);
  });
}

void pipeline(Bug bug, const float* x, float* y, int tiles) {
  with_bug<Bug::kNone, Bug::kMissingAsyncWait, Bug::kMissingBarrier, Bug::kShortAsyncWait>(
      bug, [&](auto kBug) { launch({"pipeline", dim3(1), dim3(kThreads)}, pipeline_kernel<kBug()>, x, y, tiles); });
}

void reverse(Bug bug, const float* x, float* y) {
  with_bug<Bug::kNone, Bug::kMissingSyncWarp>(
      bug, [&](auto kBug) { launch({"reverse", dim3(1), dim3(kThreads)}, reverse_kernel<kBug()>, x, y); });
}

void last_block(Bug bug, const float* x, float* partial, uint32_t* done, float* sum, int blocks) {
  with_bug<Bug::kNone, Bug::kMissingFence>(bug, [&](auto kBug) {
    launch({"last_block", dim3(blocks), dim3(32)}, last_block_kernel<kBug()>, x, partial, done, sum);
  });
}

void load_matrices(const uint16_t* matrices, uint32_t* taken) {
  launch({"load_matrices", dim3(1), dim3(32)}, load_matrices_kernel, matrices, taken);
}

void matrix_product(Bug bug, const float* a, const float* b, float* products) {
  with_bug<Bug::kNone, Bug::kSwappedFragments, Bug::kDivergentMatrix, Bug::kMissingSyncWarp>(bug, [&](auto kBug) {
    launch({"matrix_product", dim3(1), dim3(32)}, matrix_product_kernel<kBug(), bf16>, a, b, products);
    launch({"matrix_product", dim3(1), dim3(32)}, matrix_product_kernel<kBug(), f16>, a, b, products + 512);
  });
}

void waits(Bug bug, const float* x, float* y) {
  if (bug == Bug::kDeadlock) return launch({"deadlock", dim3(1), dim3(32)}, deadlock_kernel, y);
  if (bug == Bug::kWrongMask) return launch({"wrong_mask", dim3(1), dim3(32)}, wrong_mask_kernel, x, y);
  launch({"exits_early", dim3(1), dim3(64)}, exits_early_kernel, x, y, 64);
}

}  // namespace megalodon::cuda
