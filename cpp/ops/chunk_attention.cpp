// chunk_attention on the CPU.
//
// Computes  softmax attention inside chunks and its gradients (ops/chunk_attention.h); arXiv 2404.08801.
// Layout    q, k, v, o (B, L, H, S or E): the rows of a head are H S (H E) apart; caches (B, C, H, S or E) likewise;
//           lse, D (B, H, L). Tiles are copied into panels (core/gemm.h) in the slot's scratch, the next ones between
//           the products of those that are there: of the accumulator type or, where the CPU has it, pairs of bf16.
// Mapping   forward: an item is a tile of queries of one chunk and head. It walks the keys before it in blocks with a
//           shift near the running maximum and a sum; queries lie across lanes, so the softmax needs no reduction over
//           lanes. Backward: an item is a group of key tiles of one chunk and head. A key tile stays while the tiles of
//           queries after it pass by; keys lie across lanes. dk and dv belong to one item; dq is summed over groups.
//           Items are listed with their work and shared by it, however long sequences are (chunk_attention_items.h).
//           Chunks of few keys, of short sequences, go row by row (chunk_attention_few.h).
// Traffic   2 (S + E) FLOPs per query and key forward, 2 (3 S + 2 E) backward, the non-causal half skipped but for
//           part of a tile on the diagonal: compute-bound. A query tile reads every key and value before it once.
// Numerics  scores, weights and sums in stat; sums in the order of the keys (forward), the queries (dk, dv), the key
//           tiles of a group and then the groups (dq), whatever the number of threads. Masked and dropped weights are
//           exactly 0 and so are the outputs and gradients of a query without keys. Where bf16 is multiplied in pairs
//           weights and the scores' gradients are rounded to it once, for the products they enter.
// Limits    any B, L, H, S, E, C and position. Scratch grows with S and E, not with L or C, but for the
//           list of items, 32 bytes each. Sliding, a tile of queries walks the keys of its windows alone, of which a
//           NaN or inf may reach its other queries.
#include "ops/chunk_attention.h"

#include <cstring>

#include "core/rows.h"
#include "ops/chunk_attention_backward.h"
#include "ops/chunk_attention_few.h"
#include "ops/chunk_attention_forward.h"
#include "ops/chunk_attention_items.h"

namespace megalodon::cpu::MEGALODON_ISA {
namespace {

// The memory of a workspace behind the items.
template <class A>
A* numbers_after_items(const ChunkAttention& args, void* workspace) {
  return reinterpret_cast<A*>(static_cast<ChunkItem*>(workspace) + args.items);
}

template <class T>
void forward(const ChunkAttentionForward& args) {
  using A = stat_t<T>;
  const Items items(args, chunk_of_queries, args.workspace,
                    [&](const Chunk& chunk, auto&& add) { for_query_tiles(args, chunk, add); });
  A* scratch = numbers_after_items<A>(args, args.workspace);
  parallel_for(args.slots, 1, [&](int64_t begin, int64_t end) {
    items.for_each(begin, end, [&](const Chunk& chunk, int64_t, int64_t tile) {
      if (FewKeys<T>::are(args, chunk)) return FewKeys<T>(args, chunk).forward(args);
      ForwardTile<T>(args, chunk, tile, scratch + begin * args.scratch).run();
    });
  });
}

// D = sum over e of do o, for every token and head.
template <class T>
void multiply_outputs(const ChunkAttentionBackward& args, stat_t<T>* D) {
  using A = stat_t<T>;
  const auto* dout = static_cast<const T*>(args.dout);
  const auto* o = static_cast<const T*>(args.o);
  parallel_for(args.sequences.tokens(), grain_of_rows(args.H * args.E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < args.H; ++h) {
        const int64_t row = (t * args.H + h) * args.E;
        Vec<A> sum = {};
        for (int64_t e = 0; e < args.E; e += kLanes<A>) {
          sum = load(dout + row + e, args.E - e) * load(o + row + e, args.E - e) + sum;
        }
        D[args.statistic(t, h)] = sum_lanes<A>(sum);
      }
    }
  });
}

// dq = the sum of the groups' partial sums that reach the token, in order.
template <class T>
void add_groups(const ChunkAttentionBackward& args, const stat_t<T>* partial) {
  using A = stat_t<T>;
  const Sequences& sequences = args.sequences;
  const int64_t n = args.H * args.S, size = sequences.tokens() * n;
  parallel_for(sequences.tokens(), grain_of_rows(n), [&](int64_t begin, int64_t end) {
    int64_t sequence = sequences.of_token(begin);
    for (int64_t t = begin; t < end; ++t) {
      int64_t groups = args.partials();  // sliding, those that do not reach it are 0
      if (!args.sliding) {
        while (t >= sequences.end(sequence)) ++sequence;
        const int64_t m = args.position == nullptr ? 0 : args.position[sequence] % args.C;
        const Chunk chunk = chunk_of(args, sequence, (m + t - sequences.begin(sequence)) / args.C, 0);
        const int64_t tile = (t - chunk.token - chunk.first) / args.queries;
        const int64_t last = std::min(chunk.keys, chunk.first + (tile + 1) * args.queries) - 1;
        groups = std::min(args.groups, last / args.keys + 1);
      }
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        Vec<A> sum = load(partial + t * n + i, n - i);
        for (int64_t g = 1; g < groups; ++g) sum += load(partial + g * size + t * n + i, n - i);
        store(static_cast<T*>(args.dq) + t * n + i, sum, n - i);
      }
    }
  });
}

