// chunk_attention_step on the GPU. Not yet run on a GPU.
//
// Computes  one query per row and head against the slots of its running chunk (ops/chunk_attention_step.h).
// Layout    q, k, v, o (B, H, S or E); caches (B, C, H, S or E), a slot's rows H S (H E) apart.
// Mapping   a block takes a part of the slots of one row and head, in tiles of 64: first groups of up to 32 threads
// make
//           a score each, then groups of up to 256 threads add up the values, V columns per thread; more columns than a
//           block has go to other blocks, which make the scores again. A second kernel merges the parts by their maxima
//           and sums. The grid depends on the sizes alone, the parts on the position: one graph serves every step.
// Traffic   m (S + E) elements read for as many FMAs: memory-bound. The parts' outputs, in float, stay in the L2 cache.
// Numerics  scores, weights and sums in float (double for float64), with the maximum subtracted; in a fixed order.
// Limits    none; heads that are no multiple of 16 bytes, or not so aligned, go element by element. A negative position
//           counts from the chunk's end.
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "ops/chunk_attention_step.h"

namespace megalodon::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;                        // on each processor: as many registers as that leaves
constexpr int kTile = ChunkAttentionStep::kTile;  // slots whose scores are held at a time
static_assert(kTile == 64, "two per lane");
constexpr int kRows = 4;    // keys that a thread has in flight
constexpr int kValues = 8;  // values that a thread has in flight
constexpr int kMergeWarps = 8;

template <class A>
DEVICE A lowest() {
  return -static_cast<A>(INFINITY);
}

// A NaN is passed over: it comes back as the weight exp(NaN - maximum).
template <class A>
DEVICE A larger(A best, A value) {
  return value > best ? value : best;
}

template <class A>
DEVICE A warp_max(A value) {
  UNROLL
  for (int bits = 16; bits > 0; bits /= 2) value = larger(value, shuffle_xor(value, bits));
  return value;
}

// What scores are taken relative to: the maximum, if there is one.
template <class A>
DEVICE A shift_of(A best) {
  return best == lowest<A>() ? A(0) : best;
}

struct Plan {
  int score_threads;  // of a key: a power of two, at most 32
  int value_threads;  // of a value, at most kThreads
  int64_t tiles;      // blocks that share the columns of E
};

// The slot that is written, and the parts of those that are read.
struct Slots {
  int64_t last;
  Parts parts;

  DEVICE static Slots of(const ChunkAttentionStep& args, int64_t b) {
    int64_t m = args.position[b] % args.C;
    m = m < 0 ? m + args.C : m;
    const int64_t filled = args.filled(args.position[b], m);
    const int64_t wanted = (filled - 1) / ChunkAttentionStep::kLeastSlots + 1;
    return {m, {filled, wanted < args.max_parts ? wanted : args.max_parts}};
  }
};

// The parts' outputs, sums and maxima in the workspace.
template <class A>
struct Partials {
  A *out, *sum, *best;

  DEVICE static Partials of(const ChunkAttentionStep& args, int64_t bh) {
    const int64_t count = args.B * args.H * args.max_parts, first = bh * args.max_parts;
    A* workspace = static_cast<A*>(args.workspace);
    return {workspace + first * args.E, workspace + count * args.E + first, workspace + count * (args.E + 1) + first};
  }
};

// The rows of one head in a cache, with the new one in the place of the last: it is not read from the cache.
template <class T>
struct HeadRows {
  T* cache;
  const T* added;
  int64_t stride, last;

  DEVICE static HeadRows of(void* cache, const void* added, int64_t b, int64_t h, const ChunkAttentionStep& args,
                            int64_t n, int64_t last) {
    return {static_cast<T*>(cache) + (b * args.C * args.H + h) * n, static_cast<const T*>(added) + (b * args.H + h) * n,
            args.H * n, last};
  }
  DEVICE const T* row(int64_t j) const { return j == last ? added : cache + j * stride; }
};

