// Small kernels of the kinds the library has, each right and with mistakes seeded: what the executor must pass, and
// what it must catch.
#include <stdexcept>

#include "core/bulk.cuh"
#include "core/mma.cuh"
#include "core/portable.cuh"
#include "core/wgmma.cuh"
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

// ---- a product by a warpgroup, in two slabs of depths through one buffer --------------------------------------------

template <Bug kBug>
__global__ void warpgroup_product_kernel(const float* a, const float* b, float* product) {
  constexpr int kDepths = 64, kRows = 64, kColumns = 128;
  struct alignas(1024) Slab {
    bf16 a[kRows * kDepths], b[kColumns * kDepths];
  };
  DYNAMIC_SHARED(Slab, slab);
  const int thread = static_cast<int>(threadIdx.x);
  const auto put = [&](bf16* to, const float* from, int rows, int depth) {
    for (int i = thread; i < rows * kDepths; i += kThreads) {
      const int row = i / kDepths, d = i % kDepths;
      to[row * kDepths + (d / 8 ^ row % 8) * 8 + d % 8] = narrow<bf16>(from[row * 2 * kDepths + depth + d]);
    }
  };
  float sum[2][kColumns / 4] = {};
  for (int depth = 0; depth < 2 * kDepths; depth += kDepths) {
    put(slab->a, a, kRows, depth);
    put(slab->b, b, kColumns, depth);
    if (kBug == Bug::kOverwrittenOperand && depth > 0) wgmma_wait<0>();
    if (kBug != Bug::kMissingProxyFence) fence_async_proxy();
    if (kBug != Bug::kMissingBarrier) sync_block();  // the slab is there
    uint64_t of_a = matrix_descriptor(slab->a, 0, 1024), of_b = matrix_descriptor(slab->b, 0, 1024);
    if (kBug == Bug::kMismatchedOperations && thread >= 32) of_a += 2;
    if (kBug != Bug::kMissingWgmmaFence || depth == 0) wgmma_fence();
    for (int i = 0; i < kDepths / 16; ++i, of_a += 2, of_b += 2) wgmma<bf16, 0, 0>(sum, of_a, of_b);
    wgmma_commit();
    if (kBug == Bug::kMissingWgmmaWait && depth > 0) return;
    if (kBug == Bug::kEarlySums && depth > 0) break;
    if (kBug != Bug::kOverwrittenOperand) wgmma_wait<0>();
    sync_block();  // it has been read
  }
  const auto write = [&] {
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < kColumns / 4; ++c) {
        product[(thread / 32 * 16 + r * 8 + thread % 32 / 4) * kColumns + c / 2 * 8 + thread % 4 * 2 + c % 2] =
            sum[r][c];
      }
    }
  };
  if (kBug == Bug::kEarlySums) write();
  wgmma_wait<0>();
  if (kBug != Bug::kEarlySums) write();
}

// ---- two products by a warpgroup, the sums of the first in registers the operand of the second --------------------

