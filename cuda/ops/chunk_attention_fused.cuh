// chunk_attention in one pass, for narrow heads: weights go from one product to the next in registers, and none to
// memory. What forward and backward share: a block owns 128 rows of one or two tensors, queries or keys, and two others
// move past them, slab by slab; which rows there are is in shared memory.
#pragma once

#include "ops/chunk_attention_bulk.cuh"

namespace megalodon::cuda {
namespace {

// `owned` tensors whose rows a block owns; slabs of `rows` rows of the others; heads of at most `width` numbers.
// `lag`: so many slabs later than the first moving tensor's the second one's is needed. has_statistics: with a slab
// come lse and D of its rows, which are queries.
template <class T, int width, int owned, int rows, int stages, int lag, bool has_statistics>
struct FusedPlan {
  using Number = T;
  static constexpr int kWidth = width, kRows = 128, kMoving = rows, kParts = width / 64, kStages = stages, kLag = lag;
  static constexpr bool kOfKeys = has_statistics;
  static constexpr int kBringing = has_statistics ? 32 : 1;  // threads
  using Scores = WgmmaSums<rows>;
  using Out = WgmmaSums<width>;
  template <int kRowsOfSlab>
  struct alignas(1024) Slab {  // 64 columns a part
    T v[kParts][kRowsOfSlab * 64];

    DEVICE void copy(const TensorMap& map, int h, int64_t row, Barrier& barrier) {
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        tensor_copy(v[part], map, part * 64, h, static_cast<int>(row), barrier);
      }
    }
  };
  struct Shared {
    Slab<kRows> own[owned];
    Slab<kMoving> moving[2][kStages];
  };
  struct Statistics {
    float lse[kMoving], D[kMoving];
  };
  struct Maps {
    TensorMap own[owned], moving[2];
  };
};

// 128 rows of a chunk from `place` on, and those that they meet; in numbers of 32 bits, for there are many.
struct FusedWork {
  int sequence, h, token, end, place;
  uint32_t start;
  int64_t statistic;

  static DEVICE FusedWork of(const Strips::Strip& strip) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    const Chunk& c = strip.chunk;
    return {c.sequence, c.h, narrow(c.token), narrow(c.end), narrow(strip.place), c.start, c.statistic};
  }
  DEVICE Chunk chunk() const {
    Chunk chunk{};
    chunk.sequence = sequence, chunk.h = h;
    chunk.keys = chunk.end = end;
    chunk.token = token, chunk.statistic = statistic, chunk.start = start;
    return chunk;
  }
  // The first row of those, and how many slabs of them there are; 0: there is no such strip.
  template <class Plan>
  DEVICE int begin() const {
    return Plan::kOfKeys ? place : 0;
  }
  template <class Plan>
  DEVICE int slabs() const {
    const int after = place + Plan::kRows < end ? place + Plan::kRows : end, last = Plan::kOfKeys ? end : after;
    return place < end ? (last - begin<Plan>() + Plan::kMoving - 1) / Plan::kMoving : 0;
  }
};

// In which order blocks take strips: a long one and the one that is as short, so that blocks have as much to do, chunk
// by chunk, so that what moves in them stays in the L2 cache. Of packed rows all strips are taken for one chunk's.
struct FusedOrder {
  static constexpr uint32_t kMostPairs = 32;  // of a block
  Strips strips;
  uint32_t tiles, pairs, blocks;  // strips of a chunk; all pairs

  static FusedOrder of(const ChunkAttention& args, int64_t rows, bool of_keys) {
    const Strips strips = Strips::of(args, rows, of_keys);
    const int64_t tiles = strips.overlap() ? strips.count : strips.tiles;
    const int64_t pairs = strips.count / tiles * ceil_div(tiles, int64_t{2});
    const int64_t resident = multiprocessors() < pairs ? multiprocessors() : pairs;
    const int64_t enough = ceil_div(pairs, int64_t{kMostPairs});
    const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
    return {strips, number(tiles), number(pairs), number(resident > enough ? resident : enough)};
  }
  MEGALODON_HOST_DEVICE int works() const { return static_cast<int>(2 * ceil_div(pairs, blocks)); }
  // The block's n-th one, perhaps an empty one: of queries a chunk's last strip is the longest one, of keys the first.
  DEVICE FusedWork at(const ChunkAttention& args, int n) const {
    const uint32_t pair = n / 2 * blocks + blockIdx.x, in_chunk = (tiles + 1) / 2, index = pair % in_chunk;
    const bool is_last = (n % 2 == 0) != strips.of_keys, is_single = 2 * index + 1 == tiles;
    if (pair >= pairs || (is_single && n % 2 == 1)) return {};
    return FusedWork::of(strips.at(args, pair / in_chunk * int64_t{tiles} + (is_last ? tiles - 1 - index : index)));
  }
};

