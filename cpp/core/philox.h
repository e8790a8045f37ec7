// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), for numbers and for vectors of
// them, on both kinds of device.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace megalodon {

// high : low = a * m.
struct MultiplyWide {
  MEGALODON_HOST_DEVICE void operator()(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{a} * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Replaces the counter in c by its four random words. U is uint32_t, or a vector with its own `multiply_wide`.
template <class U, class Multiply>
MEGALODON_HOST_DEVICE inline void philox(U (&c)[4], int64_t seed, const Multiply& multiply_wide) {
  uint32_t k0 = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// DropKey's four words of query i and the keys 4 group .. 4 group + 3 of row b and head h; positions modulo 2^32.
template <class U, class Multiply>
MEGALODON_HOST_DEVICE inline void dropkey_words(U group, U i, U h, U b, int64_t seed, U (&words)[4],
                                                const Multiply& multiply_wide) {
  words[0] = group;
  words[1] = i;
  words[2] = h;
  words[3] = b;
  philox(words, seed, multiply_wide);
}

}  // namespace megalodon