template <Bug kBug>
__global__ void chained_products_kernel(const float* a, const float* b, float* product) {
  constexpr int kDepths = 64;
  struct alignas(1024) Slab {
    bf16 v[128 * kDepths];
  };
  DYNAMIC_SHARED(Slab, slabs);
  const int thread = static_cast<int>(threadIdx.x);
  const auto put = [&](Slab& slab, const float* from, int rows) {
    for (int i = thread; i < rows * kDepths; i += kThreads) {
      const int row = i / kDepths, d = i % kDepths;
      slab.v[row * kDepths + (d / 8 ^ row % 8) * 8 + d % 8] = narrow<bf16>(from[i]);
    }
  };
  put(slabs[0], a, 64);
  put(slabs[1], b, 128);
  fence_async_proxy();
  sync_block();  // the slabs are there
  float sum[2][32], out[2][16] = {};
  for (float (&row)[32] : sum) {
    for (float& value : row) value = 1;
  }
  uint64_t of_a = matrix_descriptor(slabs[0].v, 0, 1024), of_b = matrix_descriptor(slabs[1].v, 0, 1024);
  wgmma_fence();
  for (int i = 0; i < kDepths / 16; ++i, of_a += 2, of_b += 2) {
    if (i == 0 && kBug != Bug::kOldSums) {
      wgmma<bf16, 0, 0, false>(sum, of_a, of_b);
    } else {
      wgmma<bf16, 0, 0>(sum, of_a, of_b);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  uint32_t operand[8][4];
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int r = kBug == Bug::kSwappedFragments ? j / 2 : j % 2;
      operand[i][j] = bits_as<uint32_t>(narrow_run<bf16, 2>(&sum[r][4 * i + (j / 2 + j % 2 - r) * 2]));
    }
  }
  if (kBug != Bug::kMissingWgmmaFence) wgmma_fence();
  of_b = matrix_descriptor(slabs[1].v, 128 * 128, 1024);  // its rows are depths now
  for (int i = 0; i < 8; ++i, of_b += 128) wgmma<bf16, 1>(out, operand[i], of_b);
  wgmma_commit();
  if (kBug == Bug::kOverwrittenOperand) operand[7][0] = 0;
  wgmma_wait<0>();
  for (int r = 0; r < 2; ++r) {
    for (int c = 0; c < 16; ++c) {
      product[(thread / 32 * 16 + r * 8 + thread % 32 / 4) * kDepths + c / 2 * 8 + thread % 4 * 2 + c % 2] = out[r][c];
    }
  }
}

// ---- tensor copies: the first warp adds tiles that a thread of the second brings, two blocks share each -------------

struct alignas(1024) LineTile {
  uint16_t v[8][64];
};

template <Bug kBug>
__global__ void tensor_tiles_kernel(GRID_CONSTANT TensorMap map, uint32_t* sums, int tiles) {
  constexpr int kStages = 2, kBytes = sizeof(LineTile);
  DYNAMIC_SHARED(LineTile, stages);
  SHARED(Barrier, full, [kStages + 1]);
  SHARED(Barrier, free, [kStages]);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      free[i].init(2);
    }
    full[kStages].init(1);
    if (kBug != Bug::kMissingBarrierFence) fence_barrier_init();
  }
  if (kBug == Bug::kMissingClusterSync) {
    sync_block();
  } else {
    sync_cluster();
  }
  if (threadIdx.x >= 32) {
    for (int i = 0; lane == 0 && i < tiles; ++i) {
      const int stage = i % kStages;
      if (kBug != Bug::kMissingFreeWait) free[stage].wait(i / kStages % 2 ^ 1);
      full[stage].expect(kBug == Bug::kFewBytes ? kBytes / 2 : kBug == Bug::kManyBytes ? 2 * kBytes : kBytes);
      if (i % 2 == static_cast<int>(rank)) tensor_copy(&stages[stage], map, 0, 0, i * 8, full[stage], 3);
    }
    if (kBug == Bug::kUnwaitedCopy && lane == 0) tensor_copy(&stages[kStages], map, 0, 0, 0, full[kStages]);
  } else {
    uint32_t sum[16] = {};
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % kStages, line = lane / 4;
      if (kBug != Bug::kMissingFullWait) full[stage].wait(i / kStages % 2);
      const auto release = [&] {
        free[stage].arrive();
        free[stage].arrive_at(rank ^ 1);
      };
      if (kBug == Bug::kEarlyRelease && lane == 0) release();
      for (int n = 0; n < 16; ++n) {
        const int at = lane % 4 * 16 + n;
        sum[n] += stages[stage].v[line][(at / 8 ^ line) * 8 + at % 8];
      }
      sync_warp();  // all have read it
      if (kBug != Bug::kEarlyRelease && (lane == 0 || kBug == Bug::kManyArrivals)) release();
    }
    for (int n = 0; n < 16; ++n) sums[rank * 512 + lane * 16 + n] = sum[n];
  }
  if (kBug != Bug::kEarlyExit) sync_cluster();  // nobody arrives or copies here any more
}

// ---- numbers that several warps have read are written again, in turns of mbarriers ----------------------------------

