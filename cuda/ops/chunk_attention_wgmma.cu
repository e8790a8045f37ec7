// chunk_attention by the matrix instructions of Hopper, sm_90a alone. Not yet run on a GPU.
//
// Computes  what chunk_attention.cu does, by the same kernels (chunk_attention_forward.cuh, _backward.cuh).
// Layout    as there; slabs in shared memory swizzled by 128 bytes, as wgmma reads them (core/wgmma.cuh).
// Mapping   as there. Tiles of scores have 128 x 128, two blocks to a multiprocessor; tiles of o, dq, dk and dv 128 x
//           256 where rows are longer than 128, one block, 128 sums to a thread. Two warpgroups multiply slabs 64 deep
//           while the next ones are on their way. Who brings them: tensor copies that one thread of a third warpgroup
//           asks for, in pairs of blocks (chunk_attention_bulk.cuh), for wide tiles of whole calls; all threads
//           (cp.async) for scores, narrow tiles, rows in caches and windows.
// Traffic   as there. A tile of 128 x 256 reads 48 KB from L2 for 4.2 MFLOP, which is expected to bind; two blocks with
//           the same columns and neighbouring strips of a chunk share those of the wide operand: 32 KB each. The last
//           two slabs of the longer strip are its own.
// Numerics  as there, but for the order of dv and dk by tensor copies: the queries shared with the partner, then the
//           strip's own first ones. Which strips are partners depends on where chunks begin in the call.
// Limits    bfloat16 and float16, S and E in packs of 8, more than 64 queries in a chunk; else chunk_attention.cu.
#include "core/wgmma.cuh"
#include "ops/chunk_attention_bulk.cuh"
#include "ops/chunk_attention_wgmma.cuh"

namespace megalodon::cuda {
namespace {

// Calls f(type of the numbers, tile of scores, tile of products), the latter as wide as rows of `columns` ask for.
template <class F>
void visit_tiles(DType dtype, int64_t columns, F&& f) {
  const auto visit = [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Tile = WgmmaTile<T, 128>;
    if (columns > 128) return f(tag, TypeTag<Tile>{}, TypeTag<WgmmaTile<T, 256>>{});
    f(tag, TypeTag<Tile>{}, TypeTag<Tile>{});
  };
  dtype == DType::kBfloat16 ? visit(TypeTag<bf16>{}) : visit(TypeTag<f16>{});
}

}  // namespace

void chunk_attention_wgmma_forward(const ChunkAttentionForward& args, void* stream) {
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
  visit_tiles(args.dtype, args.E > args.S ? args.E : args.S, [&](auto type, auto tile, auto product) {
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
