// chunk_attention on the GPU. Not yet run on a GPU.
//
// Computes  softmax attention inside chunks and its gradients (ops/chunk_attention.h); arXiv 2404.08801.
// Layout    q, k, v, o (B, L, H, S or E): the rows of a head are H S (H E) apart; caches (B, C, H, S or E) likewise;
//           lse, D (B, H, L). The scratch holds strips of tiles of weights: forward, a tile of queries with all keys
//           before it, and the maximum and sum of the rows of every tile; backward, a tile of keys with all queries
//           after it, P and dS. As many strips as the scratch has room for make a round.
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
//           by multiply-adds. dq of a chunk whose strips do not fit into the scratch together is summed over rounds in
//           the workspace.
#include "core/reduce.cuh"
#include "ops/chunk_attention.h"
#include "ops/chunk_attention_tiles.cuh"

namespace megalodon::cuda {
namespace {

// The strips of a round: of `heads` chunks of heads from `head` on, the `tiles` tiles from `tile` on.
struct Round {
  int64_t head, heads, tile, tiles;

  DEVICE int64_t strip() const { return blockIdx.z * tiles + blockIdx.y; }
  DEVICE Chunk chunk(const ChunkAttention& args) const {
    const int64_t index = head + blockIdx.z;
    return chunk_of(args, index / args.chunks, index % args.chunks);
  }
};

// Calls round(Round) until all strips have been visited: of several heads each, or, where they do not fit, of a part
// of one head.
template <class Body>
void for_rounds(int64_t heads, int64_t tiles, int64_t strips, Body&& body) {
  constexpr int64_t kMaxHeads = 65535;  // of a grid's z
  const int64_t together = strips / tiles < 1 ? 1 : strips / tiles < kMaxHeads ? strips / tiles : kMaxHeads;
  const int64_t most = strips < tiles ? strips : tiles;
  for (int64_t head = 0; head < heads; head += together) {
    for (int64_t tile = 0; tile < tiles; tile += most) {
      body(Round{head, heads - head < together ? heads - head : together, tile,
                 tiles - tile < most ? tiles - tile : most});
    }
  }
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Of a kernel side by side on a multiprocessor: 2 where registers for that are not too few.
template <class T, class Tile, bool kPacked>
constexpr int kBlocks = kPacked && sizeof(T) < 8 && (Tile::kTile == 64 || sizeof(T) == 2) ? 2 : 1;

char* aligned(void* workspace) {
  return reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(workspace), kAlignment));
}

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
    key_tiles = ceil_div(keys_of_chunk(args.L, args.C, args.cached), kTile);
    const int64_t rows = key_tiles * kTile;
    strips = args.scratch / (rows * (kTile * int64_t{sizeof(typename Tile::Weight)} + 2 * kParts * int64_t{sizeof(A)}));
    weights = reinterpret_cast<typename Tile::Weight*>(aligned(args.workspace));
    maxima = reinterpret_cast<A*>(weights + strips * rows * kTile);
    sums = maxima + strips * rows * kParts;
  }
};

// Block (key tile, query tile, head).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_weigh_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  const Chunk chunk = round.chunk(args);
  const ScoreTile at{chunk, chunk.first + (round.tile + blockIdx.y) * kTile, int64_t{blockIdx.x} * kTile};
  if (!at.any(kTile)) return;
  const Rows<const T> queries(args, chunk, static_cast<const T*>(args.q), nullptr, args.S);
  const Rows<const T> keys(args, chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache), args.S);
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, args.S, RowsOperand<T, V, true>{queries, at.query, chunk.keys, 0, args.S},
           RowsOperand<T, V, true>{keys, at.key, chunk.keys, 0, args.S});
  hide_keys(tile, args, at);
  const int64_t index = round.strip() * scratch.key_tiles + blockIdx.x;
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
  typename Tile::Weight* weights = scratch.weights + index * kTile * kTile;
  tile.template for_packs<typename Tile::Weight>(
      [&](int r, int c, const auto& pack) { store(weights + r * kTile + c, pack); });
}