// Which slabs are there and which have been read.
template <class Plan>
struct FusedState {
  static constexpr int kStages = Plan::kStages;
  struct Stage {  // use: how many slabs it has held before
    Barrier full, free;

    DEVICE void init(int bringing) {
      full.init(bringing);
      free.init(kTileThreads / 32);
    }
    DEVICE void wait_full(int use) { full.wait(use % 2); }
    DEVICE void wait_free(int use) { free.wait(1 - use % 2); }
    DEVICE void release() {
      sync_warp();  // all lanes have read
      if (threadIdx.x % 32 == 0) free.arrive();
    }
  };
  Stage own, moving[2][kStages], statistics[kStages];
  Barrier multiplying;  // of the threads that do
  int count;            // of works
  FusedWork works[2 * FusedOrder::kMostPairs];
  typename Plan::Statistics of_slab[Plan::kOfKeys ? kStages : 1];

  DEVICE void init() {
    own.init(1);
    for (int i = 0; i < kStages; ++i) {
      moving[0][i].init(1), moving[1][i].init(1);
      statistics[i].init(Plan::kBringing);
    }
    multiplying.init(kTileThreads);
    fence_barrier_init();
  }
  // Waits for the other threads that multiply, whose writes wgmma sees then. The barrier's second phase follows, so
  // that there is no need to know which one is next.
  DEVICE void publish() {
    fence_async_proxy();
    UNROLL
    for (int phase = 0; phase < 2; ++phase) {
      multiplying.arrive();
      multiplying.wait(phase);
    }
  }
};

// What a warp does, or one of its threads where there are no statistics: brings rows in the order in which they are
// needed. lse, D: [B, H, L].
template <class Plan>
DEVICE void bring_fused(typename Plan::Shared& shared, FusedState<Plan>& state, const typename Plan::Maps& maps,
                        const float* lse, const float* D) {
  constexpr int kStages = Plan::kStages, kOwned = sizeof(shared.own) / sizeof(shared.own[0]);
  const int lane = static_cast<int>(threadIdx.x) - kTileThreads;
  int before = 0;  // slabs of earlier works
  for (int n = 0; n < state.count; ++n) {
    const FusedWork& work = state.works[n];
    const int slabs = work.slabs<Plan>(), first = work.token + work.begin<Plan>();
    state.own.wait_free(n);
    if constexpr (Plan::kBringing > 1) sync_warp();  // else the next phase could end before a lane has seen this one
    if (slabs == 0) {
      if (lane == 0) state.own.full.arrive();
      continue;
    }
    if (lane == 0) {
      state.own.full.expect(sizeof shared.own);
      UNROLL
      for (int i = 0; i < kOwned; ++i) shared.own[i].copy(maps.own[i], work.h, work.token + work.place, state.own.full);
    }
    const auto bring = [&](int tensor, int i) {
      const int stage = (before + i) % kStages;
      auto& barriers = state.moving[tensor][stage];
      barriers.wait_free((before + i) / kStages);
      if (lane != 0) return;
      barriers.full.expect(sizeof shared.moving[0][0]);
      shared.moving[tensor][stage].copy(maps.moving[tensor], work.h, first + i * Plan::kMoving, barriers.full);
    };
    ROLL for (int i = 0; i < slabs + Plan::kLag; ++i) {
      if (i < slabs) bring(0, i);
      if (i >= Plan::kLag) bring(1, i - Plan::kLag);
      if constexpr (Plan::kOfKeys) {
        const int stage = (before + i) % kStages;
        state.statistics[stage].wait_free((before + i) / kStages);
        for (int j = lane; j < Plan::kMoving; j += 32) {
          const int query = work.begin<Plan>() + i * Plan::kMoving + j;
          const bool is_query = query < work.end;
          state.of_slab[stage].lse[j] = is_query ? lse[work.statistic + query] : INFINITY;
          state.of_slab[stage].D[j] = is_query ? D[work.statistic + query] : 0;
        }
        state.statistics[stage].full.arrive();
      }
    }
    before += slabs;
  }
}

