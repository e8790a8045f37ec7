// chunk_attention by the matrix instructions of Hopper, sm_90a alone. Not yet run on a GPU.
//
// Computes  what chunk_attention.cu does.
// Layout    as there; slabs in shared memory swizzled by 128 bytes, as wgmma reads them (core/wgmma.cuh).
// Mapping   three ways. In all of them two warpgroups multiply while the next slabs are on their way.
//           Whole calls with heads of at most 256 numbers, backward 128: in one pass (chunk_attention_fused.cuh). As
//           many blocks as multiprocessors; a block takes strips of 128 queries or keys, 64 to a warpgroup, in turns,
//           past which the others move; weights stay in registers. Backward once of keys (dk, dv) and once of queries
//           (dq). Whole calls with wider heads: the rounds of chunk_attention.cu. Tiles of scores have 128 x 128, two
//           blocks to a multiprocessor; tiles of o, dq, dk and dv 128 x 256, one block, 128 sums to a thread, by tensor
//           copies that one thread of a third warpgroup asks for, in pairs of blocks (chunk_attention_bulk.cuh). Rows
//           in caches and windows: likewise, but all threads copy (cp.async), and tiles of narrow rows are 128 x 128.
// Traffic   wide heads: as there. A tile of 128 x 256 reads 48 KB from L2 for 4.2 MFLOP, which is expected to bind; two
//           blocks with the same columns and neighbouring strips of a chunk share those of the wide operand: 32 KB
//           each. The last two slabs of the longer strip are its own. One pass: 64 KB for 8.4 MFLOP forward at S = E =
//           128, and half as many exponentials as would bind; backward 7 products of 128 x 128 x 128 in the place of 5,
//           and 128 KB in the place of 350.
// Numerics  as there, but for the order of dv and dk by tensor copies: the queries shared with the partner, then the
//           strip's own first ones. Which strips are partners depends on where chunks begin in the call. In one pass a
//           row's weights are relative to the largest reference so far (chunk_attention_forward.cuh).
// Limits    bfloat16 and float16, S and E in packs of 8, more than 64 queries in a chunk; else chunk_attention.cu. By
//           tensor copies fewer than 2^31 tokens.
#include "core/wgmma.cuh"
#include "ops/chunk_attention_bulk.cuh"
#include "ops/chunk_attention_fused_backward.cuh"
#include "ops/chunk_attention_fused_forward.cuh"
#include "ops/chunk_attention_wgmma.cuh"

namespace megalodon::cuda {
namespace {

template <class F>
void visit_half(DType dtype, F&& f) {
  dtype == DType::kBfloat16 ? f(TypeTag<bf16>{}) : f(TypeTag<f16>{});
}

// Calls f(type of the numbers, tile of scores, tile of products), the latter as wide as rows of `columns` ask for.
template <class F>
void visit_tiles(DType dtype, int64_t columns, F&& f) {
  visit_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Tile = WgmmaTile<T, 128>;
    if (columns > 128) return f(tag, TypeTag<Tile>{}, TypeTag<WgmmaTile<T, 256>>{});
    f(tag, TypeTag<Tile>{}, TypeTag<Tile>{});
  });
}

}  // namespace

void chunk_attention_wgmma_forward(const ChunkAttentionForward& args, void* stream) {
  const int64_t width = args.E > args.S ? args.E : args.S;
  if (uses_bulk(args) && width <= 256) {
    return visit_half(args.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (width <= 64) return launch_fused_forward<T, 64>(args, stream);
      width <= 128 ? launch_fused_forward<T, 128>(args, stream) : launch_fused_forward<T, 256>(args, stream);
    });
  }
  visit_tiles(args.dtype, args.E, [&](auto type, auto tile, auto product) {
    using T = typename decltype(type)::type;
    using Tile = typename decltype(tile)::type;
    using Product = typename decltype(product)::type;
    if constexpr (Product::kTileColumns > 128) {
      if (uses_bulk(args)) return forward<T, Tile, true>(args, stream, launch_bulk_forward<T, Tile, Product>);
    }
    forward<T, Tile, true>(args, stream, launch_forward<T, Tile, Product, true>);
  });
}

void chunk_attention_wgmma_backward(const ChunkAttentionBackward& args, void* stream) {
  const int64_t width = args.E > args.S ? args.E : args.S;
  if (uses_bulk(args) && width <= 128) {
    return visit_half(args.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      width <= 64 ? launch_fused_backward<T, 64>(args, stream) : launch_fused_backward<T, 128>(args, stream);
    });
  }
  visit_tiles(args.dtype, width, [&](auto type, auto tile, auto product) {
    using T = typename decltype(type)::type;
    using Tile = typename decltype(tile)::type;
    using Product = typename decltype(product)::type;
    if constexpr (Product::kTileColumns > 128) {
      if (uses_bulk(args)) return backward<T, Tile, true>(args, stream, launch_bulk_backward<T, Tile, Product>);
    }
    backward<T, Tile, true>(args, stream, launch_backward<T, Tile, Product, true>);
  });
}

}  // namespace megalodon::cuda
