// As kernels.cu: what is by Hopper's instructions, warpgroup products, tensor copies and barriers in shared memory.
#include "core/bulk.cuh"
#include "core/pack.cuh"
#include "core/portable.cuh"
#include "core/wgmma.cuh"
#include "kernels.h"

namespace megalodon::cuda {
namespace {

constexpr int kThreads = 128;

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
  SHARED(uint64_t, packs, [8]);
  bf16* const numbers = reinterpret_cast<bf16*>(packs);
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
      if (i % 2 == 0 && lane % 2 == 0) {
        reinterpret_cast<uint32_t*>(numbers)[lane / 2] = bits_as<uint32_t>(narrow_run<bf16, 2>(x + i * 32 + lane));
      } else if (i % 2 != 0 && lane % 4 == 3) {  // in other widths than those before
        numbers[lane] = narrow<bf16>(x[i * 32 + lane]);
      }
      full.arrive();
    }
    full.wait(i % 2);
    const bool early = kBug == (thread < 32 ? Bug::kEarlyRelease : Bug::kEarlyLastRelease);
    if (early && !writes && lane == 0) free.arrive();
    const bf16* pack = numbers + lane / 4 * 4;
    if (thread < 32) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(pack + 2);
      for (const bf16 value : bits_as<Pack<bf16, 2>>(pair).v) sum += widen(value);
    } else {
      const uint64_t all = *reinterpret_cast<const uint64_t*>(pack);
      for (const bf16 value : bits_as<Pack<bf16, 4>>(all).v) sum += widen(value);
    }
    if (kBug != Bug::kMissingSyncWarp || !writes) sync_warp();  // all lanes have read
    if (!early && !writes && lane == 0) free.arrive();
  }
  sums[thread] = sum;
}

// ---- the operand of a warpgroup product is read by two more warps, and then written by another one -----------------

template <Bug kBug>
__global__ void mixed_readers_kernel(const float* a, const float* b, float* product, float* sums) {
  constexpr int kDepths = 64, kAll = 2 * kThreads;
  struct alignas(1024) Slab {
    bf16 v[64 * kDepths];
  };
  DYNAMIC_SHARED(Slab, slabs);
  SHARED(Barrier, free);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int i = thread; i < 64 * kDepths; i += kAll) {
    const int row = i / kDepths, d = i % kDepths, at = row * kDepths + (d / 8 ^ row % 8) * 8 + d % 8;
    slabs[0].v[at] = narrow<bf16>(a[i]);
    slabs[1].v[at] = narrow<bf16>(b[i]);
  }
  if (thread == 0) {
    free.init(6);
    fence_barrier_init();
  }
  fence_async_proxy();
  sync_block();  // the slabs and the barrier are there
  const auto release = [&] {
    sync_warp();
    if (lane == 0) free.arrive();
  };
  if (warp == 6) {
    free.wait(0);
    for (int i = lane; i < 64 * kDepths; i += 32) slabs[1].v[i] = narrow<bf16>(0.0f);
  } else if (warp == 4 || warp == 5) {
    float sum = 0;
    for (int i = 0; i < kDepths; ++i) sum += widen(slabs[1].v[lane * kDepths + i]);
    sums[thread - kThreads] = sum;
    release();
  } else if (warp < 4) {
    float sum[2][16];
    uint64_t of_a = matrix_descriptor(slabs[0].v, 0, 1024), of_b = matrix_descriptor(slabs[1].v, 0, 1024);
    if (kBug == Bug::kEarlyRelease) release();
    wgmma_fence();
    for (int i = 0; i < kDepths / 16; ++i, of_a += 2, of_b += 2) {
      if (i == 0) {
        wgmma<bf16, 0, 0, false>(sum, of_a, of_b);
      } else {
        wgmma<bf16, 0, 0>(sum, of_a, of_b);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (kBug != Bug::kEarlyRelease) release();
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 16; ++c) {
        product[(warp * 16 + r * 8 + lane / 4) * 64 + c / 2 * 8 + lane % 4 * 2 + c % 2] = sum[r][c];
      }
    }
  }
}

}  // namespace

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

void mixed_readers(Bug bug, const float* a, const float* b, float* product, float* sums) {
  with_bug<Bug::kNone, Bug::kEarlyRelease>(bug, [&](auto kBug) {
    launch({"mixed_readers", dim3(1), dim3(2 * kThreads), 2 * 64 * 64 * 2}, mixed_readers_kernel<kBug()>, a, b, product,
           sums);
  });
}

}  // namespace megalodon::cuda
