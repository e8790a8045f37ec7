// Stores past the caches. A line that is written whole need not be read before, and what is too much for the caches
// should not put out what is in use there. finish_puts() comes before another thread may read what was put.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Whether `count` outputs, in rows, are whole lines, and `least` bytes or more.
template <class T>
bool are_lines(int64_t count, int64_t row, const T* out, int64_t least) {
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64, kSize = sizeof(T);
  return count * kSize >= least && row * kSize % kLine == 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0;
#else
  (void)count, (void)row, (void)out, (void)least;
  return false;
#endif
}

// Whether they go past the caches by put.
template <class T>
bool goes_past_caches(int64_t count, int64_t row, const T* out) {
  return sizeof(T) == sizeof(stat_t<T>) && are_lines(count, row, out, int64_t{4} << 20);
}

// The same by put_pair, of outputs that the next op reads, all of them together: only where a last cache of 32 MiB does
// not hold them beside what they are made of (AMD Zen 4, November 2026).
template <class T>
bool leaves_caches(int64_t count, int64_t row, const T* out) {
  return are_lines(count, row, out, int64_t{16} << 20);
}

template <bool kPast, class T>
inline void put(T* p, Vec<stat_t<T>> v) {
#if defined(__AVX512F__)
  if constexpr (kPast && sizeof(T) == sizeof(stat_t<T>)) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
  }
#endif
  store(p, v);
}

// store_pair, past the caches if so and if the machine packs T in one instruction.
template <class T>
inline void put_pair(T* p, const Pair<stat_t<T>>& pair, [[maybe_unused]] bool past) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (past) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack(pair));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(stat_t<T>)) {
    if (past) return put<true>(p, pair.v[0]), put<true>(p + kLanes<T>, pair.v[1]);
  }
#endif
  store_pair(p, pair);
}

inline void finish_puts() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace megalodon::cpu::MEGALODON_ISA