// Block (tile of columns of o, query tile, head). The first one of the columns also writes lse.
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_forward_kernel(ChunkAttentionForward args, Round round, ForwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  SHARED(A, maximum, [kTile]);
  SHARED(A, inverse, [kTile]);
  const Chunk chunk = round.chunk(args);
  // The longest rows first.
  const int64_t strip = blockIdx.z * round.tiles + round.tiles - 1 - blockIdx.y;
  const int64_t query = chunk.first + (round.tile + round.tiles - 1 - blockIdx.y) * kTile;
  if (query >= chunk.keys) return;
  const int64_t end = query + kTile < chunk.keys ? query + kTile : chunk.keys;
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
    inverse[threadIdx.x] = sum == 0 ? A(0) : A(1) / sum;
    const int64_t place = query + threadIdx.x;
    if (blockIdx.x == 0 && place < end) {
      static_cast<A*>(args.lse)[(chunk.b * args.H + chunk.h) * args.L + chunk.token + place] = best + log(sum);
    }
  }
  sync_block();  // the rows' maxima and sums are there
  const Rows<const T> values(args, chunk, static_cast<const T*>(args.v), static_cast<const T*>(args.v_cache), args.E);
  const RescaledWeightsOperand<Tile> weights{
      {scratch.weights + strip * scratch.key_tiles * kTile * kTile, kTile * kTile}, maxima, maximum};
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, end, weights, RowsOperand<T, V, false>{values, 0, chunk.keys, column, args.E});
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) tile.sum[r][c] *= inverse[Tile::row(r)];
  }
  const Rows<T> o(args, chunk, static_cast<T*>(args.o), nullptr, args.E);
  write_rows<kPacked>(tile, o, query, end, column, args.E);
}

template <class T, class Tile, bool kPacked>
void forward(const ChunkAttentionForward& args, void* stream) {
  const ForwardScratch<Tile> scratch(args);
  const int64_t tiles = ceil_div(queries_of_chunk(args.L, args.C), Tile::kTile);
  // One block even where E is 0, since it writes lse.
  const auto columns = static_cast<unsigned>(args.E == 0 ? 1 : ceil_div(args.E, Tile::kTile));
  for_rounds(args.B * args.H * args.chunks, tiles, scratch.strips, [&](const Round& round) {
    const auto y = static_cast<unsigned>(round.tiles), z = static_cast<unsigned>(round.heads);
    launch(
        {"chunk_attention_weigh", dim3(static_cast<unsigned>(scratch.key_tiles), y, z), dim3(kTileThreads), 0, stream},
        chunk_attention_weigh_kernel<T, Tile, kPacked>, args, round, scratch);
    launch({"chunk_attention_forward", dim3(columns, y, z), dim3(kTileThreads), 0, stream},
           chunk_attention_forward_kernel<T, Tile, kPacked>, args, round, scratch);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class Tile>
struct BackwardScratch {
  using A = typename Tile::Sum;
  typename Tile::Weight* P;   // [strips, query_tiles, kTile, kTile]
  typename Tile::Weight* dS;  // likewise
  A* D;                       // [B, H, L]
  A* dq;                      // [B, L, H, S], what earlier rounds have summed
  int64_t query_tiles, strips;

  BackwardScratch(const ChunkAttentionBackward& args) {
    constexpr int64_t kTile = Tile::kTile;
    query_tiles = ceil_div(queries_of_chunk(args.L, args.C), kTile);
    const int64_t strip = query_tiles * kTile * kTile;
    strips = strip == 0 ? 0 : args.scratch / (2 * strip * int64_t{sizeof(typename Tile::Weight)});
    P = reinterpret_cast<typename Tile::Weight*>(aligned(args.workspace));
    dS = P + strips * strip;
    D = reinterpret_cast<A*>(aligned(args.workspace) + args.scratch);
    dq = D + round_up(args.B * args.H * args.L, 4);
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) clear_kernel(T* x, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * kTileThreads;
  for (int64_t i = int64_t{blockIdx.x} * kTileThreads + threadIdx.x; i < n; i += step) x[i] = T{};
}

template <class T>
void clear(void* x, int64_t n, void* stream) {
  if (n == 0) return;
  const int64_t blocks = ceil_div(n, 4 * kTileThreads);
  launch({"chunk_attention_clear", dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535)), dim3(kTileThreads), 0,
          stream},
         clear_kernel<T>, static_cast<T*>(x), n);
}

// D = sum over e of do o: a warp per token and head.
template <class T, int V>
__global__ void __launch_bounds__(kTileThreads)
    chunk_attention_dot_kernel(const T* dout, const T* o, stat_t<T>* D, int64_t B, int64_t L, int64_t H, int64_t E) {
  using A = stat_t<T>;
  constexpr int kWarps = kTileThreads / 32;
  const int64_t rows = B * L * H, step = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < rows; row += step) {
    A sum = 0;
    for (int64_t e = threadIdx.x % 32 * V; e < E; e += 32 * V) {
      const Pack<T, V> x = load<V>(dout + row * E + e), y = load<V>(o + row * E + e);
      UNROLL
      for (int i = 0; i < V; ++i) sum += widen(x.v[i]) * widen(y.v[i]);
    }
    sum = warp_sum(sum);
    const int64_t b = row / H / L, t = row / H % L, h = row % H;
    if (threadIdx.x % 32 == 0) D[(b * H + h) * L + t] = sum;
  }
}

// Block (query tile, key tile, head).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_weigh_backward_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  using Weight = typename Tile::Weight;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  const Chunk chunk = round.chunk(args);
  const ScoreTile at{chunk, chunk.first + int64_t{blockIdx.x} * kTile, (round.tile + blockIdx.y) * kTile};
  if (!at.any(kTile)) return;
  const Rows<const T> queries(args, chunk, static_cast<const T*>(args.q), nullptr, args.S);
  const Rows<const T> keys(args, chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache), args.S);
  const Rows<const T> douts(args, chunk, static_cast<const T*>(args.dout), nullptr, args.E);
  const Rows<const T> values(args, chunk, static_cast<const T*>(args.v), static_cast<const T*>(args.v_cache), args.E);
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, args.S, RowsOperand<T, V, true>{queries, at.query, chunk.keys, 0, args.S},
           RowsOperand<T, V, true>{keys, at.key, chunk.keys, 0, args.S});
  hide_keys(tile, args, at);
  const A infinity = static_cast<A>(INFINITY);
  const int64_t statistics = (chunk.b * args.H + chunk.h) * args.L + chunk.token + at.query;
  const int64_t rows = chunk.keys - at.query;
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row(r);
    A shift = row < rows ? static_cast<const A*>(args.lse)[statistics + row] : infinity;
    if (shift == -infinity) shift = infinity;  // a query without keys
    UNROLL
    for (int c = 0; c < Tile::kColumns; ++c) {
      const A score = tile.sum[r][c];
      tile.sum[r][c] = score == -infinity ? A(0) : exp(score - shift);
    }
  }
  const int64_t offset = (round.strip() * scratch.query_tiles + blockIdx.x) * kTile * kTile;
  Weight* P = scratch.P + offset;
  Weight* dS = scratch.dS + offset;
  tile.template for_packs<Weight>([&](int r, int c, const auto& pack) { store(P + r * kTile + c, pack); });
  sync_warp();  // the weights are there: lanes that share a row have stored each other's
  tile.clear();
  multiply(tile, slabs, 0, args.E, RowsOperand<T, V, true>{douts, at.query, chunk.keys, 0, args.E},
           RowsOperand<T, V, true>{values, at.key, chunk.keys, 0, args.E});
  UNROLL
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row(r);
    const A D = row < rows ? scratch.D[statistics + row] : A(0);
    UNROLL
    for (int c = 0; c < Tile::kColumns; c += Tile::kRun) {
      // Back from memory: the registers had to hold the second product.
      const auto weights = load<Tile::kRun>(P + row * kTile + Tile::column(c));
      UNROLL
      for (int i = 0; i < Tile::kRun; ++i) {
        const A p = widen(weights.v[i]);
        tile.sum[r][c + i] = p == 0 ? p : p * (tile.sum[r][c + i] - D);
      }
    }
  }
  tile.template for_packs<Weight>([&](int r, int c, const auto& pack) { store(dS + r * kTile + c, pack); });
}

