// Matrix instructions of a warpgroup, four warps: 64 x N tiles, 16 deep, of bf16 or f16 products summed in float, both
// operands in shared memory; sm_90a alone. They are asynchronous: wgmma_fence orders the registers before them,
// wgmma_commit ends a group, wgmma_wait waits for groups. The sums of a warp w, with g = lane / 4 and t = lane % 4 (PTX
// ISA, "Register fragments for wgmma.mma_async.m64nNk16"):
//   sum[0][2 j], sum[0][2 j + 1] row 16 w + g, columns 8 j + 2 t and 8 j + 2 t + 1; sum[1][..] row 16 w + g + 8.
// An operand lies in patterns of 1024 bytes, so aligned: 8 lines of 64 numbers, of which the 16-byte pack p of line l
// stands at place p ^ l (swizzle of 128 bytes). Along the depth a line is a row with 64 depths, eight rows a pattern;
// else a line is a depth with 64 rows (b: columns), eight depths a pattern.
#pragma once

#include "core/mma.cuh"

namespace megalodon::cuda {

// Makes this thread's writes to shared memory visible to wgmma, which a barrier alone does not.
DEVICE void fence_async_proxy() {
#if MEGALODON_NVCC
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  simt::fence_async_proxy();
#endif
}

// Before the first wgmma, and whenever other instructions have written the sums.
DEVICE void wgmma_fence() {
#if MEGALODON_NVCC
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence();
#endif
}

DEVICE void wgmma_commit([[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit(site);
#endif
}

// Waits until at most kGroupsLeft of the committed groups are in flight.
template <int kGroupsLeft>
DEVICE void wgmma_wait([[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
#else
  simt::wgmma_wait(kGroupsLeft, site);
#endif
}

// A sum, after wgmma_wait: keeps the compiler from reading it before.
DEVICE float settled(float sum) {
#if MEGALODON_NVCC
  asm volatile("" : "+f"(sum)::"memory");
#endif
  return sum;
}

// Of 8 lines from `first` on; `leading` bytes on begin the next 64 rows where lines are depths, `stride` bytes on the
// next 8 lines.
DEVICE uint64_t matrix_descriptor(const void* first, uint32_t leading, uint32_t stride) {
#if MEGALODON_NVCC
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(first));
#else
  const uint32_t address = simt::shared_address(first);
#endif
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (address & 0x3ffff) >> 4;
}

#if MEGALODON_NVCC
// "%0, %1, .. " of the sums, and those in their order: registers 4 j to 4 j + 3 are columns 2 j and 2 j + 1 of both
// rows.
#define MEGALODON_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define MEGALODON_SUMS_30 MEGALODON_TEN() ", " MEGALODON_TEN(1) ", " MEGALODON_TEN(2)
#define MEGALODON_SUMS_60 MEGALODON_SUMS_30 ", " MEGALODON_TEN(3) ", " MEGALODON_TEN(4) ", " MEGALODON_TEN(5)
#define MEGALODON_SUMS_64 MEGALODON_SUMS_30 ", %30, %31"
#define MEGALODON_SUMS_80 MEGALODON_SUMS_30 ", " MEGALODON_TEN(3)
#define MEGALODON_SUMS_128 MEGALODON_SUMS_60 ", %60, %61, %62, %63"
#define MEGALODON_SUMS_256                                                                                \
  MEGALODON_SUMS_60 ", " MEGALODON_TEN(6) ", " MEGALODON_TEN(7) ", " MEGALODON_TEN(8) ", " MEGALODON_TEN( \
      9) ", " MEGALODON_TEN(10) ", " MEGALODON_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define MEGALODON_SUM(j) "+f"(s[0][2 * (j)]), "+f"(s[0][2 * (j) + 1]), "+f"(s[1][2 * (j)]), "+f"(s[1][2 * (j) + 1])
#define MEGALODON_SUM_4(j) MEGALODON_SUM(j), MEGALODON_SUM((j) + 1), MEGALODON_SUM((j) + 2), MEGALODON_SUM((j) + 3)
#define MEGALODON_SUM_64 MEGALODON_SUM_4(0), MEGALODON_SUM_4(4)
#define MEGALODON_SUM_80 MEGALODON_SUM_64, MEGALODON_SUM(8), MEGALODON_SUM(9)
#define MEGALODON_SUM_128 MEGALODON_SUM_64, MEGALODON_SUM_4(8), MEGALODON_SUM_4(12)
#define MEGALODON_SUM_256 \
  MEGALODON_SUM_128, MEGALODON_SUM_4(16), MEGALODON_SUM_4(20), MEGALODON_SUM_4(24), MEGALODON_SUM_4(28)
// The instruction for n columns; rest: the numbers of its operands that follow the sums.
#define MEGALODON_WGMMA(n, type, rest) \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MEGALODON_SUMS_##n "}, " rest ";"
#define MEGALODON_WGMMA_SHARED(n, type, rest) \
  asm volatile(MEGALODON_WGMMA(n, type, rest) \
               : MEGALODON_SUM_##n            \
               : "l"(a), "l"(b), "n"(int{kAdds}), "n"(kTransposedA), "n"(kTransposedB))
#define MEGALODON_WGMMA_REGISTERS(n, type, rest) \
  asm volatile(MEGALODON_WGMMA(n, type, rest)    \
               : MEGALODON_SUM_##n               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAdds}), "n"(kTransposedB))
// f(columns, type, rest) for the columns of s, of those listed, and its type.
#define MEGALODON_BY_TYPE(f, n, rest)        \
  if constexpr (kColumns * 4 == n) {         \
    if constexpr (std::is_same_v<T, bf16>) { \
      f(n, "bf16", rest);                    \
    } else {                                 \
      f(n, "f16", rest);                     \
    }                                        \
  }
#endif

// s += a b, or s = a b, of operands whose lines are depths where they are kTransposed. Neither s nor the memory may be
// touched before wgmma_wait.
template <class T, int kTransposedA, int kTransposedB, bool kAdds = true, int kColumns>
DEVICE void wgmma(float (&s)[2][kColumns], uint64_t a, uint64_t b, [[maybe_unused]] Site site = Site::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static_assert(kColumns == 16 || kColumns == 20 || kColumns == 32 || kColumns == 64);
#if MEGALODON_NVCC
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_SHARED, 64, "%32, %33, %34, 1, 1, %35, %36")
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_SHARED, 80, "%40, %41, %42, 1, 1, %43, %44")
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_SHARED, 128, "%64, %65, %66, 1, 1, %67, %68")
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_SHARED, 256, "%128, %129, %130, 1, 1, %131, %132")
#else
  simt::wgmma({[](uint16_t bits) { return widen(T{bits}); }, kColumns * 4, kTransposedA != 0, kTransposedB != 0, kAdds,
               a, b, false},
              s[0], nullptr, site);
#endif
}

// The same with a, 64 rows and 16 depths, in registers, which no more than s may be touched before wgmma_wait: of a
// warp w, with g and t as above (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"),
//   a[0] row 16 w + g, depths 2 t and 2 t + 1; a[1] row 16 w + g + 8; a[2], a[3] the same rows, depths 8 higher.
// So sums of one product, made 16-bit numbers, are the operand a of the next.
template <class T, int kTransposedB, int kColumns>
DEVICE void wgmma(float (&s)[2][kColumns], const uint32_t (&a)[4], uint64_t b,
                  [[maybe_unused]] Site site = Site::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64);
#if MEGALODON_NVCC
  constexpr bool kAdds = true;
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_REGISTERS, 64, "{%32, %33, %34, %35}, %36, %37, 1, 1, %38")
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_REGISTERS, 128, "{%64, %65, %66, %67}, %68, %69, 1, 1, %70")
  MEGALODON_BY_TYPE(MEGALODON_WGMMA_REGISTERS, 256, "{%128, %129, %130, %131}, %132, %133, 1, 1, %134")
