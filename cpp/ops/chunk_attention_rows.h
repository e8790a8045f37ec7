// The rows of keys, values and queries of a chunk: what forward and backward of chunk_attention share.
#pragma once

#include <algorithm>

#include "core/elementary.h"
#include "core/gemm.h"
#include "ops/chunk_attention.h"

namespace megalodon::cpu::MEGALODON_ISA {

// The rows of keys (n = S) or values (n = E), or of their gradients, of a chunk: first from the cache, then from the
// tensor.
template <class T>
struct Rows {
  T* cached;
  T* fresh;
  int64_t stride, count, slot, slots;

  Rows(const ChunkAttention& args, const Chunk& chunk, void* tensor, void* cache, int64_t n)
      : cached(static_cast<T*>(cache)),
        fresh(static_cast<T*>(tensor)),
        stride(args.H * n),
        count(chunk.cached),
        slot(chunk.slot),
        slots(args.C) {
    if (count > 0) cached += (chunk.sequence * args.C * args.H + chunk.h) * n;
    fresh += (chunk.token * args.H + chunk.h) * n;
  }
  T* row(int64_t place) const {
    if (place >= count) return fresh + place * stride;
    const int64_t at = slot + place;
    return cached + (at < slots ? at : at - slots) * stride;
  }
};

template <class T>
Rows<T> rows_of(const ChunkAttention& args, const Chunk& chunk, const void* tensor, const void* cache, int64_t n) {
  return Rows<T>(args, chunk, const_cast<void*>(tensor), const_cast<void*>(cache), n);
}

// Packs columns [column, column + n) of places [begin, end) as a factor whose sum runs along the rows (`along`), from
// row to row (`across`; core/gemm.h), or as both. This goes on some rows at a turn, between the products of what was
// packed before. A row is prefetched a turn before it is packed: rows lie far apart, where the hardware does not
// foresee them, and so regularly that a cache has few places for them, so they must not be fetched long before.
template <class T>
class Packer {
  using F = factor_t<T>;
  using A = stat_t<T>;
  static constexpr int64_t D = kPerWord<F>;  // rows of a unit

 public:
  struct Factors {
    A* along;
    A* across;  // not written where words are numbers, and both are the same, if `along` is given
  };

  Packer() = default;
  Packer(const Rows<const T>& rows, int64_t begin, int64_t end, int64_t column, int64_t n, Factors factors)
      : rows_(&rows),
        begin_(begin),
        end_(end),
        column_(column),
        n_(n),
        factors_(factors),
        units_(ceil_div(end - begin, D)) {}

  // So many units that `turns` turns pack all.
  void divide(int64_t turns) { per_turn_ = ceil_div(units_, std::max<int64_t>(turns, 1)); }

  void turn() { pack(std::min(units_, next_ + per_turn_)); }
  void finish() {
    per_turn_ = std::max<int64_t>(per_turn_, 4);
    while (next_ < units_) turn();
  }

 private:
  const T* row(int64_t place) const { return rows_->row(place) + column_; }

  void pack(int64_t stop) {
    if (next_ >= units_) return;
    const int64_t last = std::min(end_, begin_ + (stop + per_turn_) * D);
    for (int64_t place = begin_ + stop * D; place < last; ++place) {
      const auto* bytes = reinterpret_cast<const char*>(row(place));
      for (int64_t i = 0; i < n_ * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i, 0, 2);
    }
    const int64_t rows = end_ - begin_;
    for (; next_ < stop; ++next_) {
      const int64_t i = next_ * D;
      const T* first = row(begin_ + i);
      const T* second = D == 2 && i + 1 < rows ? row(begin_ + i + 1) : nullptr;
      if (factors_.along != nullptr) {
        pack_row<F>(first, n_, factors_.along + i * kPanel<A>, rows);
        if (second != nullptr) pack_row<F>(second, n_, factors_.along + (i + 1) * kPanel<A>, rows);
        if (D == 1) continue;
      }
      if (factors_.across != nullptr) pack_rows<F>(first, second, n_, factors_.across + next_ * kPanel<A>, units_);
    }
  }

  const Rows<const T>* rows_ = nullptr;
  int64_t begin_ = 0, end_ = 0, column_ = 0, n_ = 0;
  Factors factors_{};
  int64_t units_ = 0, next_ = 0, per_turn_ = 1;
};

// e^v for what is at most a little above 0. Below the smallest normal number it is 0; NaN stays NaN. Error: 1.1 units
// in the last place above -20, 2.5 for the smallest.
__attribute__((always_inline)) inline Vec<float> weight_of(Vec<float> v) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> low = splat(-87.33654f);
  const Vec<float> shifted = v * kLog2e + kMagic;
  const Vec<float> n = shifted - kMagic;
  const Vec<float> r = v - n * kLn2;
  Vec<float> e = splat(1.3843607e-3f);  // minimax with e(0) = 1
  e = e * r + 8.3741955e-3f;
  e = e * r + 4.1668005e-2f;
  e = e * r + 1.6666430e-1f;
  e = e * r + 4.9999994e-1f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(low), _CMP_NLT_UQ);
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(e), reinterpret_cast<__m512>(n)));
#else
  const VecI32 exponent = reinterpret_cast<VecI32>(shifted) - (0x4b400000 - 127);
  return v < low ? Vec<float>{} : e * reinterpret_cast<Vec<float>>(exponent << 23);
#endif
}

inline Vec<double> weight_of(Vec<double> v) { return exp(v); }

}  // namespace megalodon::cpu::MEGALODON_ISA