// Block (tile of columns of dv, then of dk; key tile, head).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, Tile, kPacked>)
    chunk_attention_dkv_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch) {
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  const Chunk chunk = round.chunk(args);
  const int64_t key = (round.tile + blockIdx.y) * kTile;
  if (key >= chunk.keys || chunk.queries() == 0) return;
  const int64_t value_tiles = ceil_div(args.E, kTile);
  const bool is_value = blockIdx.x < value_tiles;
  const int64_t column = (is_value ? blockIdx.x : blockIdx.x - value_tiles) * kTile,
                columns = is_value ? args.E : args.S;
  const Rows<const T> rows(args, chunk, static_cast<const T*>(is_value ? args.dout : args.q), nullptr, columns);
  const WeightsOperand<Tile, false> weights{
      (is_value ? scratch.P : scratch.dS) + round.strip() * scratch.query_tiles * kTile * kTile, kTile * kTile};
  // From the tile of the first query that sees a key.
  const int64_t begin = key <= chunk.first ? 0 : (key - chunk.first) / kTile * kTile;
  Tile tile;
  tile.clear();
  multiply(tile, slabs, begin, chunk.queries(), weights,
           RowsOperand<T, V, false>{rows, chunk.first, chunk.keys, column, columns});
  const Rows<T> out(args, chunk, static_cast<T*>(is_value ? args.dv : args.dk),
                    static_cast<T*>(is_value ? args.dv_cache : args.dk_cache), columns);
  write_rows<kPacked>(tile, out, key, chunk.keys, column, columns);
}