template <Bug kBug>
__global__ void several_readers_kernel(const float* x, float* sums, int turns) {
  SHARED(float, numbers, [32]);
  SHARED(Barrier, full);
  SHARED(Barrier, free);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const bool writes = thread >= 64;  // the third warp, which reads, too
  if (thread == 0) {
    full.init(32);
    free.init(2);
    fence_barrier_init();
  }
  sync_block();  // the barriers are there
  float sum = 0;
  for (int i = 0; i < turns; ++i) {
    if (writes) {
      free.wait(1 - i % 2);
      numbers[lane] = x[i * 32 + lane];
      full.arrive();
    }
    full.wait(i % 2);
    const bool early = kBug == (thread < 32 ? Bug::kEarlyRelease : Bug::kEarlyLastRelease);
    if (early && !writes && lane == 0) free.arrive();
    sum += numbers[lane ^ 1];
    if (kBug != Bug::kMissingSyncWarp || !writes) sync_warp();  // all lanes have read
    if (!early && !writes && lane == 0) free.arrive();
  }
  sums[thread] = sum;
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

template <Bug... kBugs, class Choose>
static void with_bug(Bug bug, Choose&& choose) {
  bool found = ((bug == kBugs && (choose(std::integral_constant<Bug, kBugs>{}), true)) || ...);
  if (!found) throw std::runtime_error("this kernel has no such mistake");
}

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

void warpgroup_product(Bug bug, const float* a, const float* b, float* product) {
  with_bug<Bug::kNone, Bug::kMissingProxyFence, Bug::kMissingBarrier, Bug::kMismatchedOperations,
           Bug::kMissingWgmmaFence, Bug::kMissingWgmmaWait, Bug::kEarlySums, Bug::kOverwrittenOperand>(
      bug, [&](auto kBug) {
        launch({"warpgroup_product", dim3(1), dim3(kThreads), 192 * 64 * 2}, warpgroup_product_kernel<kBug()>, a, b,
               product);
      });
}

void chained_products(Bug bug, const float* a, const float* b, float* product) {
  with_bug<Bug::kNone, Bug::kSwappedFragments, Bug::kMissingWgmmaFence, Bug::kOverwrittenOperand, Bug::kOldSums>(
      bug, [&](auto kBug) {
        launch({"chained_products", dim3(1), dim3(kThreads), 2 * 128 * 64 * 2}, chained_products_kernel<kBug()>, a, b,
               product);
      });
}

void tensor_tiles(Bug bug, const uint16_t* x, uint32_t* sums, int tiles) {
  const TensorMap map = tensor_map("tensor_tiles", x, {64, 1, int64_t{tiles} * 8}, {64, 64}, 8);
  with_bug<Bug::kNone, Bug::kMissingFullWait, Bug::kMissingFreeWait, Bug::kEarlyRelease, Bug::kMissingClusterSync,
           Bug::kMissingBarrierFence, Bug::kEarlyExit, Bug::kFewBytes, Bug::kManyBytes, Bug::kManyArrivals,
           Bug::kUnwaitedCopy>(bug, [&](auto kBug) {
    launch({"tensor_tiles", dim3(2), dim3(64), 3 * sizeof(LineTile), nullptr, 2}, tensor_tiles_kernel<kBug()>, map,
           sums, tiles);
  });
}

void several_readers(Bug bug, const float* x, float* sums, int turns) {
  with_bug<Bug::kNone, Bug::kEarlyRelease, Bug::kEarlyLastRelease, Bug::kMissingSyncWarp>(bug, [&](auto kBug) {
    launch({"several_readers", dim3(1), dim3(96)}, several_readers_kernel<kBug()>, x, sums, turns);
  });
}

void waits(Bug bug, const float* x, float* y) {
  if (bug == Bug::kDeadlock) return launch({"deadlock", dim3(1), dim3(32)}, deadlock_kernel, y);
  if (bug == Bug::kWrongMask) return launch({"wrong_mask", dim3(1), dim3(32)}, wrong_mask_kernel, x, y);
  launch({"exits_early", dim3(1), dim3(64)}, exits_early_kernel, x, y, 64);
}

}  // namespace megalodon::cuda
