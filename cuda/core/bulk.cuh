// Tensor copies, the barriers they arrive at, and clusters of blocks; sm_90a alone.
//
// A copy brings a box of a tensor to shared memory, asynchronously, swizzled as wgmma reads it (core/wgmma.cuh): lines
// of 64 numbers, 128 bytes, one after another. One thread asks for it; all that wait for the barrier see what it
// brought, wgmma too. A barrier's phase ends with its last missing arrival, when the bytes expected in it have come;
// phases have the parities 0, 1, 0.. A cluster's blocks stand at the same places of their shared memories: a copy may
// go to all of them, a thread arrive at another block's barrier. Neither may meet a block that has not begun or has
// exited.
#pragma once

#include "core/portable.cuh"

namespace megalodon::cuda {

// What copies take from a tensor of 16-bit numbers: boxes of `lines` lines of 64 numbers of the first dimension, along
// the last one; zeros beyond the sizes. A kernel's parameter, by value, GRID_CONSTANT.
#if MEGALODON_NVCC
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
#else
using simt::TensorMap;
#endif

// sizes and strides in numbers; the first dimension is contiguous. Throws Error where the driver refuses.
#if MEGALODON_NVCC
TensorMap tensor_map(const char* kernel, const void* base, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                     int lines);  // core/device.cu
#else
inline TensorMap tensor_map(const char*, const void* base, const int64_t (&sizes)[3], const int64_t (&strides)[2],
                            int lines) {
  return simt::tensor_map(base, sizes, strides, lines);
}
#endif

struct alignas(8) Barrier {
  uint64_t state;

#if MEGALODON_NVCC
  DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }
#endif

  // By one thread, which then calls fence_barrier_init; sync_block or sync_cluster shows it to the others.
  DEVICE void init(int count) {
#if MEGALODON_NVCC
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
#else
    simt::mbarrier_init(&state, count);
#endif
  }

  DEVICE void arrive(int count = 1) {
#if MEGALODON_NVCC
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(count) : "memory");
#else
    simt::mbarrier_arrive(&state, count, simt::cluster_rank());
#endif
  }

  // At the barrier that stands here in the cluster's block `rank`. What the other block may then do is copy over what
  // wgmma has read here, or what was fenced for it. For other accesses to be ordered between blocks (.release.cluster,
  // .acquire.cluster in wait) each arrival would be a fence of the GPU, each wait would empty the L1 cache.
  DEVICE void arrive_at(uint32_t rank) {
#if MEGALODON_NVCC
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(address()),
        "r"(rank)
        : "memory");
#else
    simt::mbarrier_arrive(&state, 1, rank);
#endif
  }

  // Arrives, and lets the phase wait for so many bytes of copies.
  DEVICE void expect(int bytes) {
#if MEGALODON_NVCC
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
#else
    simt::mbarrier_expect(&state, bytes);
#endif
  }

  // Until the phase of that parity has ended; that before the first phase, of parity 1, has.
  DEVICE void wait(int parity) {
#if MEGALODON_NVCC
    uint32_t is_over = 0;
    while (is_over == 0) {
      asm volatile(
          "{\n\t.reg .pred over;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, over;\n\t}"
          : "=r"(is_over)
          : "r"(address()), "r"(parity)
          : "memory");
    }
#else
    simt::mbarrier_wait(&state, parity);
#endif
  }
};

DEVICE void fence_barrier_init() {
#if MEGALODON_NVCC
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  simt::fence_barrier_init();
#endif
}

// The box at (x, y, z) to `shared`, aligned to 1024 bytes.
DEVICE void tensor_copy(void* shared, const TensorMap& map, int x, int y, int z, Barrier& barrier) {
#if MEGALODON_NVCC
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier.address())
      : "memory");
#else
  simt::tensor_copy(shared, map, {x, y, z}, &barrier.state, 1u << simt::cluster_rank());
#endif
}

// To the same place of all blocks of the cluster in `ranks`, a bit for each; it arrives at the barrier of each.
DEVICE void tensor_copy(void* shared, const TensorMap& map, int x, int y, int z, Barrier& barrier, uint16_t ranks) {
#if MEGALODON_NVCC
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier.address()), "h"(ranks)
      : "memory");
#else
  simt::tensor_copy(shared, map, {x, y, z}, &barrier.state, ranks);
#endif
}

// Gives this warpgroup's registers back but for so many a thread, or takes so many; all its warps, at the beginning of
// a branch that is theirs.
template <int kRegisters>
DEVICE void shrink_registers() {
#if MEGALODON_NVCC
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
DEVICE void grow_registers() {
#if MEGALODON_NVCC
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// The number of this block in its cluster.
DEVICE uint32_t cluster_rank() {
#if MEGALODON_NVCC
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return simt::cluster_rank();
#endif
}

// A barrier of all threads of the cluster that have not exited, in two halves, by whole warps.
DEVICE void arrive_cluster([[maybe_unused]] Site site = Site::here()) {
  sync_warp(kAllLanes, site);
#if MEGALODON_NVCC
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  simt::cluster_arrive();
#endif
}

DEVICE void wait_cluster([[maybe_unused]] Site site = Site::here()) {
  sync_warp(kAllLanes, site);
#if MEGALODON_NVCC
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  simt::cluster_wait();
#endif
}

DEVICE void sync_cluster([[maybe_unused]] Site site = Site::here()) {
  arrive_cluster(site);
  wait_cluster(site);
}

}  // namespace megalodon::cuda
