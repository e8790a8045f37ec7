// How the CEMA kernels walk through their tensors: tasks of columns of channels, and the rows of a time block from and
// to packed copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/past.h"
#include "core/simd.h"
#include "core/subnormals.h"
#include "ops/cema.h"

namespace megalodon::cpu::MEGALODON_ISA {

// Calls body(part, first, last) for the tasks [begin, end): the columns [first, last) of one part of the sequences. The
// parts of a column are neighbours, so that mostly one thread has them all, and the column's tables in its cache.
template <class Body>
void for_columns(const CemaShape& shape, int64_t begin, int64_t end, Body&& body) {
  const int64_t parts = shape.parts();
  while (begin < end) {
    const int64_t column = begin / parts, part = begin % parts, whole = (end - begin) / parts;
    if (part == 0 && whole > 0) {
      for (int64_t p = 0; p < parts; ++p) body(p, column, column + whole);
      begin += whole * parts;
    } else {
      body(part, column, column + 1);
      ++begin;
    }
  }
}

// Calls body(d, end) for the channels [d, end) of every kStaged columns of [first, last): these go through time
// together, so that memory is read in pieces of a line per column and the tables stay in L2.
template <class Body>
void for_stages(const CemaShape& shape, int64_t first, int64_t last, Body&& body) {
  constexpr int64_t kColumn = CemaShape::kColumn, kChannels = CemaShape::kStaged * kColumn;
  const int64_t end = last * kColumn < shape.D ? last * kColumn : shape.D;
  for (int64_t d = first * kColumn; d < end; d += kChannels) body(d, d + kChannels < end ? d + kChannels : end);
}

// Calls body(constant G, n) for the wavelets in groups of at most kMost, 1 or 2.
template <int kMost, class Body>
void for_wavelets(int64_t N, Body&& body) {
  int64_t n = 0;
  for (; n + kMost <= N; n += kMost) body(std::integral_constant<int, kMost>{}, n);
  if (n < N) body(std::integral_constant<int, 1>{}, n);
}

// From row i of a tensor [B, D, N, 2] to `state` [N, 2, lanes], the channels from d on; conjugated, if so.
template <class A>
inline Vec<A> conjugated(Vec<A> pairs, bool is_conjugated) {
  for (int64_t l = 1; is_conjugated && l < kLanes<A>; l += 2) pairs[l] = -pairs[l];
  return pairs;
}
template <class A>
void load_state(const CemaShape& shape, const void* tensor, int64_t i, int64_t d, A* state, bool is_conjugated) {
  constexpr int64_t W = kLanes<A>;
  const int64_t count = 2 * shape.N;
  const A* from = static_cast<const A*>(tensor) + (i * shape.D + d) * count;
  for (int64_t e = 0; e < count; e += W) {
    Vec<A> block[W];
    for (int64_t l = 0; l < W; ++l) {
      block[l] = d + l < shape.D ? conjugated<A>(load(from + l * count + e, count - e), is_conjugated) : Vec<A>{};
    }
    transpose<A>(block);
    for (int64_t r = 0; r < W && e + r < count; ++r) store(state + (e + r) * W, block[r]);
  }
}
// Steps of a vector of channels, from rows D elements apart, and back (unpack), past the caches if so.
template <class T>
inline void pack(const T* rows, int64_t D, int64_t lanes, int64_t steps, stat_t<T>* packed) {
  for (int64_t t = 0; t < steps; ++t) store(packed + t * kLanes<stat_t<T>>, load(rows + t * D, lanes));
}

// Where the next block's rows lie, fetched while this one is worked on: they are D elements apart, which the hardware
// does not foresee. What is read goes to L2, what is written to L1.
template <class T>
struct Next {
  const T *first, *second;  // second and out: nullptr where there is nothing
  T* out;
  int64_t D, rows, each = 0;

  void fetch() {
    for (int64_t i = 0; i < each && rows > 0; ++i, --rows) {
      __builtin_prefetch(first, 0, 2);
      first += D;
      if (second != nullptr) {
        __builtin_prefetch(second, 0, 2);
        second += D;
      }
      if (out != nullptr) {
        __builtin_prefetch(out, 1);
        out += D;
      }
    }
  }
};

// As load_state, back; past the caches, if so.
template <class A>
void store_state(const CemaShape& shape, const A* state, int64_t i, int64_t d, void* tensor, bool is_conjugated,
                 bool past = false) {
  constexpr int64_t W = kLanes<A>;
  const int64_t count = 2 * shape.N;
  A* to = static_cast<A*>(tensor) + (i * shape.D + d) * count;
  for (int64_t e = 0; e < count; e += W) {
    Vec<A> block[W];
    for (int64_t r = 0; r < W; ++r) block[r] = e + r < count ? load(state + (e + r) * W) : Vec<A>{};
    transpose<A>(block);
    for (int64_t l = 0; l < W && d + l < shape.D; ++l) {
      const Vec<A> pairs = conjugated<A>(block[l], is_conjugated);
      if (past) {
        put<true>(to + l * count + e, pairs);
      } else {
        store(to + l * count + e, pairs, count - e);
      }
    }
  }
}

template <class T>
inline void unpack(const stat_t<T>* packed, int64_t D, int64_t lanes, int64_t steps, bool past, T* rows) {
  constexpr int64_t W = kLanes<stat_t<T>>;
  if (past && lanes == W) {
    for (int64_t t = 0; t < steps; ++t) put<true>(rows + t * D, load(packed + t * W));
  } else {
    for (int64_t t = 0; t < steps; ++t) store(rows + t * D, load(packed + t * W), lanes);
  }
}
// Whether the rows of states, a whole number of vectors for each channel, go past the caches.
template <class A>
bool states_go_past(const CemaShape& shape, const A* h) {
  const int64_t pairs = 2 * shape.N;
  return pairs % kLanes<A> == 0 && goes_past_caches(shape.sequences.count * shape.D * pairs, pairs, h);
}

}  // namespace megalodon::cpu::MEGALODON_ISA
