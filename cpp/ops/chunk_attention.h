// chunk_attention: causal softmax attention inside chunks of C tokens, nothing across chunks.
//
// Token t of sequence b (row b of a batch, or segment b of a packed row) stands at p = position[b] + t (position
// absent: 0), in chunk p / C at place r = p mod C. With the unscaled scores s_ij = q_i . k_j over the keys j <= i of
// i's chunk that are not dropped,
//   o_i = sum_j exp(s_ij - lse_i) v_j,   lse_i = log sum_j exp(s_ij);   without any key, o_i = 0 and lse_i = -inf.
// The m = position[b] mod C keys of the first chunk that came before token 0 are k_cache[b, :m], v_cache[b, :m].
// Sliding: over the keys i - C < j <= i instead, and the last C tokens before token 0 are in the caches, position p in
// slot p mod C.
// DropKey: with floor(dropout_p 2^32) = n, key j is dropped for query i iff word j & 3 of philox4x32-10(counter
// (j >> 2, i, h, b), key seed) is below n; i, j here are the absolute positions p of the two, as uint32. Or, in the
// dropout mode "weight", it is the weight of j after the softmax, and the others are divided by 1 - dropout_p:
//   o_i = sum_j W_ij v_j,   W_ij = P_ij / (1 - dropout_p) if j is not dropped, or 0.
//
// Gradients, with P_ij = exp(s_ij - lse_i) and D_i = sum_e do_ie o_ie:
//   dS_ij = P_ij (do_i . v_j - D_i),  dv_j = sum_i P_ij do_i,  dq_i = sum_j dS_ij k_j,  dk_j = sum_i dS_ij q_i,
// and in the mode "weight" dS_ij = W_ij do_i . v_j - P_ij D_i,  dv_j = sum_i W_ij do_i.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "ops/chunk_attention_chunks.h"

namespace megalodon {

struct ChunkAttentionForward : ChunkAttention {
  static constexpr int64_t kKeys = 256;     // of a block
  static constexpr int64_t kColumns = 128;  // of the values, packed at a time
  static constexpr int64_t kMostQueries = 256;
  void* o;           // [B, L, H, E]
  void* lse;         // [B, H, L] stat
  void* workspace;   // items, [slots, scratch] stat; GPU: scratch
  int64_t queries;   // of a tile
  int64_t key_rows;  // of a block, kKeys or the chunk's fewer
};

struct ChunkAttentionBackward : ChunkAttention {
  static constexpr int64_t kColumns = 64;  // of do, packed at a time
  static constexpr int64_t kMostKeys = 128;
  const void* dout;  // [B, L, H, E]
  const void* o;     // [B, L, H, E]
  const void* lse;   // [B, H, L] stat
  void* dq;          // [B, L, H, S]
  void* dk;          // [B, L, H, S]
  void* dv;          // [B, L, H, E]
  void* dk_cache;    // [N, C, H, S], or [0] when k_cache is absent
  void* dv_cache;    // [N, C, H, E], likewise
  void*
      workspace;   // items; stat: D [B, H, L], partial dq [partials, B, L, H, S], [slots, scratch]. GPU: scratch, D, dq
  int64_t groups;  // that the key tiles of a chunk are dealt to, each with its own partial sum of dq; GPU: 1 if dq
                   // of a chunk may be summed over rounds, or 0
  int64_t keys;    // of a tile
  int64_t queries;  // of a tile