#else
  simt::wgmma({[](uint16_t bits) { return widen(T{bits}); }, kColumns * 4, false, kTransposedB != 0, true, 0, b, true},
              s[0], a, site);
#endif
}

// The sums of two warpgroups, each with 64 rows and all columns.
template <int kTileColumnsOf>
struct WgmmaSums : Fragments<WgmmaSums<kTileColumnsOf>, 2, kTileColumnsOf / 4> {
  using Base = Fragments<WgmmaSums<kTileColumnsOf>, 2, kTileColumnsOf / 4>;
  using Base::kColumns, Base::sum;
  static constexpr int kTile = 128, kTileColumns = kTileColumnsOf;

  static DEVICE int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }
  static DEVICE int warp_column() { return 0; }

  // They are there, all but those of the last kGroupsLeft groups.
  template <int kGroupsLeft = 0>
  DEVICE void finish() {
    wgmma_wait<kGroupsLeft>();
    UNROLL
    for (int c = 0; c < kColumns; ++c) sum[0][c] = settled(sum[0][c]), sum[1][c] = settled(sum[1][c]);
  }
};

// A tile (core/tile_product.cuh) by these instructions.
template <class T, int kTileColumnsOf>
struct WgmmaTile : WgmmaSums<kTileColumnsOf> {
  using WgmmaSums<kTileColumnsOf>::sum, WgmmaSums<kTileColumnsOf>::kTile, WgmmaSums<kTileColumnsOf>::kTileColumns;
  using Weight = T;
  static constexpr int kDepth = 64;
  static constexpr int kLag = 1;
  static constexpr int kStages = kTileColumns > 128 ? 4 : 3;  // 192 KB for one block, or 96 KB for each of two
  static constexpr bool kCopies = true;
  static constexpr int kLine = 64, kLineBytes = 128, kPatternBytes = 1024;
  template <int kRowsOfSlab>
  struct alignas(kPatternBytes) Slab {
    T v[kRowsOfSlab * kDepth];
  };
  struct Stage {
    Slab<kTile> a;
    Slab<kTileColumns> b;
  };