// Zeros behind the chunk, where rows are another's, in the last slab of a moving tensor; are there any?
template <class Plan, class Slab>
DEVICE bool clear_rows(const FusedWork& work, Slab& slab) {
  const int left = work.end - work.begin<Plan>() - (work.slabs<Plan>() - 1) * Plan::kMoving;
  if (left >= Plan::kMoving) return false;
  constexpr int kPacks = Plan::kMoving * 8;
  ROLL for (int i = static_cast<int>(anew(threadIdx.x)); i < Plan::kParts * kPacks; i += kTileThreads) {
    if (i % kPacks / 8 >= left) store(slab.v[i / kPacks] + i % kPacks * 8, Pack<typename Plan::Number, 8>{});
  }
  return true;
}

// Begins sums = own rows times rows of a slab.
template <class Plan>
DEVICE void begin_scores(typename Plan::Scores& sums, const typename Plan::template Slab<Plan::kRows>& own,
                         const typename Plan::template Slab<Plan::kMoving>& slab) {
  using T = typename Plan::Number;
  constexpr int kLine = 128 / 16, kPattern = 1024;
  const uint64_t a = matrix_descriptor(own.v[0] + anew(threadIdx.x) / 128 * 64 * 64, 0, kPattern);
  const uint64_t b = matrix_descriptor(slab.v[0], 0, kPattern);
  wgmma_fence();
  UNROLL
  for (int part = 0; part < Plan::kParts; ++part) {
    UNROLL
    for (int step = 0; step < 4; ++step) {  // 32 bytes of a line
      if (part + step == 0) {
        wgmma<T, 0, 0, false>(sums.sum, a, b);
      } else {
        wgmma<T, 0, 0>(sums.sum, a + (part * Plan::kRows * kLine + step * 2),
                       b + (part * Plan::kMoving * kLine + step * 2));
      }
    }
  }
  wgmma_commit();
}

// Weights of a thread as an operand, 16 moving rows at a time.
template <class Plan>
struct FusedWeights {
  static constexpr int kPacks = Plan::kMoving / 16;
  uint32_t pairs[kPacks][4];

  // Pairs of neighbours among the scores, the first of row r and column c: f(r, c).
  template <class F>
  DEVICE void set_pairs(F&& f) {
    UNROLL
    for (int i = 0; i < kPacks; ++i) {
      UNROLL
      for (int j = 0; j < 4; ++j) pairs[i][j] = anew(f(j % 2, 4 * i + j / 2 * 2));  // now, not between the products
    }
  }
  DEVICE void set(const typename Plan::Scores& weights) {
    set_pairs(
        [&](int r, int c) { return bits_as<uint32_t>(narrow_run<typename Plan::Number, 2>(&weights.sum[r][c])); });
  }
  // Begins out += weights times rows of a slab; the group is not committed.
  DEVICE void begin_product(typename Plan::Out& out, const typename Plan::template Slab<Plan::kMoving>& slab) const {
    const uint64_t b = matrix_descriptor(slab.v[0], Plan::kMoving * 128, 1024);
    wgmma_fence();
    UNROLL
    for (int i = 0; i < kPacks; ++i) wgmma<typename Plan::Number, 1>(out.sum, pairs[i], b + i * 16 * 128 / 16);
  }
};

// Runs a block: one warp brings, the others multiply(work, before) for each of the block's works; before: the slabs of
// earlier ones. kMany: registers of a thread that multiplies; what it can read again it does not keep.
template <class Plan, int kMany, class Multiply>
DEVICE void run_fused(typename Plan::Shared& shared, FusedState<Plan>& state, const ChunkAttention& args,
                      const FusedOrder& order, const typename Plan::Maps& maps, const float* lse, const float* D,
                      Multiply&& multiply) {
  static_assert(!Plan::kOfKeys || Plan::kLag == 0);
  static_assert(sizeof(typename Plan::Shared) + (sizeof(FusedState<Plan>) + 1023) / 1024 * 1024 <= 227 * 1024);
  const int count = order.works();
  if (static_cast<int>(threadIdx.x) < count) state.works[threadIdx.x] = order.at(args, static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) {
    state.count = count;
    state.init();
  }
  sync_block();  // works and barriers are there
  if (threadIdx.x >= kTileThreads) {
    shrink_registers<3 * kBulkRegisters - 2 * kMany>();
    if (threadIdx.x < kTileThreads + Plan::kBringing) bring_fused<Plan>(shared, state, maps, lse, D);
    return;
  }
  grow_registers<kMany>();
  int before = 0;
  for (int n = 0; n < state.count; ++n) {
    const FusedWork& work = state.works[n];
    state.own.wait_full(n);
    if (work.slabs<Plan>() == 0) {
      state.own.release();
      continue;
    }
    multiply(work, before);
    before += work.slabs<Plan>();
  }
}

}  // namespace
}  // namespace megalodon::cuda
