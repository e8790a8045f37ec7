// The rows of keys, values and queries of a chunk: what forward and backward of chunk_attention share.
#pragma once

#include <algorithm>

#include "core/gemm.h"
#include "ops/chunk_attention.h"

namespace megalodon::cpu::MEGALODON_ISA {

// The rows of keys (n = S) or values (n = E), or of their gradients, of a chunk: first from the cache, then from the
// tensor.
template <class T>
struct Rows {
  T* cached;
  T* fresh;
  int64_t stride, first;

  Rows(const ChunkAttention& args, const Chunk& chunk, void* tensor, void* cache, int64_t n)
      : cached(static_cast<T*>(cache)), fresh(static_cast<T*>(tensor)), stride(args.H * n), first(chunk.first) {
    if (first > 0) cached += (chunk.b * args.C * args.H + chunk.h) * n;
    fresh += ((chunk.b * args.L + chunk.token) * args.H + chunk.h) * n;
  }
  T* row(int64_t place) const { return (place < first ? cached : fresh) + place * stride; }
};

template <class T>
Rows<T> rows_of(const ChunkAttention& args, const Chunk& chunk, const void* tensor, const void* cache, int64_t n) {
  return Rows<T>(args, chunk, const_cast<void*>(tensor), const_cast<void*>(cache), n);
}

// Columns [column, column + n) of places [begin, end) into the first rows of panels of `panel_rows` rows.
template <class T, class A>
void pack_places(const Rows<T>& rows, int64_t begin, int64_t end, int64_t column, int64_t n, A* panels,
                 int64_t panel_rows, int64_t ahead = 0) {
  constexpr int64_t P = kPanel<A>;
  const int64_t middle = std::min(std::max(begin, rows.first), end);
  for (int64_t c = 0; c < n; c += P) {
    A* panel = panels + c * panel_rows;
    pack_panel(rows.row(begin) + column + c, rows.stride, middle - begin, n - c, panel, ahead);
    panel += (middle - begin) * P;
    pack_panel(rows.row(middle) + column + c, rows.stride, end - middle, n - c, panel, ahead);
  }
}

}  // namespace megalodon::cpu::MEGALODON_ISA
