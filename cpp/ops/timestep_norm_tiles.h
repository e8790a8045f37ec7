// What both directions of timestep_norm on the CPU share.
#pragma once

#include "core/groups.h"
#include "core/past.h"
#include "core/rows.h"
#include "ops/timestep_norm.h"

namespace megalodon::cpu::MEGALODON_ISA {

// x, a vector of T or half of one, minus the means of a block, as vector j of the block; 0 from lane n on.
template <int P, class V, class A, class J>
__attribute__((always_inline)) inline V difference(V x, const A* means, J j, int64_t n) {
  const V d = x - spread<A, P, V>(means, j);
  if constexpr (std::is_same_v<V, Vec<A>>) return first_lanes(d, n);
  return d;
}

// Outputs that wait for memory, and go past the caches, with what reads them next (AMD Zen 4, November 2026).
constexpr int64_t kLargeBytes = int64_t{8} << 20;

// Whether a tile's outputs, from `channel` on, go past the caches. Runs of vectors start where a group does, or where W
// groups do.
template <class T, int P>
bool leaves_caches(const Sequences& sequences, int64_t D, int64_t K, const void* out, int64_t channel) {
  const T* first = static_cast<const T*>(out) + channel;
  return are_lines(sequences.tokens() * D, P == 0 ? K : D, first, kLargeBytes);
}

// Rows are equal work, and each thread is given its share; parts of segments are not.
template <class Body>
void for_items(const TimestepNormItems& items, int64_t grain, const Body& body) {
  if (items.sequences.packed) return parallel_take(items.count(), grain, body);
  parallel_for(items.count(), grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA
