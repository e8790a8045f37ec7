// chunk_attention on the GPU. Not yet run on a GPU.
//
// Computes  softmax attention inside chunks and its gradients (ops/chunk_attention.h); arXiv 2404.08801.
// Layout    q, k, v, o (B, L, H, S or E): the rows of a head are H S (H E) apart; caches (B, C, H, S or E) likewise;
//           lse, D (B, H, L). cu_seqlens: B = 1. The scratch holds strips of tiles of weights: forward, a tile of
//           queries with all keys before it, and the maximum and sum of the rows of every tile; backward, a tile of
//           keys with all queries after it, P and dS; sliding, with those of its windows. As many strips as the
//           scratch has room for make a round.
// Mapping   a block owns a tile of 64 x 64 or 128 x 128, by matrix instructions for bfloat16 and float16
//           (core/mma.cuh), else by multiply-adds (core/tile_product.cuh). Forward, per round: tiles of scores become
//           weights, each relative to its own rows' maxima; tiles of o are their products with v, the rows brought to
//           their common maxima. Backward, per round: tiles of P and dS; then of dv = P^T do and dk = dS^T q; then of
//           dq = dS k. Tiles above the diagonal are neither computed nor read, those below it know no mask. Scores are
//           computed once however wide E is, and every step has a block for every tile: S = 256, E = 2048, and B = 1,
//           fill the GPU.
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
#include "ops/chunk_attention_rounds.cuh"
#include "ops/chunk_attention_tiles.cuh"

namespace megalodon::cuda {
namespace {

// ---- forward --------------------------------------------------------------------------------------------------------

template <class Tile>
struct ForwardScratch {
  using A = typename Tile::Sum;
  typename Tile::Weight* weights;  // [strips, key_tiles, kTile, kTile]
  A* maxima;                       // [strips, key_tiles, parts, kTile]
  A* sums;                         // likewise
  int64_t key_tiles, strips;
  static constexpr int kParts = Tile::kTile / Tile::kRowColumns;  // of a row, each with its own maximum

  ForwardScratch(const ChunkAttentionForward& args) {
    constexpr int64_t kTile = Tile::kTile;
    key_tiles = Strips::of(args, kTile, false).partners;
    const int64_t rows = key_tiles * kTile;
    strips = args.scratch / (rows * (kTile * int64_t{sizeof(typename Tile::Weight)} + 2 * kParts * int64_t{sizeof(A)}));
    weights = reinterpret_cast<typename Tile::Weight*>(aligned(args.workspace));
    maxima = reinterpret_cast<A*>(weights + strips * rows * kTile);
    sums = maxima + strips * rows * kParts;
  }
};

// Block (key tile, strip).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_weigh_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  const auto [chunk, query] = round.at(args, blockIdx.y);
  const ScoreTile at{chunk, query, int64_t{blockIdx.x} * kTile};
  if (!at.any(kTile, args.C)) return;
  const QueryRows<const T> queries(args, chunk, static_cast<const T*>(args.q), args.S);
  const KeyRows<const T> keys(args, chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache), args.S);
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, args.S, operand_of<V, true>(queries, at.query, chunk.end, 0, args.S),
           operand_of<V, true>(keys, at.key, chunk.keys, 0, args.S));
  hide_keys(tile, args, at);
  const int64_t index = blockIdx.y * scratch.key_tiles + blockIdx.x;
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    A best = -static_cast<A>(INFINITY);
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) best = tile.sum[r][c] > best ? tile.sum[r][c] : best;
    UNROLL
    for (int bits = Tile::kRowLanes / 2; bits > 0; bits /= 2) {
      const A other = shuffle_xor(best, bits);
      best = other > best ? other : best;
    }
    // Weights that are stored as 16-bit numbers are relative to a power of two, so that rescaling them is exact.
    if constexpr (sizeof(typename Tile::Weight) < sizeof(A)) best = ceil(best * kLog2E) * kLn2;
    const A shift = best == -static_cast<A>(INFINITY) ? A(0) : best;  // nothing visible
    A sum = 0;
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) sum += tile.sum[r][c] = exp(tile.sum[r][c] - shift);
    UNROLL
    for (int bits = Tile::kRowLanes / 2; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
    if (threadIdx.x % Tile::kRowLanes == 0) {
      const int64_t part = index * scratch.kParts + Tile::column(0) / Tile::kRowColumns;
      scratch.maxima[part * kTile + Tile::row(r)] = best;
      scratch.sums[part * kTile + Tile::row(r)] = sum;
    }
  }
  if (args.drops_weights) set_dropped(tile, args, at, A(0));
  typename Tile::Weight* weights = scratch.weights + index * kTile * kTile;
  tile.template for_packs<typename Tile::Weight>(
      [&](int r, int c, const auto& pack) { store(weights + r * kTile + c, pack); });
}