// Block (query tile, tile of columns of dq, head).
template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(kTileThreads, Tile::kTile == 64 ? kBlocks<T, Tile, kPacked> : 1)
    chunk_attention_dq_kernel(ChunkAttentionBackward args, Round round, BackwardScratch<Tile> scratch) {
  using A = typename Tile::Sum;
  constexpr int kTile = Tile::kTile, V = kPacked ? kPackOf<T> : 1;
  using Slabs = typename Tile::Slabs;
  SHARED(Slabs, slabs);
  const Chunk chunk = round.chunk(args);
  const int64_t query_tile = gridDim.x - 1 - blockIdx.x;  // the longest rows first
  const int64_t query = chunk.first + query_tile * kTile, key = round.tile * kTile;
  if (query >= chunk.keys) return;
  const int64_t queries_end = query + kTile < chunk.keys ? query + kTile : chunk.keys;
  if (key >= queries_end) return;
  const int64_t round_end = key + round.tiles * kTile;
  const int64_t end = round_end < queries_end ? round_end : queries_end;
  const int64_t column = int64_t{blockIdx.y} * kTile;
  const int64_t tile_stride = scratch.query_tiles * kTile * kTile;
  const WeightsOperand<Tile, true> weights{
      scratch.dS + blockIdx.z * round.tiles * tile_stride + query_tile * kTile * kTile, tile_stride};
  const Rows<const T> keys(args, chunk, static_cast<const T*>(args.k), static_cast<const T*>(args.k_cache), args.S);
  Tile tile;
  tile.clear();
  multiply(tile, slabs, 0, end - key, weights, RowsOperand<T, V, false>{keys, key, chunk.keys, column, args.S});
  const Rows<A> sums(args, chunk, scratch.dq, nullptr, args.S);  // used where a chunk takes several rounds
  if (key > 0) {                                                 // what earlier rounds have summed
    UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t place = query + Tile::row(r);
      UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const int64_t s = column + Tile::column(c);
        if (place < queries_end && s < args.S) tile.sum[r][c] += sums.row(place)[s];
      }
    }
  }
  if (end < queries_end) {
    write_rows<kPacked>(tile, sums, query, queries_end, column, args.S);
  } else {
    const Rows<T> dq(args, chunk, static_cast<T*>(args.dq), nullptr, args.S);
    write_rows<kPacked>(tile, dq, query, queries_end, column, args.S);
  }
}

template <class T, class Tile, bool kPacked>
void backward(const ChunkAttentionBackward& args, void* stream) {
  constexpr int V = kPacked ? kPackOf<T> : 1;
  const BackwardScratch<Tile> scratch(args);
  const int64_t row_blocks = ceil_div(args.B * args.L * args.H, kTileThreads / 32);
  launch({"chunk_attention_dot", dim3(static_cast<unsigned>(row_blocks < 65535 ? row_blocks : 65535)),
          dim3(kTileThreads), 0, stream},
         chunk_attention_dot_kernel<T, V>, static_cast<const T*>(args.dout), static_cast<const T*>(args.o), scratch.D,
         args.B, args.L, args.H, args.E);
  const int64_t tiles = ceil_div(keys_of_chunk(args.L, args.C, args.cached), Tile::kTile);
  const auto query_tiles = static_cast<unsigned>(scratch.query_tiles);
  const auto key_columns = static_cast<unsigned>(ceil_div(args.S, Tile::kTile));
  const auto columns = static_cast<unsigned>(ceil_div(args.E, Tile::kTile)) + key_columns;
  for_rounds(args.B * args.H * args.chunks, tiles, scratch.strips, [&](const Round& round) {
    const auto y = static_cast<unsigned>(round.tiles), z = static_cast<unsigned>(round.heads);
    const dim3 block(kTileThreads);
    launch({"chunk_attention_weigh_backward", dim3(query_tiles, y, z), block, 0, stream},
           chunk_attention_weigh_backward_kernel<T, Tile, kPacked>, args, round, scratch);
    if (columns > 0) {
      launch({"chunk_attention_dkv", dim3(columns, y, z), block, 0, stream},
             chunk_attention_dkv_kernel<T, Tile, kPacked>, args, round, scratch);
    }
    if (key_columns > 0) {
      launch({"chunk_attention_dq", dim3(query_tiles, key_columns, z), block, 0, stream},
             chunk_attention_dq_kernel<T, Tile, kPacked>, args, round, scratch);
    }
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
    if (gpu_tile(args.dtype, queries_of_chunk(args.L, args.C)) > 64) return f(TypeTag<Large>{}, std::true_type{});
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
  if (args.B * args.L * args.H == 0) return;
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
      clear<T>(args.dk_cache, args.B * args.C * args.H * args.S, stream);
      clear<T>(args.dv_cache, args.B * args.C * args.H * args.E, stream);
    }
    if (args.B * args.L * args.H == 0) return;
    const bool is_aligned =
        is_packed<T>(args, args.dout, args.o, args.dq, args.dk, args.dv, args.dk_cache, args.dv_cache);
    visit_tile<T>(args, is_aligned,
                  [&](auto tile, auto packed) { backward<T, typename decltype(tile)::type, packed()>(args, stream); });
  });
}

}  // namespace megalodon::cuda