template <class T>
void backward(const ChunkAttentionBackward& args) {
  using A = stat_t<T>;
  const int64_t rows = args.sequences.tokens() * args.H;
  if (args.cached) {
    std::memset(args.dk_cache, 0, args.sequences.count * args.C * args.H * args.S * sizeof(T));
    std::memset(args.dv_cache, 0, args.sequences.count * args.C * args.H * args.E * sizeof(T));
  }
  const Items items(args, chunk_of_keys, args.workspace,
                    [&](const Chunk& chunk, auto&& add) { for_groups(args, chunk, add); });
  A* D = numbers_after_items<A>(args, args.workspace);
  A* partial = D + rows;
  A* scratch = partial + args.partials() * rows * args.S;
  multiply_outputs<T>(args, D);
  if (args.sliding) {
    parallel_for(args.partials() * rows * args.S, 1 << 16,
                 [&](int64_t begin, int64_t end) { std::memset(partial + begin, 0, (end - begin) * sizeof(A)); });
  }
  parallel_for(args.slots, 1, [&](int64_t begin, int64_t end) {
    items.for_each(begin, end, [&](const Chunk& chunk, int64_t c, int64_t group) {
      const int64_t part = group + (args.sliding ? c % 2 * args.groups : 0);
      A* dq = partial + part * rows * args.S;
      if (FewKeys<T>::are(args, chunk)) return FewKeys<T>(args, chunk).backward(args, D, dq);
      BackwardTile<T>(args, chunk, group, D, dq, scratch + begin * args.scratch).run();
    });
  });
  add_groups<T>(args, partial);
}

}  // namespace

void chunk_attention_forward(const ChunkAttentionForward& args) {
  visit_activation(args.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(args); });
}

void chunk_attention_backward(const ChunkAttentionBackward& args) {
  visit_activation(args.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(args); });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_chunk_attention_forward_outputs(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                         int64_t chunk_size, double dropout_p, int64_t seed,
                                                         const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                         const DLTensor* v_cache, const DLTensor* position,
                                                         int64_t sliding, const char* dropout_mode,
                                                         megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("chunk_attention");
    check_chunk_attention(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache, position, sliding,
                          dropout_mode, Outputs(outputs));
  });
}

extern "C" int megalodon_chunk_attention_forward(const DLTensor* q, const DLTensor* k, const DLTensor* v,
                                                 int64_t chunk_size, double dropout_p, int64_t seed,
                                                 const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                 const DLTensor* v_cache, const DLTensor* position, int64_t sliding,
                                                 const char* dropout_mode, DLTensor* o, DLTensor* lse,
                                                 DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("chunk_attention");
    const ChunkAttentionForward args =
        check_chunk_attention(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache, position, sliding,
                              dropout_mode, {o, lse, workspace});
    c.not_negative("position", args.position, args.sequences.count);
    run_on(c, args, cpu::chunk_attention_forward, cuda::chunk_attention_forward, stream);
  });
}

extern "C" int megalodon_chunk_attention_backward_outputs(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                          const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                          int64_t chunk_size, double dropout_p, int64_t seed,
                                                          const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                          const DLTensor* v_cache, const DLTensor* position,
                                                          int64_t sliding, const char* dropout_mode,
                                                          megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("chunk_attention_backward");
    check_chunk_attention_backward(c, dout, q, k, v, o, lse, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache,
                                   position, sliding, dropout_mode, Outputs(outputs));
  });
}

extern "C" int megalodon_chunk_attention_backward(const DLTensor* dout, const DLTensor* q, const DLTensor* k,
                                                  const DLTensor* v, const DLTensor* o, const DLTensor* lse,
                                                  int64_t chunk_size, double dropout_p, int64_t seed,
                                                  const DLTensor* cu_seqlens, const DLTensor* k_cache,
                                                  const DLTensor* v_cache, const DLTensor* position, int64_t sliding,
                                                  const char* dropout_mode, DLTensor* dq, DLTensor* dk, DLTensor* dv,
                                                  DLTensor* dk_cache, DLTensor* dv_cache, DLTensor* workspace,
                                                  void* stream) {
  return guarded([&] {
    Checker c("chunk_attention_backward");
    const ChunkAttentionBackward args = check_chunk_attention_backward(
        c, dout, q, k, v, o, lse, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache, position, sliding,
        dropout_mode, {dq, dk, dv, dk_cache, dv_cache, workspace});
    c.not_negative("position", args.position, args.sequences.count);
    run_on(c, args, cpu::chunk_attention_backward, cuda::chunk_attention_backward, stream);
  });
}
#endif