// scores[i] = q . k_(begin + i) for i < n.
template <int V, class T, class A>
DEVICE void score(const T* q, const Pack<T, V>& first, const HeadRows<T>& keys, int64_t begin, int n, int64_t S,
                  int threads, A* scores) {
  const int lane = static_cast<int>(threadIdx.x) % threads, group = static_cast<int>(threadIdx.x) / threads;
  const int groups = kThreads / threads;
  for (int base = 0; base < n; base += kRows * groups) {
    A sums[kRows] = {};
    for (int64_t i = lane * V; i < S; i += threads * V) {
      const Pack<T, V> qs = i == lane * V ? first : load<V>(q + i);
      Pack<T, V> rows[kRows] = {};
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int slot = base + r * groups + group;
        if (slot < n) rows[r] = load<V>(keys.row(begin + slot) + i);
      }
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        UNROLL
        for (int j = 0; j < V; ++j) sums[r] += widen(qs.v[j]) * widen(rows[r].v[j]);
      }
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      for (int bits = threads / 2; bits > 0; bits /= 2) sums[r] += shuffle_xor(sums[r], bits);
      const int slot = base + r * groups + group;
      if (lane == 0 && slot < n) scores[slot] = sums[r];
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) chunk_attention_step_kernel(ChunkAttentionStep args, Plan plan) {
  using A = stat_t<T>;
  const int64_t part = blockIdx.x % args.max_parts, tile = blockIdx.x / args.max_parts % plan.tiles;
  const int64_t bh = blockIdx.x / args.max_parts / plan.tiles, b = bh / args.H, h = bh % args.H;
  const Slots slots = Slots::of(args, b);
  if (part >= slots.parts.parts) return;
  const auto keys = HeadRows<T>::of(args.k_cache, args.k, b, h, args, args.S, slots.last);
  const auto values = HeadRows<T>::of(args.v_cache, args.v, b, h, args, args.E, slots.last);
  const T* q = static_cast<const T*>(args.q) + bh * args.S;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = thread / plan.value_threads, groups = kThreads / plan.value_threads;
  const int64_t e = (tile * plan.value_threads + thread % plan.value_threads) * V;  // the thread's first column
  if (part == slots.parts.parts - 1) {
    for (int64_t i = thread * V; tile == 0 && i < args.S; i += kThreads * V) {
      store(keys.cache + slots.last * keys.stride + i, load<V>(keys.added + i));
    }
    if (group == 0 && e < args.E) store(values.cache + slots.last * values.stride + e, load<V>(values.added + e));
  }

  Pack<T, V> q_first = {};
  const int64_t i = thread % plan.score_threads * V;
  if (i < args.S) q_first = load<V>(q + i);
  SHARED(A, scores, [kTile]);
  SHARED(A, weights, [kTile]);
  A best = lowest<A>(), sum = 0, out[V] = {};
  const int64_t end = slots.parts.end(part);
  for (int64_t begin = slots.parts.begin(part); begin < end; begin += kTile) {
    const int n = static_cast<int>(end - begin < kTile ? end - begin : kTile);
    score<V>(q, q_first, keys, begin, n, args.S, plan.score_threads, scores);
    sync_block();  // the scores are there, and the last tile's weights have been read
    const A low = lane < n ? scores[lane] : lowest<A>(), high = lane + 32 < n ? scores[lane + 32] : lowest<A>();
    const A before = best;
    best = larger(best, warp_max(larger(larger(lowest<A>(), low), high)));
    const A shift = shift_of(best), scale = exp(before - shift);
    const A low_weight = exp(low - shift), high_weight = exp(high - shift);
    sum = sum * scale + warp_sum(low_weight + high_weight);
    if (thread < 32) {
      weights[lane] = low_weight;
      weights[lane + 32] = high_weight;
    }
    sync_block();  // the weights are there, and the scores have been read
    UNROLL
    for (int j = 0; j < V; ++j) out[j] *= scale;
    if (e >= args.E) continue;
    for (int slot = group; slot < n; slot += kValues * groups) {
      Pack<T, V> rows[kValues] = {};
      UNROLL
      for (int r = 0; r < kValues; ++r) {
        if (slot + r * groups < n) rows[r] = load<V>(values.row(begin + slot + r * groups) + e);
      }
      UNROLL
      for (int r = 0; r < kValues; ++r) {
        const A weight = slot + r * groups < n ? weights[slot + r * groups] : A(0);
        UNROLL
        for (int j = 0; j < V; ++j) out[j] += weight * widen(rows[r].v[j]);
      }
    }
  }

  SHARED(A, shared, [V][kThreads]);
  if (groups > 1) {
    UNROLL
    for (int j = 0; j < V; ++j) shared[j][thread] = out[j];
    sync_block();  // every group's sums are there
    UNROLL
    for (int j = 0; j < V && group == 0; ++j) {
      for (int g = 1; g < groups; ++g) out[j] += shared[j][g * plan.value_threads + thread];
    }
  }
  const Partials<A> partials = Partials<A>::of(args, bh);
  if (group == 0 && e < args.E) {
    if (args.max_parts == 1) {
      Pack<T, V> o;
      UNROLL
      for (int j = 0; j < V; ++j) o.v[j] = narrow<T>(out[j] / sum);
      store(static_cast<T*>(args.o) + bh * args.E + e, o);
    } else {
      Pack<A, V> o;
      UNROLL
      for (int j = 0; j < V; ++j) o.v[j] = out[j];
      store(partials.out + part * args.E + e, o);
    }
  }
  if (args.max_parts > 1 && tile == 0 && thread == 0) {
    partials.sum[part] = sum;
    partials.best[part] = best;
  }
}

// o = the parts' outputs, each by exp(its maximum - the largest), over the sum of their sums so scaled. A block takes
// 32 columns; each of its warps every kMergeWarps-th part.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) chunk_attention_step_merge_kernel(ChunkAttentionStep args) {
  using A = stat_t<T>;
  constexpr int kEach = ChunkAttentionStep::kMaxBlockParts / 32;  // parts per lane
  const int64_t tiles = (args.E + 31) / 32, bh = blockIdx.x / tiles;
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int64_t e = blockIdx.x % tiles * 32 + lane;
  const auto parts = static_cast<int>(Slots::of(args, bh / args.H).parts.parts);
  const Partials<A> partials = Partials<A>::of(args, bh);
  SHARED(A, scales, [kEach * 32]);
  A bests[kEach], best = lowest<A>(), sum = 0;
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    bests[i] = i * 32 + lane < parts ? partials.best[i * 32 + lane] : lowest<A>();
    best = larger(best, bests[i]);
  }
  const A shift = shift_of(warp_max(best));
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    const A scale = exp(bests[i] - shift);
    if (i * 32 + lane < parts) sum += scale * partials.sum[i * 32 + lane];
    if (warp == 0) scales[i * 32 + lane] = scale;
  }
  sum = warp_sum(sum);
  sync_block();  // the scales are there
  A total = 0;
  if (e < args.E) {
    for (int p = warp; p < parts; p += kMergeWarps) total += scales[p] * partials.out[p * args.E + e];
  }
  SHARED(A, totals, [kMergeWarps][32]);
  totals[warp][lane] = total;
  sync_block();  // every warp's sums are there
  if (warp > 0 || e >= args.E) return;
  for (int w = 1; w < kMergeWarps; ++w) total += totals[w][lane];
  static_cast<T*>(args.o)[bh * args.E + e] = narrow<T>(total / sum);
}

int threads_of(int64_t n, int V, int most) {
  int threads = 1;
  while (threads < most && static_cast<int64_t>(threads) * V < n) threads *= 2;
  return threads;
}

template <class T, int V>
void step(const ChunkAttentionStep& args, void* stream) {
  Plan plan{threads_of(args.S, V, 32), threads_of(args.E, V, kThreads), 1};
  plan.tiles = std::max<int64_t>(1, ceil_div(args.E, plan.value_threads * V));
  const int64_t heads = args.B * args.H;
  const auto blocks = static_cast<unsigned>(heads * plan.tiles * args.max_parts);
  launch({"chunk_attention_step", dim3(blocks), dim3(kThreads), 0, stream}, chunk_attention_step_kernel<T, V>, args,
         plan);
  if (args.max_parts == 1 || args.E == 0) return;
  const auto merge_blocks = static_cast<unsigned>(heads * ceil_div(args.E, 32));
  launch({"chunk_attention_step_merge", dim3(merge_blocks), dim3(32, kMergeWarps), 0, stream},
         chunk_attention_step_merge_kernel<T>, args);
}

}  // namespace

void chunk_attention_step_forward(const ChunkAttentionStep& args, void* stream) {
  if (args.B * args.H == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = can_pack<T>(args.S, args.q, args.k, args.k_cache) &&
                        can_pack<T>(args.E, args.v, args.v_cache, args.o, args.workspace);
    packed ? step<T, kPackOf<T>>(args, stream) : step<T, 1>(args, stream);
  });
}

}  // namespace megalodon::cuda
