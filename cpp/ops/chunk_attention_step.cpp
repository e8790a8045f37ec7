// chunk_attention_step on the CPU.
//
// Computes  one query per row and head against the slots of its running chunk (ops/chunk_attention_step.h).
// Layout    q, k, v, o (B, H, S or E); caches (B, C, H, S or E), a slot's rows H S (H E) apart.
// Mapping   an item is a part of the slots of one row and head; few heads and long caches are cut into parts, by the
//           number of filled slots. The parts' outputs are merged by their maxima and sums, in order.
// Traffic   m (S + E) elements read for as many FMAs: bound by memory once the caches outgrow the CPU's. Threads are
//           used only where each gets kLeastWork FMAs.
// Numerics  scores, weights and sums in stat, with the maximum subtracted; the number of threads changes nothing.
// Limits    any B, H, S, E, C and position.
#include "ops/chunk_attention_step.h"

#include <cmath>
#include <limits>

#include "core/elementary.h"
#include "core/gemm.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

constexpr int64_t kBlock = 64;         // slots whose scores are held at a time
constexpr int64_t kMostWidened = 512;  // elements of a query that is widened once, not once for every slot

// Fetches two vectors of a row that is read later, to the second level: rows of one head lie apart, where the hardware
// does not foresee them. One at a time between the products: all lines of a row at once are more than can be under way.
template <class T>
inline void prefetch_pair(const T* p) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < 2 * kLanes<stat_t<T>>; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// scores[i] = q . k_i for `count` rows k_i, of which `reachable` (>= count) may be prefetched; a whole number of
// vectors is written. The rows of a vector are summed side by side.
template <class Q, class T, class A>
void score(const Q* q, const T* k, int64_t stride, int64_t count, int64_t reachable, int64_t S, A* scores) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t i = 0; i < count; i += W) {
    const int64_t n = count - i < W ? count - i : W;
    Vec<A> sums[W] = {};
    for (int64_t r = 0; r < n; ++r) {
      const T* row = k + (i + r) * stride;
      const int64_t ahead = i + r + W < reachable ? W * stride : 0;
      Vec<A> even = {}, odd = {};
      int64_t s = 0;
      for (; s + 2 * W <= S; s += 2 * W) {
        prefetch_pair(row + ahead + s);
        const Pair<A> x = load_pair(q + s), y = load_pair(row + s);
        even = x.v[0] * y.v[0] + even;
        odd = x.v[1] * y.v[1] + odd;
      }
      for (; s < S; s += W) even = load(q + s, S - s) * load(row + s, S - s) + even;
      sums[r] = even + odd;
    }
    store(scores + i, sum_each<A>(sums));
  }
}

// out = scale out + sum of weights[i] v_i over `count` rows v_i. Four rows at a time; scale only with the first.
template <class T, class A>
void add_values(const A* weights, const T* v, int64_t stride, int64_t count, int64_t reachable, int64_t E, A scale,
                A* out) {
  constexpr int64_t W = kLanes<A>;
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t n = count - i < 4 ? count - i : 4;
    const T* row = v + i * stride;
    const A factor = i == 0 ? scale : A(1);
    const A w[4] = {weights[i], n > 1 ? weights[i + 1] : A(0), n > 2 ? weights[i + 2] : A(0),
                    n > 3 ? weights[i + 3] : A(0)};
    int64_t e = 0;
    if (n == 4) {
      const int64_t ahead = i + 8 <= reachable ? 4 * stride : 0;
      for (; e + 2 * W <= E; e += 2 * W) {
        Pair<A> sum = load_pair(out + e);
        for (Vec<A>& half : sum.v) half *= factor;
        for (int r = 0; r < 4; ++r) {
          prefetch_pair(row + r * stride + ahead + e);
          const Pair<A> value = load_pair(row + r * stride + e);
          for (int k = 0; k < 2; ++k) sum.v[k] = w[r] * value.v[k] + sum.v[k];
        }
        store_pair(out + e, sum);
      }
    }
    for (; e < E; e += W) {
      Vec<A> sum = load(out + e, E - e) * factor;
      for (int r = 0; r < n; ++r) sum = w[r] * load(row + r * stride + e, E - e) + sum;
      store(out + e, sum, E - e);
    }
  }
}

// A part's result: the sum of its weights exp(score - best), its best score, and the weighted sum of its values.
template <class A>
struct Partial {
  A* sum;
  A* best;
  A* out;
};

template <class A>
Partial<A> partial_of(const ChunkAttentionStep& args, int64_t item) {
  A* start = static_cast<A*>(args.workspace) + item * (args.E + 2);
  return {start, start + 1, start + 2};
}