  // Sliding, the queries of a block of keys are those of the next block, too: even and odd ones have their own sums.
  constexpr int64_t partials() const { return groups * (1 + sliding); }
};

// What a thread of the CPU does at a time: a part of the queries (backward: of the keys) of a chunk.
struct ChunkItem {
  int64_t sequence, chunk, part;
  int64_t middle;  // of its work, among the work of all items of a head in a row
};
constexpr int64_t kMaxSlots = 64;

// The GPU keeps the weights of a query tile (backward: of a key tile, twice) with all of its partners in the workspace,
// as many strips of tiles at a time as this allows, but at least one.
#if defined(MEGALODON_SIMT)
// In the executor so little that small tests meet several rounds, or what MEGALODON_SIMT_SCRATCH says.
static inline int64_t most_gpu_scratch() {
  const char* bytes = std::getenv("MEGALODON_SIMT_SCRATCH");
  return bytes == nullptr ? 128 << 10 : std::atoll(bytes);
}
#else
constexpr int64_t most_gpu_scratch() { return 128 << 20; }
#endif

constexpr int64_t kAlignment = 16;  // of the scratch, for which the workspace has room

// The side of the GPU's tiles.
constexpr int64_t gpu_tile(DType dtype, int64_t queries) {
  return dtype == DType::kFloat64 || queries <= 64 ? 64 : 128;
}

static inline int64_t gpu_scratch(int64_t strips, int64_t strip_bytes) {
  if (strips == 0 || strip_bytes == 0) return 0;
  return std::min(strips, std::max(most_gpu_scratch() / strip_bytes, int64_t{1})) * strip_bytes;
}

// The inputs that forward and backward share.
struct ChunkAttentionTensors {
  Tensor q, k, v, k_cache, v_cache, position;
};

static inline ChunkAttentionTensors check_chunk_attention_inputs(
    Checker& c, const DLTensor* q_in, const DLTensor* k_in, const DLTensor* v_in, int64_t chunk_size, double dropout_p,
    int64_t seed, const DLTensor* cu_seqlens, const DLTensor* k_cache_in, const DLTensor* v_cache_in,
    const DLTensor* position_in, int64_t sliding, const char* dropout_mode, ChunkAttention& args) {
  ChunkAttentionTensors t;
  t.q = c.activation("q", q_in, {any("B"), any("L"), any("H"), any("S")});
  const Dim B = t.q.dim(0, "B"), L = t.q.dim(1, "L"), H = t.q.dim(2, "H"), S = t.q.dim(3, "S");
  args.sequences = c.sequences(t.q, cu_seqlens);
  const Dim N = c.rows_of(t.q, args.sequences);
  t.k = c.like("k", k_in, t.q);
  t.v = c.tensor("v", v_in, t.q.dtype, {B, L, H, any("E")});
  const Dim E = t.v.dim(3, "E");
  c.at_least("chunk_size", chunk_size, 1);
  if (!(dropout_p >= 0 && dropout_p < 1)) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", dropout_p);
    c.fail(MEGALODON_VALUE_ERROR, "dropout_p", "at least 0 and below 1", text);
  }
  const bool given = k_cache_in != nullptr;
  if ((v_cache_in != nullptr) != given || (position_in != nullptr) != given) {
    std::string got;
    for (const auto& [name, tensor] :
         {std::pair{"k_cache", k_cache_in}, {"v_cache", v_cache_in}, {"position", position_in}}) {
      if (tensor != nullptr) got += (got.empty() ? "" : " and ") + std::string(name);
    }
    c.fail(MEGALODON_VALUE_ERROR, "k_cache, v_cache, position", "given all three or none", got + " only");
  }
  const Dim C{"C", chunk_size};
  t.k_cache = c.optional("k_cache", k_cache_in, t.q.dtype, {N, C, H, S});
  t.v_cache = c.optional("v_cache", v_cache_in, t.q.dtype, {N, C, H, E});
  t.position = c.optional("position", position_in, DType::kInt64, {N});
  args.dtype = t.q.dtype;
  args.q = t.q.data;
  args.k = t.k.data;
  args.v = t.v.data;
  args.k_cache = t.k_cache.data;
  args.v_cache = t.v_cache.data;
  args.position = static_cast<const int64_t*>(t.position.data);
  args.H = H.size;
  args.S = S.size;
  args.E = E.size;
  // Without caches no token is further than L from any other. With them C is what fits in memory, unless rows are
  // empty.
  args.C = given ? chunk_size : std::min(chunk_size, std::max<int64_t>(args.sequences.length, 1));
  c.require(args.C <= int64_t{1} << 40, "chunk_size", "at most 2^40 with caches", std::to_string(chunk_size));
  args.seed = seed;
  args.drop_below = static_cast<uint32_t>(std::floor(dropout_p * 4294967296.0));
  args.cached = given;
  args.sliding = sliding != 0;
  const std::string mode = dropout_mode == nullptr ? "none" : dropout_mode;
  c.require(mode == "key" || mode == "weight", "dropout_mode", "key or weight", mode);
  args.drops_weights = mode == "weight" && args.drop_below > 0;
  args.kept_scale = args.drops_weights ? 1 / (1 - dropout_p) : 1;
  return t;
}

static inline ChunkAttentionForward check_chunk_attention(Checker& c, const DLTensor* q, const DLTensor* k,
                                                          const DLTensor* v, int64_t chunk_size, double dropout_p,
                                                          int64_t seed, const DLTensor* cu_seqlens,
                                                          const DLTensor* k_cache, const DLTensor* v_cache,
                                                          const DLTensor* position, int64_t sliding,
                                                          const char* dropout_mode, Outputs&& out) {
  ChunkAttentionForward args{};
  const ChunkAttentionTensors t = check_chunk_attention_inputs(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens,
                                                               k_cache, v_cache, position, sliding, dropout_mode, args);
  const DType stat = stat_dtype(args.dtype);
  args.o = out.like(c, "o", t.v);
  args.lse = out.next(c, "lse", stat, {t.q.shape[0], args.H, args.sequences.length});
  const int64_t keys = keys_of_chunk(args), queries = queries_of_chunk(args);
  if (c.on_cuda()) {
    const Strips strips = Strips::of(args, gpu_tile(args.dtype, queries), false);
    args.scratch = gpu_scratch(strips.count, strips.partners * strips.tile * (strips.tile + 2) * size_of(stat));
    args.workspace = out.workspace(c, args.scratch + kAlignment);
    return args;
  }
  const int64_t Sp = round_up(args.S, 32), Ep = round_up(args.E, 32);
  // Large tiles read keys and values less often; small ones are enough for more threads.
  const int64_t chunks = args.H * whole_chunks(args);
  args.queries = chunks * ceil_div(queries, args.kMostQueries) >= 32 ? args.kMostQueries : args.kMostQueries / 2;
  args.queries = std::min(args.queries, round_up(queries, 32));
  args.key_rows = keys < args.kKeys ? keys : args.kKeys;
  args.items = most_chunks(args) + args.sequences.tokens() / std::max<int64_t>(args.queries, 1);
  args.slots = std::min(args.H * args.items, kMaxSlots);
  // Transposed queries; a block of keys, its scores, twice some columns of its values; the output.
  args.scratch = args.queries * (Sp + Ep) + args.key_rows * (Sp + args.queries + std::min(2 * args.kColumns, Ep));
  args.workspace =
      out.workspace(c, args.items * int64_t{sizeof(ChunkItem)} + args.slots * args.scratch * size_of(stat));
  return args;
}

