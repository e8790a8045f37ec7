// chunk_attention on the GPU. Not yet run on a GPU.
//
// Computes  softmax attention inside chunks and its gradients (ops/chunk_attention.h); arXiv 2404.08801.
// Layout    q, k, v, o (B, L, H, S or E): the rows of a head are H S (H E) apart; caches (B, C, H, S or E) likewise;
//           lse, D (B, H, L). cu_seqlens: B = 1. The scratch holds strips of tiles of weights: forward, a tile of
//           queries with all keys before it, and the maximum and sum of the rows of every tile; backward, a tile of
//           keys with all queries after it, P and dS; sliding, with those of its windows. As many strips as the
//           scratch has room for make a round.
// Mapping   a block owns a tile of 64 x 64 or 128 x 128, by matrix instructions for bfloat16 and float16
//           (core/mma.cuh; on Hopper those of chunk_attention_wgmma.cu), else by multiply-adds (core/tile_product.cuh).
//           Forward, per round: tiles of scores become weights, each relative to its own rows' maxima, of 16-bit
//           numbers to a power of two near them; tiles of o are their products with v, the rows brought to their common
//           maxima where those differ. Backward, per round: tiles of P and dS; then of dv = P^T do and dk = dS^T q;
//           then of dq = dS k. Tiles above the diagonal are neither computed nor read, those below it know no mask.
//           Scores are computed once however wide E is, and every step has a block for every tile: S = 256, E = 2048,
//           and B = 1, fill the GPU.
// Traffic   2 (S + E) FLOPs per query and key forward, 2 (3 S + 2 E) backward, on the causal half: compute-bound where
//           S + E is some hundreds; below, the weights, written once and read once per tile of columns, bind. A round
//           of them is meant to stay in the L2 cache.
// Numerics  products summed in stat, in a fixed order: forward, keys; backward, queries (dk, dv), keys (dq). Every row
//           has its own maximum. Masked and dropped weights are exactly 0. The matrix instructions take P and dS in T:
//           forward relative to a power of two, so that P is rounded once; lse is of the unrounded weights.
// Limits    any B, L, H, S, E, C and position. Elements that are not 16-byte packs (S, E, addresses) go one by one and
//           by multiply-adds. dq of a chunk whose strips are not in one round is summed over rounds in the workspace:
//           in rows if they do not fit, in packed rows and windows wherever a round ends.
#include "ops/chunk_attention.h"
#include "ops/chunk_attention_backward.cuh"
#include "ops/chunk_attention_forward.cuh"
#include "ops/chunk_attention_wgmma.cuh"

namespace megalodon::cuda {
namespace {

// Calls f(TypeTag<Tile>, is_packed) with the kernel's variant for elements of type T.
template <class T, class F>
void visit_tile(const ChunkAttention& args, bool packed, F&& f) {
  using A = stat_t<T>;
  constexpr bool kIsHalf = sizeof(T) == 2;
  using Small = std::conditional_t<kIsHalf, MmaTile<T, 64>, FmaTile<A, 64>>;
  using Large = std::conditional_t<kIsHalf, MmaTile<T, 128>, FmaTile<A, 128>>;
  if (!packed) return f(TypeTag<FmaTile<A, 64>>{}, std::false_type{});
  if constexpr (!std::is_same_v<T, double>) {
    if (gpu_tile(args.dtype, queries_of_chunk(args)) > 64) return f(TypeTag<Large>{}, std::true_type{});
  }
  f(TypeTag<Small>{}, std::true_type{});
}

// Whether tiles of 128 x 128 of 16-bit numbers go by Hopper's instructions.
bool uses_wgmma(const ChunkAttention& args, bool packed) {
  return packed && size_of(args.dtype) == 2 && gpu_tile(args.dtype, queries_of_chunk(args)) == 128 && has_wgmma() &&
         chunk_attention_wgmma_forward != nullptr;
}

template <class T, class... Pointers>
bool is_packed(const ChunkAttention& args, Pointers... pointers) {
  return args.S % 4 == 0 && args.E % 4 == 0 && can_pack<T>(args.S, args.q, args.k, args.k_cache, pointers...) &&
         can_pack<T>(args.E, args.v, args.v_cache);
}

}  // namespace

void chunk_attention_forward(const ChunkAttentionForward& args, void* stream) {
  if (args.sequences.tokens() * args.H == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool is_aligned = is_packed<T>(args, args.o);
    if (uses_wgmma(args, is_aligned)) return chunk_attention_wgmma_forward(args, stream);
    visit_tile<T>(args, is_aligned, [&](auto tag, auto packed) {
      using Tile = typename decltype(tag)::type;
      forward<T, Tile, packed()>(args, stream, launch_forward<T, Tile, Tile, packed()>);
    });
  });
}

void chunk_attention_backward(const ChunkAttentionBackward& args, void* stream) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.cached) {  // the slots that hold no key of this chunk
      clear<T>(args.dk_cache, args.sequences.count * args.C * args.H * args.S, stream);
      clear<T>(args.dv_cache, args.sequences.count * args.C * args.H * args.E, stream);
    }
    if (args.sequences.tokens() * args.H == 0) return;
    const bool is_aligned =
        is_packed<T>(args, args.dout, args.o, args.dq, args.dk, args.dv, args.dk_cache, args.dv_cache);
    if (uses_wgmma(args, is_aligned)) return chunk_attention_wgmma_backward(args, stream);
    visit_tile<T>(args, is_aligned, [&](auto tag, auto packed) {
      using Tile = typename decltype(tag)::type;
      backward<T, Tile, packed()>(args, stream, launch_backward<T, Tile, Tile, packed()>);
    });
  });
}

}  // namespace megalodon::cuda