template <class T, class A>
void attend(const ChunkAttentionStep& args, const T* q, const T* k, const T* v, int64_t begin, int64_t end,
            Partial<A> result) {
  constexpr int64_t W = kLanes<A>;
  const A lowest = -std::numeric_limits<A>::infinity();
  A best = lowest, sum = 0;
  for (int64_t e = 0; e < args.E; ++e) result.out[e] = 0;
  A scores[kBlock], wide[kMostWidened];
  const bool widened = sizeof(T) < sizeof(A) && args.S <= kMostWidened;
  if (widened) {
    for (int64_t s = 0; s < args.S; s += W) store(wide + s, load(q + s, args.S - s), args.S - s);
  }
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t n = std::min(kBlock, end - j);
    const T* keys = k + j * args.H * args.S;
    if (widened) {
      score(wide, keys, args.H * args.S, n, end - j, args.S, scores);
    } else {
      score(q, keys, args.H * args.S, n, end - j, args.S, scores);
    }
    const int64_t padded = round_up(n, W);
    for (int64_t i = n; i < padded; ++i) scores[i] = lowest;
    const A before = best;
    for (int64_t i = 0; i < n; ++i) best = scores[i] > best ? scores[i] : best;
    const A shift = best == lowest ? A(0) : best;
    const A scale = exp(splat(before - shift))[0];
    Vec<A> total = {};
    for (int64_t i = 0; i < padded; i += W) {
      const Vec<A> weight = exp(load(scores + i) - shift);
      store(scores + i, weight);
      total += weight;
    }
    sum = sum * scale + sum_lanes<A>(total);
    add_values(scores, v + j * args.H * args.E, args.H * args.E, n, end - j, args.E, scale, result.out);
  }
  *result.sum = sum;
  *result.best = best;
}

int64_t filled(const ChunkAttentionStep& args, int64_t b) {
  return args.filled(args.position[b], args.position[b] % args.C);
}

Parts parts_of(const ChunkAttentionStep& args, int64_t slots) {
  const int64_t wanted = slots * (args.S + args.E) / ChunkAttentionStep::kLeastWork;
  return {slots, std::max<int64_t>(1, std::min(args.max_parts, wanted))};
}

// o = the parts' outputs, each by exp(its best - the best of all), over the sum of their sums.
template <class T, class A>
void merge(const ChunkAttentionStep& args, int64_t bh, int64_t parts) {
  constexpr int64_t W = kLanes<A>;
  A best = -std::numeric_limits<A>::infinity();
  for (int64_t p = 0; p < parts; ++p) {
    best = std::max(best, *partial_of<A>(args, bh * args.max_parts + p).best);
  }
  if (best == -std::numeric_limits<A>::infinity()) best = 0;
  A scales[16], sum = 0;
  for (int64_t p = 0; p < parts; ++p) {
    const Partial<A> partial = partial_of<A>(args, bh * args.max_parts + p);
    scales[p] = parts == 1 ? A(1) : exp(splat(*partial.best - best))[0];
    sum += scales[p] * *partial.sum;
  }
  const A inverse = A(1) / sum;
  T* o = static_cast<T*>(args.o) + bh * args.E;
  for (int64_t e = 0; e < args.E; e += W) {
    Vec<A> total = {};
    for (int64_t p = 0; p < parts; ++p) {
      total += load(partial_of<A>(args, bh * args.max_parts + p).out + e, args.E - e) * scales[p];
    }
    store(o + e, total * inverse, args.E - e);
  }
}

template <class T>
void step(const ChunkAttentionStep& args) {
  using A = stat_t<T>;
  const int64_t items = args.B * args.H * args.max_parts;
  int64_t work = 0;
  for (int64_t b = 0; b < args.B; ++b) work += filled(args, b);
  work *= args.H * (args.S + args.E);
  // Items per thread so that each thread has kLeastWork FMAs.
  const int64_t grain = work == 0 ? items : ceil_div(items * ChunkAttentionStep::kLeastWork, work);

  parallel_for(items, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t bh = item / args.max_parts, p = item % args.max_parts;
      const int64_t b = bh / args.H, h = bh % args.H, m = args.position[b] % args.C;
      const Parts parts = parts_of(args, filled(args, b));
      if (p >= parts.parts) continue;
      T* k = static_cast<T*>(args.k_cache) + (b * args.C * args.H + h) * args.S;
      T* v = static_cast<T*>(args.v_cache) + (b * args.C * args.H + h) * args.E;
      if (parts.begin(p) <= m && m < parts.end(p)) {  // the part that reads slot m
        std::memcpy(k + m * args.H * args.S, static_cast<const T*>(args.k) + bh * args.S, args.S * sizeof(T));
        std::memcpy(v + m * args.H * args.E, static_cast<const T*>(args.v) + bh * args.E, args.E * sizeof(T));
      }
      attend(args, static_cast<const T*>(args.q) + bh * args.S, k, v, parts.begin(p), parts.end(p),
             partial_of<A>(args, item));
    }
  });
  for (int64_t bh = 0; bh < args.B * args.H; ++bh) {
    merge<T, A>(args, bh, parts_of(args, filled(args, bh / args.H)).parts);
  }
}

}  // namespace

void chunk_attention_step_forward(const ChunkAttentionStep& args) {
  visit_activation(args.dtype, [&](auto tag) { step<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_chunk_attention_step_forward_outputs(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                              DLTensor* k_cache, DLTensor* v_cache,
                                                              const DLTensor* position, int64_t chunk_size,
                                                              int64_t sliding, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("chunk_attention_step");
    check_chunk_attention_step(c, q, k, v, k_cache, v_cache, position, chunk_size, sliding, Outputs(outputs));
  });
}

extern "C" int megalodon_chunk_attention_step_forward(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                      DLTensor* k_cache, DLTensor* v_cache, const DLTensor* position,
                                                      int64_t chunk_size, int64_t sliding, DLTensor* o,
                                                      DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("chunk_attention_step");
    const ChunkAttentionStep args =
        check_chunk_attention_step(c, q, k, v, k_cache, v_cache, position, chunk_size, sliding, {o, workspace});
    c.not_negative("position", args.position, args.B);
    run_on(c, args, cpu::chunk_attention_step_forward, cuda::chunk_attention_step_forward, stream);
  });
}
#endif
