// Matrix instructions of a warp: 16 x 8 tiles, 16 deep, of bf16 or f16 products summed in float; sm_80 and later.
// Besides portable.cuh the only header with inline PTX. With g = lane / 4 and t = lane % 4, a thread holds (PTX ISA,
// "Matrix fragments for mma.m16n8k16")
//   a[0] rows g, a[1] rows g + 8, depths 2 t and 2 t + 1; a[2], a[3] the same rows, depths 8 higher;
//   b[0] column g, depths 2 t and 2 t + 1; b[1] depths 8 higher;
//   c[0], c[1] row g, columns 2 t and 2 t + 1; c[2], c[3] row g + 8.
#pragma once

#include "core/tile_product.cuh"

namespace megalodon::cuda {

#if !MEGALODON_NVCC
namespace host {

struct LoadOperand {
  uint4 row;  // that this lane points at
  uint32_t taken[4];
};

// What runs while the lanes meet must be untraced throughout, its helpers too: it stands for an instruction.
MEGALODON_SIMT_UNTRACED inline uint32_t number_at(void* const operands[32], int row, int column) {
  uint16_t numbers[8];
  memcpy(numbers, &static_cast<LoadOperand*>(operands[row])->row, sizeof numbers);
  return numbers[column];
}

MEGALODON_SIMT_UNTRACED inline void require_all(const char* what, uint32_t mask, uint32_t live) {
  if ((mask & live) != kAllLanes) simt::fail("%s needs all 32 lanes (mask %08x, live %08x)", what, mask, live);
}

template <bool kTransposed>
MEGALODON_SIMT_UNTRACED void load_matrices(void* const operands[32], uint32_t mask, uint32_t live) {
  require_all("load_matrices", mask, live);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const uint32_t low = kTransposed ? number_at(operands, 8 * m + 2 * t, g) : number_at(operands, 8 * m + g, 2 * t);
      const uint32_t high =
          kTransposed ? number_at(operands, 8 * m + 2 * t + 1, g) : number_at(operands, 8 * m + g, 2 * t + 1);
      static_cast<LoadOperand*>(operands[lane])->taken[m] = low | high << 16;
    }
  }
}

struct MmaOperand {
  uint32_t a[4], b[2];
  float c[4];
};

template <class T>
MEGALODON_SIMT_UNTRACED float half_of(uint32_t pair, int half) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * half)});
}

template <class T>
MEGALODON_SIMT_UNTRACED void mma(void* const operands[32], uint32_t mask, uint32_t live) {
  require_all("mma", mask, live);
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of<T>(operand.a[i], half);
      for (int i = 0; i < 2; ++i) b[2 * t + half + i * 8][g] = half_of<T>(operand.b[i], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& operand = *static_cast<MmaOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int d = 0; d < 16; ++d) sum += a[row][d] * b[d][column];
      operand.c[i] += sum;
    }
  }
}

}  // namespace host
#endif

// Four matrices of 8 x 8 16-bit numbers from shared memory: lane l points at row l % 8, 16 aligned bytes, of matrix l
// / 8. taken[m] are the numbers (g, 2 t) and (g, 2 t + 1) of matrix m, or, kTransposed, (2 t, g) and (2 t + 1, g).
template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&taken)[4], const void* row, [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(taken[0]), "=r"(taken[1]), "=r"(taken[2]), "=r"(taken[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(taken[0]), "=r"(taken[1]), "=r"(taken[2]), "=r"(taken[3])
                 : "r"(address)
                 : "memory");
  }
#else
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("load_matrices: a row is not aligned to 16 bytes");
  host::LoadOperand operand{*static_cast<const uint4*>(row), {}};
  simt::warp_meet(kAllLanes, WarpOp::kMatrix, &operand, host::load_matrices<kTransposed>, site);
  memcpy(taken, operand.taken, sizeof taken);
#endif
}

// c += a b.
template <class T>
DEVICE void mma(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                [[maybe_unused]] Site site = Site::here()) {
#if MEGALODON_NVCC
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  host::MmaOperand operand{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c0, c1, c2, c3}};
  simt::warp_meet(kAllLanes, WarpOp::kMatrix, &operand, host::mma<T>, site);
  c0 = operand.c[0], c1 = operand.c[1], c2 = operand.c[2], c3 = operand.c[3];
#endif
}

// The sums of a tile (core/tile_product.cuh) as these instructions hold them: a warp has kRows * 8 rows from
// Tile::warp_row() and kColumns * 4 columns from Tile::warp_column() on.
template <class Tile, int kRowsOfThread, int kColumnsOfThread>
struct Fragments {
  using Sum = float;
  static constexpr int kRows = kRowsOfThread, kColumns = kColumnsOfThread, kRun = 2;
  static constexpr int kRowLanes = 4;
  static constexpr int kRowColumns = kColumns * 4;

  float sum[kRows][kColumns];

  static DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static DEVICE int row(int r) { return Tile::warp_row() + r * 8 + lane() / 4; }
  static DEVICE int column(int c) { return Tile::warp_column() + c / 2 * 8 + lane() % 4 * 2 + c % 2; }

  DEVICE void clear() { clear_sums(sum); }