static inline ChunkAttentionBackward check_chunk_attention_backward(
    Checker& c, const DLTensor* dout_in, const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* o_in,
    const DLTensor* lse_in, int64_t chunk_size, double dropout_p, int64_t seed, const DLTensor* cu_seqlens,
    const DLTensor* k_cache, const DLTensor* v_cache, const DLTensor* position, int64_t sliding,
    const char* dropout_mode, Outputs&& out) {
  ChunkAttentionBackward args{};
  const ChunkAttentionTensors t = check_chunk_attention_inputs(c, q, k, v, chunk_size, dropout_p, seed, cu_seqlens,
                                                               k_cache, v_cache, position, sliding, dropout_mode, args);
  const DType stat = stat_dtype(args.dtype);
  const Tensor dout = c.like("dout", dout_in, t.v);
  const Tensor o = c.like("o", o_in, t.v);
  const Tensor lse = c.tensor("lse", lse_in, stat, {t.q.dim(0, "B"), t.q.dim(2, "H"), t.q.dim(1, "L")});
  args.dout = dout.data;
  args.o = o.data;
  args.lse = lse.data;
  args.dq = out.like(c, "dq", t.q);
  args.dk = out.like(c, "dk", t.k);
  args.dv = out.like(c, "dv", t.v);
  args.dk_cache = out.gradient(c, "dk_cache", t.k_cache, args.dtype);
  args.dv_cache = out.gradient(c, "dv_cache", t.v_cache, args.dtype);
  const int64_t keys = std::min(keys_of_chunk(args), args.C), queries = queries_of_chunk(args);
  const int64_t rows = args.sequences.tokens() * args.H;
  if (c.on_cuda()) {
    const Strips strips = Strips::of(args, gpu_tile(args.dtype, queries), true);
    const int64_t strip_bytes = 2 * strips.partners * strips.tile * strips.tile * size_of(stat);
    args.scratch = gpu_scratch(strips.count, strip_bytes);
    args.groups = args.scratch < (strips.overlap() ? strips.count : strips.tiles) * strip_bytes;
    args.workspace =
        out.workspace(c, kAlignment + args.scratch + (round_up(rows, 4) + args.groups * rows * args.S) * size_of(stat));
    return args;
  }
  const int64_t Sp = round_up(args.S, 32), Ep = round_up(args.E, 32);
  const int64_t chunks = args.H * whole_chunks(args);
  args.keys = chunks * ceil_div(keys, args.kMostKeys) >= 8 ? args.kMostKeys : args.kMostKeys / 2;
  args.keys = std::min(args.keys, round_up(keys, 32));
  args.queries = std::min(int64_t{128}, round_up(queries, 32));
  args.groups = chunks == 0 ? 0 : std::min({32 / chunks + 1, ceil_div(keys, args.keys), int64_t{8}});
  args.items = most_chunks(args) * args.groups;
  args.slots = std::min(args.H * args.items, kMaxSlots);
  // Keys in panels and transposed, dk; values transposed, dv; queries, dq; the weights and their gradients; two times
  // columns of do; where weights are dropped, all of them and bits. Of bf16, which may be multiplied in pairs, queries
  // and do are two factors each; the weights become one and their gradients two.
  const int64_t more = args.dtype == DType::kBfloat16;
  args.scratch = args.keys * (3 * Sp + 2 * Ep) +
                 args.queries * ((2 + more) * Sp + (2 + 3 * more) * args.keys + (2 + 2 * more) * args.kColumns);
  if (args.drops_weights) args.scratch += 2 * args.queries * args.keys;
  args.workspace =
      out.workspace(c, args.items * int64_t{sizeof(ChunkItem)} +
                           (rows + args.partials() * rows * args.S + args.slots * args.scratch) * size_of(stat));
  return args;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(chunk_attention_forward, ChunkAttentionForward)
MEGALODON_KERNEL_BF16(chunk_attention_backward, ChunkAttentionBackward)