  template <bool kAlongDepth, class S>
  static DEVICE T* place_of(S& slab, int row, int depth) {
    const int line = kAlongDepth ? row : row / kLine * kDepth + depth, in_line = kAlongDepth ? depth : row % kLine;
    return slab.v + line * kLine + ((in_line / 8 ^ line % 8) * 8 + in_line % 8);
  }
  template <bool kAlongDepth, class S>
  static DEVICE void put(S& slab, int row, int depth, const Pack<T, 8>& pack) {
    store(place_of<kAlongDepth>(slab, row, depth), pack);
  }

  // Of the rows from `row` on, for the first 16 depths; kStep further are those for the next ones.
  template <bool kAlongDepth>
  static DEVICE uint64_t descriptor(const T* slab, int row) {
    return kAlongDepth ? matrix_descriptor(slab + row * kLine, 0, kPatternBytes)
                       : matrix_descriptor(slab + row / kLine * kLine * kDepth, kDepth * kLineBytes, kPatternBytes);
  }
  template <bool kAlongDepth>
  static constexpr uint64_t kStep = (kAlongDepth ? 16 * sizeof(T) : 16 * kLineBytes) / 16;

  static DEVICE void publish() { fence_async_proxy(); }

  // Begins to add the product; when it returns the one before is complete.
  template <bool kADepth, bool kBDepth>
  DEVICE void add(const Slab<kTile>& a_slab, const Slab<kTileColumns>& b_slab) {
    uint64_t a = descriptor<kADepth>(a_slab.v, static_cast<int>(threadIdx.x) / 128 * 64);
    uint64_t b = descriptor<kBDepth>(b_slab.v, 0);
    wgmma_fence();
    UNROLL
    for (int depth = 0; depth < kDepth; depth += 16) {
      wgmma<T, !kADepth, !kBDepth>(sum, a, b);
      a += kStep<kADepth>, b += kStep<kBDepth>;
    }
    wgmma_commit();
    wgmma_wait<kLag>();
  }
};

}  // namespace megalodon::cuda