  // put(row, column, pack) for all of the sums, as packs of neighbours in U. The whole warp calls it: of 16-bit numbers
  // the four lanes that share a row exchange pairs, so that each has 8 of one matrix to store at once.
  template <class U, class Put>
  DEVICE void for_packs(Put&& put) const {
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (sizeof(U) == 2) {
        UNROLL
        for (int c = 0; c < kColumns; c += 8) {
          uint32_t w[4];  // a pair of each of four matrices
          UNROLL
          for (int i = 0; i < 4; ++i) w[i] = bits_as<uint32_t>(narrow_run<U, 2>(&sum[r][c + 2 * i]));
          UNROLL
          for (int i = 0; i < 4; i += 2) exchange(w[i], w[i + 1], 1);
          UNROLL
          for (int i = 0; i < 2; ++i) exchange(w[i], w[i + 2], 2);
          Pack<U, 8> pack;
          UNROLL
          for (int i = 0; i < 4; ++i) {
            const auto pair = bits_as<Pack<U, 2>>(w[i]);
            pack.v[2 * i] = pair.v[0], pack.v[2 * i + 1] = pair.v[1];
          }
          put(row(r), Tile::warp_column() + lane() % 4 * 8 + c * 4, pack);
        }
      } else {
        UNROLL
        for (int c = 0; c < kColumns; c += kRun) put(row(r), column(c), narrow_run<U, kRun>(&sum[r][c]));
      }
    }
  }
  // The lane without the bit gives `second` for the other one's `first`.
  static DEVICE void exchange(uint32_t& first, uint32_t& second, int bit) {
    const bool is_upper = (lane() & bit) != 0;
    const uint32_t taken = shuffle_xor(is_upper ? first : second, bit);
    (is_upper ? first : second) = taken;
  }
};

// A tile by these instructions: 4 x 2 warps, each with a quarter of the rows and half of the columns. Slabs lie in
// shared memory as they do outside; what is not contiguous along the depth is transposed on its way to the registers.
template <class T, int kSize>
struct MmaTile : Fragments<MmaTile<T, kSize>, kSize / 32, kSize / 8> {
  using Base = Fragments<MmaTile<T, kSize>, kSize / 32, kSize / 8>;
  using Base::kColumns, Base::kRows, Base::lane, Base::sum;
  using Weight = T;
  static constexpr int kTile = kSize, kTileColumns = kSize;
  static constexpr int kDepth = 32;
  static constexpr int kStages = 2, kLag = 0;
  static constexpr bool kCopies = true;
  static constexpr int kPad = 8;  // the 8 rows of a matrix lie in different banks
  static constexpr int kDepthStride = kDepth + kPad, kRowStride = kSize + kPad;
  struct alignas(16) Slab {
    T v[kSize * kDepthStride > kDepth* kRowStride ? kSize * kDepthStride : kDepth * kRowStride];
  };
  struct Stage {
    Slab a, b;
  };

  static DEVICE int warp_row() { return static_cast<int>(threadIdx.x) / 64 * (kSize / 4); }
  static DEVICE int warp_column() { return static_cast<int>(threadIdx.x) / 32 % 2 * (kSize / 2); }
  static DEVICE void publish() {}
  DEVICE void finish() {}

  template <bool kAlongDepth>
  static DEVICE int place(int row, int depth) {
    return kAlongDepth ? row * kDepthStride + depth : depth * kRowStride + row;
  }

  template <bool kAlongDepth>
  static DEVICE T* place_of(Slab& slab, int row, int depth) {
    return slab.v + place<kAlongDepth>(row, depth);
  }

  template <bool kAlongDepth>
  static DEVICE void put(Slab& slab, int row, int depth, const Pack<T, 8>& pack) {
    store(place_of<kAlongDepth>(slab, row, depth), pack);
  }

  template <bool kADepth, bool kBDepth>
  DEVICE void add(const Slab& a_slab, const Slab& b_slab) {
    const int in_matrix = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    UNROLL
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t a[kRows / 2][4];
      UNROLL
      for (int i = 0; i < kRows / 2; ++i) {  // the four matrices: rows 0 and 8, then both 8 deeper
        const int row = warp_row() + i * 16;
        load_matrices<!kADepth>(a[i], a_slab.v + (kADepth ? place<true>(row + low + in_matrix, depth + high)
                                                          : place<false>(row + low, depth + high + in_matrix)));
      }
      UNROLL
      for (int j = 0; j < kColumns / 4; ++j) {  // depths 0 and 8, then both 8 columns further
        const int column = warp_column() + j * 16;
        uint32_t b[4];
        load_matrices<!kBDepth>(b, b_slab.v + (kBDepth ? place<true>(column + high + in_matrix, depth + low)
                                                       : place<false>(column + high, depth + low + in_matrix)));
        UNROLL
        for (int i = 0; i < kRows / 2; ++i) {
          UNROLL
          for (int half = 0; half < 2; ++half) {
            float* top = &sum[2 * i][4 * j + 2 * half];
            float* bottom = &sum[2 * i + 1][4 * j + 2 * half];
            mma<T>(top[0], top[1], bottom[0], bottom[1], a[i], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }
};

}  // namespace megalodon::cuda
