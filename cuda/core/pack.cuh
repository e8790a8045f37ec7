// Groups of V neighbouring elements, moved by 16-byte accesses where they fill them.
#pragma once

#include "core/portable.cuh"

namespace megalodon::cuda {

// Elements of T in one 16-byte access.
template <class T>
constexpr int kPackOf = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
  T v[V];
};

// A row may be walked in packs where its length and all the addresses allow it; nullptr allows everything.
template <class T, class... Pointers>
bool can_pack(int64_t D, Pointers... pointers) {
  const uintptr_t addresses = (reinterpret_cast<uintptr_t>(pointers) | ... | uintptr_t{0});
  return D % kPackOf<T> == 0 && addresses % 16 == 0;
}

template <int V, class T>
DEVICE Pack<T, V> load(const T* from) {
  if constexpr (V * sizeof(T) % 16 == 0) {
    Pack<T, V> pack;
    UNROLL
    for (int i = 0; i < static_cast<int>(V * sizeof(T)) / 16; ++i) {
      reinterpret_cast<uint4*>(pack.v)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    return pack;
  } else {
    return *reinterpret_cast<const Pack<T, V>*>(from);
  }
}

template <int V, class T>
DEVICE void store(T* to, const Pack<T, V>& pack) {
  constexpr int kBytes = V * static_cast<int>(sizeof(T)), kStore = kBytes % 16 == 0 ? 16 : 8;
  if constexpr (kBytes % kStore == 0 && sizeof(T) < kStore) {
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    UNROLL
    for (int i = 0; i < kBytes; i += kStore) {
      Word words[kStore / sizeof(Word)];
      memcpy(words, reinterpret_cast<const char*>(pack.v) + i, sizeof words);
      store_words(reinterpret_cast<char*>(to) + i, words);
    }
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

// Lets a pack of 16 bytes be held as it is, and not as the wider values computed from it: see anew.
template <class T, int V>
DEVICE void hold_packed(Pack<T, V>& pack) {
  if constexpr (V * sizeof(T) == 16) {
    auto& words = *reinterpret_cast<uint4*>(pack.v);
    words.x = anew(words.x);
    words.y = anew(words.y);
    words.z = anew(words.z);
    words.w = anew(words.w);
  }
}

}  // namespace megalodon::cuda
