// What the kernels that work row by row share.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/simd.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Rows a thread should get at least, so that starting it is worth it: about 16K elements.
constexpr int64_t grain_of_rows(int64_t D) { return D < 1 ? 16384 : D > 16384 ? 1 : 16384 / D; }

// out[i] = sum over p < parts of partial[p * n + i], in the order of p.
template <class A>
void add_parts(const A* partial, int64_t parts, int64_t n, A* out) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t p = 0; p < parts; ++p) sum += load(partial + p * n + i, n - i);
    store(out + i, sum, n - i);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