// Where a block's tile of o lies: its first row, and how many rows there are.
template <class T>
struct Out {
  T* first;
  int rows;
};

// Block (tile of columns of o, strip). The first one of the columns also writes lse.
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_forward_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  SHARED(A, maximum, [kTile]);
  SHARED(A, inverse, [kTile]);
  SHARED(Out<T>, out);                                 // here the registers are those of the product
  const int64_t strip = round.count - 1 - blockIdx.y;  // of a chunk the longest rows first
  const auto [chunk, query] = round.at(args, strip);
  if (query >= chunk.end) return;
  const int64_t end = query + kTile < chunk.end ? query + kTile : chunk.end;
  if (threadIdx.x == 0) {
    out = {QueryRows<T>(args, chunk, static_cast<T*>(args.o), args.E).row(query), static_cast<int>(end - query)};
  }
  const int64_t column = int64_t{blockIdx.x} * kTile;
  const A* maxima = scratch.maxima + strip * scratch.key_tiles * scratch.kParts * kTile;
  const A* sums = scratch.sums + strip * scratch.key_tiles * scratch.kParts * kTile;
  if (threadIdx.x < kTile) {
    const A lowest = -static_cast<A>(INFINITY);
    A best = lowest;
    const int64_t parts = ceil_div(end, Tile::kRowColumns);
    for (int64_t part = 0; part < parts; ++part) {
      const A other = maxima[part * kTile + threadIdx.x];
      best = other > best ? other : best;
    }
    const A shift = best == lowest ? A(0) : best;
    A sum = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t i = part * kTile + threadIdx.x;
      sum += sums[i] * exp(maxima[i] - shift);
    }
    maximum[threadIdx.x] = shift;
    inverse[threadIdx.x] = sum == 0 ? A(0) : static_cast<A>(args.kept_scale) / sum;
    const int64_t place = query + threadIdx.x;
    if (blockIdx.x == 0 && place < end) {
      static_cast<A*>(args.lse)[chunk.statistic + place] = best + log(sum);
    }
  }
  sync_block();  // the rows' maxima and sums are there, and where o lies
  const KeyRows<const T> values(args, chunk, static_cast<const T*>(args.v), static_cast<const T*>(args.v_cache),
                                args.E);
  const RescaledWeightsOperand<Tile> weights{
      {scratch.weights + strip * scratch.key_tiles * kTile * kTile, kTile * kTile}, maxima, maximum};
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, end, weights, operand_of<V, false>(values, 0, chunk.keys, column, args.E));
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) tile.sum[r][c] *= inverse[Tile::row(r)];
  }
  write_rows<kPacked>(tile, QueryRows<T>{out.first, args.H * args.E}, 0, out.rows, column, args.E);
}

template <class T, class Tile, bool kPacked>
void forward(const ChunkAttentionForward& args, void* stream) {
  const ForwardScratch<Tile> scratch(args);
  // One block even where E is 0, since it writes lse.
  const auto columns = static_cast<unsigned>(args.E == 0 ? 1 : ceil_div(args.E, Tile::kTile));
  for_rounds(Strips::of(args, Tile::kTile, false), scratch.strips, [&](const Round& round) {
    const auto key_tiles = static_cast<unsigned>(scratch.key_tiles), y = static_cast<unsigned>(round.count);
    launch({"chunk_attention_weigh", dim3(key_tiles, y), dim3(kTileThreads), 0, stream},
           chunk_attention_weigh_kernel<T, Tile, kPacked>, args, round, scratch);
    launch({"chunk_attention_forward", dim3(columns, y), dim3(kTileThreads), 0, stream},
           chunk_attention_forward_kernel<T, Tile, kPacked>, args, round, scratch);
  });
}

// ---- plan -----------------------------------------------------------------------------------------------------------

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
    visit_tile<T>(args, is_packed<T>(args, args.o),
                  [&](auto tile, auto packed) { forward<T, typename decltype(tile)::type, packed()>(args, stream); });
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
    visit_tile<T>(args, is_aligned,
                  [&](auto tile, auto packed) { backward<T, typename decltype(tile)::type, packed()>(args, stream); });
  });
}

}  // namespace megalodon::cuda
