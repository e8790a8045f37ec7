// chunk_attention_step: one decoding step of chunk attention (ops/chunk_attention.h), for every row.
//
// With the slot m = position[b] mod C: k_cache[b, m] = k[b], v_cache[b, m] = v[b], and over the slots j <= m
//   o = sum_j softmax_j(q . k_cache[b, j]) v_cache[b, j].
// Slots above m are not read. Sliding: over all slots that have been written, which hold the last C tokens. Inference
// only.
#pragma once

#include <algorithm>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace megalodon {

struct ChunkAttentionStep {
  DType dtype;              // of all tensors but position
  const void* q;            // [B, H, S]
  const void* k;            // [B, H, S]
  const void* v;            // [B, H, E]
  void* k_cache;            // [B, C, H, S], slot position % C is written
  void* v_cache;            // [B, C, H, E], likewise
  const int64_t* position;  // [B]
  void* o;                  // [B, H, E]
  void* workspace;          // [B, H, max_parts, E + 2] stat: per part of the slots the sum, the maximum, the output;
                            // on the GPU all outputs, then [B, H, max_parts] sums and maxima, none for one part
  int64_t B, H, S, E, C;
  bool sliding;
  int64_t max_parts;

  // The slots that are read after position % C = m has been written.
  MEGALODON_HOST_DEVICE constexpr int64_t filled(int64_t p, int64_t m) const { return sliding && p >= C ? C : m + 1; }

  // FMAs that a part, or a thread, should have at least.
  static constexpr int64_t kLeastWork = 1 << 17;

  // On the GPU a part is a block. So that there are kBlocks, two on each of its processors, parts may be as small as
  // kLeastSlots; for four times as many, which share the work more evenly, they must be as large as kTile.
  static constexpr int64_t kBlocks = 264, kLeastSlots = 16, kTile = 64, kMaxBlockParts = 128;

  void divide(bool on_cuda = false) {  // by the sizes
    if (on_cuda) {
      const int64_t blocks = ceil_div(kBlocks, std::max<int64_t>(B * H, 1));
      max_parts = std::max(std::min(blocks, ceil_div(C, kLeastSlots)), std::min(4 * blocks, ceil_div(C, kTile)));
      max_parts = std::min(max_parts, kMaxBlockParts);
      return;
    }
    const int64_t heads = B * H, work = C * (S + E);
    max_parts = std::max<int64_t>(1, std::min({int64_t{16}, 32 / std::max<int64_t>(heads, 1), work / kLeastWork}));
  }
  int64_t workspace_bytes(bool on_cuda) const {
    return on_cuda && max_parts == 1 ? 0 : B * H * max_parts * (E + 2) * size_of(stat_dtype(dtype));
  }
};

static inline ChunkAttentionStep check_chunk_attention_step(Checker& c, const DLTensor* q_in, const DLTensor* k_in,
                                                            const DLTensor* v_in, const DLTensor* k_cache_in,
                                                            const DLTensor* v_cache_in, const DLTensor* position_in,
                                                            int64_t chunk_size, int64_t sliding, Outputs&& out) {
  const Tensor q = c.activation("q", q_in, {any("B"), any("H"), any("S")});
  const Dim B = q.dim(0, "B"), H = q.dim(1, "H"), S = q.dim(2, "S");
  const Tensor k = c.like("k", k_in, q);
  const Tensor v = c.tensor("v", v_in, q.dtype, {B, H, any("E")});
  const Dim E = v.dim(2, "E"), C{"C", chunk_size};
  c.at_least("chunk_size", chunk_size, 1);
  const Tensor k_cache = c.tensor("k_cache", k_cache_in, q.dtype, {B, C, H, S});
  const Tensor v_cache = c.tensor("v_cache", v_cache_in, q.dtype, {B, C, H, E});
  const Tensor position = c.tensor("position", position_in, DType::kInt64, {B});
  c.apart({k_cache, v_cache}, {q, k, v, position});
  ChunkAttentionStep args{};
  args.dtype = q.dtype;
  args.q = q.data;
  args.k = k.data;
  args.v = v.data;
  args.k_cache = k_cache.data;
  args.v_cache = v_cache.data;
  args.position = static_cast<const int64_t*>(position.data);
  args.B = B.size;
  args.H = H.size;
  args.S = S.size;
  args.E = E.size;
  args.C = C.size;
  args.sliding = sliding != 0;
  args.divide(c.on_cuda());
  args.o = out.like(c, "o", v);
  args.workspace = out.workspace(c, args.workspace_bytes(c.on_cuda()));
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL(chunk_attention_step_forward, ChunkAttentionStep)
