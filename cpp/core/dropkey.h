// DropKey: which keys a query does not see. A word of Philox4x32-10 (core/philox.h) per query and key: a function of
// their positions, so that backward, and any part of a row, draws again what forward drew, in any order, on any thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "core/philox.h"
#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

constexpr int64_t kPhiloxLanes = kLanes<float>;

inline VecU32 splat_u32(uint32_t value) { return VecU32{} + value; }

// high : low = a * m, lane by lane.
inline void multiply_wide(VecU32 a, uint32_t m, VecU32& high, VecU32& low) {
  typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
  const VecU64 factor = VecU64{} + m;
  const VecU64 odd_lanes = reinterpret_cast<VecU64>(a) >> 32;
  VecU64 even, odd;
#if defined(__AVX512F__)
  even = reinterpret_cast<VecU64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
  odd = reinterpret_cast<VecU64>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(odd_lanes), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  even = reinterpret_cast<VecU64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
  odd = reinterpret_cast<VecU64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(odd_lanes), reinterpret_cast<__m256i>(factor)));
#else
  even = (reinterpret_cast<VecU64>(a) & 0xffffffffu) * factor;
  odd = odd_lanes * factor;
#endif
  low = a * m;
  high = reinterpret_cast<VecU32>((even >> 32) | (odd & 0xffffffff00000000u));
}

// The draws of one row b and head h: key j is dropped for query i iff word j & 3 of the counter (j >> 2, i, h, b) is
// below `below`. Positions are absolute, modulo 2^32.
struct DropKey {
  int64_t seed;
  uint32_t below, b, h;

  bool any() const { return below != 0; }
  void words(VecU32 group, VecU32 i, VecU32 (&out)[4]) const {
    dropkey_words(group, i, splat_u32(h), splat_u32(b), seed, out,
                  [](VecU32 a, uint32_t m, VecU32& high, VecU32& low) { multiply_wide(a, m, high, low); });
  }
};

inline VecU32 lane_numbers() {
  VecU32 lanes;
  for (int i = 0; i < kPhiloxLanes; ++i) lanes[i] = i;
  return lanes;
}

// Calls body(r, c, words) with the words of key j0 + r and the kPhiloxLanes queries from i0 + c on, for all keys and
// columns; columns a multiple of kPhiloxLanes.
template <class Body>
void draw_columns(const DropKey& drop, uint32_t j0, int64_t keys, uint32_t i0, int64_t columns, Body&& body) {
  for (int64_t c = 0; c < columns; c += kPhiloxLanes) {
    const VecU32 i = lane_numbers() + i0 + static_cast<uint32_t>(c);
    for (int64_t r = -static_cast<int64_t>(j0 & 3); r < keys; r += 4) {
      VecU32 words[4];
      drop.words(splat_u32((j0 + static_cast<uint32_t>(r)) >> 2), i, words);
      for (int w = 0; w < 4; ++w) {
        if (r + w < 0 || r + w >= keys) continue;
        uint32_t word[kPhiloxLanes];
        std::memcpy(word, &words[w], sizeof word);
        body(r + w, c, word);
      }
    }
  }
}

// scores[keys, columns]: row j0 + r, with the queries i0 .. as columns.
template <class A>
void drop_columns(const DropKey& drop, uint32_t j0, int64_t keys, uint32_t i0, int64_t columns, A* scores) {
  constexpr A kDropped = -std::numeric_limits<A>::infinity();
  draw_columns(drop, j0, keys, i0, columns, [&](int64_t r, int64_t c, const uint32_t* words) {
    A* row = scores + r * columns + c;
    for (int lane = 0; lane < kPhiloxLanes; ++lane) row[lane] = words[lane] < drop.below ? kDropped : row[lane];
  });
}

// A bit for every query of at most 32: whether it drops key j0 + r.
inline void drop_bits(const DropKey& drop, uint32_t j0, int64_t keys, uint32_t i0, int64_t columns, uint32_t* bits) {
  draw_columns(drop, j0, keys, i0, columns, [&](int64_t r, int64_t c, const uint32_t* words) {
    uint32_t row = c == 0 ? 0 : bits[r];
    for (int lane = 0; lane < kPhiloxLanes; ++lane) row |= uint32_t{words[lane] < drop.below} << (c + lane);
    bits[r] = row;
  });
}

// v, but 0 in the lanes whose bit is set.
template <class A>
inline Vec<A> without(Vec<A> v, uint32_t bits) {
  using Lanes = std::conditional_t<sizeof(A) == 4, VecI32, VecI64>;
  Lanes lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return ((Lanes{} + static_cast<int32_t>(bits)) >> lane & 1) != 0 ? Vec<A>{} : v;
}

template <int... lane>
inline void interleave(VecU32& a, VecU32& b, std::integer_sequence<int, lane...>) {
  constexpr int W = kPhiloxLanes;
  const VecU32 low = __builtin_shufflevector(a, b, (lane / 2 + (lane % 2) * W)...);
  b = __builtin_shufflevector(a, b, (W / 2 + lane / 2 + (lane % 2) * W)...);
  a = low;
}

// The words of query i and the keys j0 .. j0 + keys - 1, in order; out has room for keys + 4 kPhiloxLanes + 3.
// Returns where the first one is.
inline const uint32_t* draw_row(const DropKey& drop, uint32_t j0, int64_t keys, uint32_t i, uint32_t* out) {
  constexpr auto kSequence = std::make_integer_sequence<int, kPhiloxLanes>{};
  const int64_t skipped = j0 & 3;
  for (int64_t n = 0; n < keys + skipped; n += 4 * kPhiloxLanes) {
    VecU32 w[4];
    const VecU32 groups = (lane_numbers() + ((j0 + static_cast<uint32_t>(n)) >> 2)) & 0x3fffffffu;
    drop.words(groups, splat_u32(i), w);
    interleave(w[0], w[2], kSequence);  // w0 w2 w0 w2 ..: the low half of the lanes, then the high half
    interleave(w[1], w[3], kSequence);
    interleave(w[0], w[1], kSequence);  // w0 w1 w2 w3 ..
    interleave(w[2], w[3], kSequence);
    for (int v = 0; v < 4; ++v) std::memcpy(out + n + v * kPhiloxLanes, &w[v], sizeof w[v]);
  }
  return out + skipped;
}

}  // namespace megalodon::cpu::MEGALODON_ISA
