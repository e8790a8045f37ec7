// timestep_norm backward: the adjoints of the recurrence, and the kernels.
#pragma once

#include "core/look_back.cuh"
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "core/scan.cuh"
#include "ops/timestep_norm_tile.cuh"

namespace megalodon::cuda {
namespace {

// The adjoints over the count: aM / n and aV / n.
struct Adjoints {
  double mean, var;
};

// What steps do to the adjoints: var loses `lost`; mean gains `gained` and loses e times the var before them.
struct Change {
  double e, lost, gained;
};

DEVICE Adjoints apply(const Adjoints& a, const Change& change) {
  return {a.mean - change.e * a.var + change.gained, a.var - change.lost};
}

DEVICE Change join(const Change& a, const Change& b) {
  return {a.e + b.e, a.lost + b.lost, a.gained + b.gained + b.e * a.lost};
}

DEVICE Change fold(const Change& lane) { return shuffle_all(warp_scan(lane, join), 31); }

// Of a sequence, the unpadded steps before each of its tiles and behind the last.
DEVICE int64_t first_count(const Sequences& sequences, int64_t i) { return sequences.first_piece(i, kSteps) + i; }
DEVICE int64_t tiles_of(int64_t steps) { return steps <= kSteps ? 1 : ceil_div(steps, kSteps); }

// A block per sequence, a thread per tile.
template <class Count>
__global__ void __launch_bounds__(1024)
    timestep_norm_count_kernel(const uint8_t* mask, Sequences sequences, Count* all_counts) {
  SHARED(double, sums, [32]);
  const int64_t first = sequences.begin(blockIdx.x), last = sequences.end(blockIdx.x), tiles = tiles_of(last - first);
  Count* counts = all_counts + first_count(sequences, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  double before = 0;
  for (int64_t start = 0; start <= tiles; start += blockDim.x) {
    const int64_t tile = start + threadIdx.x;
    const int64_t begin = first + tile * kSteps;
    const int64_t end = begin + kSteps < last ? begin + kSteps : last;
    double count = 0;
    for (int64_t t = begin; t < end; ++t) count += mask[t] == 0;
    const double scan = warp_scan(count, [](double x, double y) { return x + y; });
    if (lane_index() == 31) sums[warp] = scan;
    sync_block();  // every warp's sum is there
    double warps_before = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
      if (w == warp) warps_before = before;
      before += sums[w];
    }
    if (tile <= tiles) counts[tile] = static_cast<Count>(warps_before + scan - count);
    sync_block();  // the sums may be overwritten
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    timestep_norm_backward_kernel(TimestepNormBackward args, Plan plan, TimestepNormBackwardRoom room) {
  using A = stat_t<T>;
  constexpr int kColumns = 32 * V;  // of a chunk, padded to whole groups
  SHARED(A, shift, [32][kRow]);     // r sum(u), then what dx is at x = M'; of the unpadded steps in order
  SHARED(A, slope, [32][kRow]);     // r^3 sum(u (x - M')), then what dx gains with x - M'
  SHARED(A, drift, [32][kRow]);     // mu - M'
  using Packs = Pack<T, V>;
  SHARED(Packs,
         held, [kHeld][kThreads]);  // x; then, when it is done with, sums of dweight and dbias: [2][kWarps][kColumns]
  static_assert(sizeof held >= 2 * kWarps * kColumns * sizeof(A));
  A* const columns = reinterpret_cast<A*>(held);
  auto* memory = static_cast<char*>(args.workspace);
  const Tile& tile = take_ticket(reinterpret_cast<uint32_t*>(memory),
                                 [&](uint32_t ticket) { return Tile::of(plan, args.sequences, ticket, true); });
  // The sums of dweight and dbias that the tile adds to, and when.
  const int parts = static_cast<int>(room.parts);
  const int part = tile.number % parts;
  const auto turn = static_cast<uint32_t>(tile.number / parts);
  uint32_t* const turns = reinterpret_cast<uint32_t*>(memory + room.turns) + tile.slice * room.parts + part;
  if (!tile.is_piece) {
    tile.publish_nothing(memory + room.slots, plan, args.G);
    if (threadIdx.x > 0) return;
    while (load_acquire(turns) != turn) {
    }
    return store_release(turns, turn + 1);
  }
  const Work work(plan, tile, args.padding_mask);
  const bool exists = work.group < args.G;
  const bool leads = exists && work.lane_of_group == 0;

  Pack<T, V> x[kHeld];
  Pack<T, V> dy[kHeld];
  const auto size = static_cast<A>(plan.K);
  const auto* means = static_cast<const A*>(args.step_mean) + tile.first_row * args.G + work.group;
  const auto* rstds = static_cast<const A*>(args.step_rstd) + tile.first_row * args.G + work.group;
  const bool reads_again = plan.chunks > 1;
  const auto load_weight = [&](int64_t column, bool mine) {
    return mine ? load<V>(static_cast<const A*>(args.weight) + column) : Pack<A, V>{};
  };
  A u_sums[kHeld] = {};
  A product_sums[kHeld] = {};
  A sums[kHeld] = {};
  for_chunks<V>(plan, work, exists, [&](int64_t, int64_t column, bool mine) {
    load_steps(x, args.x, work, args.D, column, mine);
    load_steps(dy, args.dy, work, args.D, column, mine);
    const Pack<A, V> weight = load_weight(column, mine);
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      held[p][threadIdx.x] = x[p];
      if (!mine || !work.has(p)) continue;
      const A mean = means[work.step(p) * args.G];
      UNROLL
      for (int j = 0; j < V; ++j) {
        const A g = widen(dy[p].v[j]);
        const A d = widen(x[p].v[j]) - mean;
        const A u = g * weight.v[j] + g;
        u_sums[p] += u;
        product_sums[p] += u * d;
        sums[p] += d;
      }
    }
  });
  add_lanes(u_sums, plan.lanes);
  add_lanes(product_sums, plan.lanes);
  add_lanes(sums, plan.lanes);
  UNROLL
  for (int p = 0; p < kHeld; ++p) {
    if (!leads || !work.has(p)) continue;
    const int rank = work.rank(work.step(p));
    const A r = rstds[work.step(p) * args.G];
    shift[work.group_of_slice][rank] = r * u_sums[p];
    slope[work.group_of_slice][rank] = r * product_sums[p] * r * r;  // in an order in which 0 stays 0
    drift[work.group_of_slice][rank] = sums[p] / size;
  }
  sync_block();  // every step's sums are there

  const int count = count_bits(work.steps);
  const int64_t start = args.count == nullptr ? 0 : args.count[tile.sequence];
  const int64_t first_row = args.sequences.begin(tile.sequence);
  int64_t before = tile.first_row - first_row;
  int64_t total = args.sequences.end(tile.sequence) - first_row;
  if (args.padding_mask != nullptr) {
    const auto* counts =
        reinterpret_cast<const int64_t*>(memory + room.counts) + first_count(args.sequences, tile.sequence);
    before = counts[before / kSteps];
    total = counts[tiles_of(total)];
  }
  const double last_n = start + total > 0 ? static_cast<double>(start + total) : 1;
  for (int i = work.warp; i < plan.groups; i += kWarps) {
    const int g = tile.slice * plan.groups + i;
    if (g >= args.G) break;
    const int64_t state = tile.sequence * args.G + g;
    const bool some = work.lane < count;
    const int rank = some ? count - 1 - work.lane : 0;  // the last step first
    Change step = {};
    if (some) {
      const double n = static_cast<double>(start + before + rank + 1);
      const double per_step = 1 / n;
      step.e = n > 1 ? 2 * drift[i][rank] / (n - 1) : 0;  // mu - M' is 0 at the first step, but for rounding
      step.lost = slope[i][rank] * (0.5 * per_step);
      step.gained = step.e * step.lost - shift[i][rank] * per_step;
    }
    const Change steps = warp_scan(step, join);
    const Change all = shuffle_all(steps, 31);
    const auto given = [&] {
      Adjoints last = {};
      if (args.dmean != nullptr) last.mean = static_cast<const A*>(args.dmean)[state] / last_n;
      if (args.dvar != nullptr) last.var = static_cast<const A*>(args.dvar)[state] / last_n;
      return last;
    };
    Slot* const chain = tile.slots_of(memory + room.slots, plan, args.G, g);
    const Adjoints later = look_back(chain, plan.tiles, tile.first, tile.tile, all, given, fold, apply);
    if (some) {
      const Adjoints a = apply(later, steps);
      shift[i][rank] = static_cast<A>(a.mean + step.e * a.var) / size;
      slope[i][rank] = static_cast<A>(2 * a.var) / size;
    }
    if (work.lane > 0 || !tile.is_last || args.dmean0 == nullptr) continue;
    const Adjoints first = apply(later, all);
    const double first_n = start + total > 0 ? static_cast<double>(start) : 1;
    static_cast<A*>(args.dmean0)[state] = static_cast<A>(first_n * first.mean);
    static_cast<A*>(args.dvar0)[state] = static_cast<A>(first_n * first.var);
  }
  sync_block();  // shift and slope are there

  for_chunks<V>(plan, work, exists, [&](int64_t c, int64_t column, bool mine) {
    if (reads_again) load_steps(dy, args.dy, work, args.D, column, mine);
    const Pack<A, V> weight = load_weight(column, mine);
    Pack<A, V> dweight = {};
    Pack<A, V> dbias = {};
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      const int step = work.step(p);
      hold_packed(dy[p]);
      if (!mine || step >= tile.length) continue;
      Pack<T, V> dx = {};
      const int64_t at = (tile.first_row + step) * args.D + column;
      if (work.has(p)) {
        const Pack<T, V> again = reads_again ? load<V>(static_cast<const T*>(args.x) + at) : held[p][threadIdx.x];
        const A mean = means[step * args.G];
        const int rank = work.rank(step);
        const A rise = shift[work.group_of_slice][rank];
        const A gain = slope[work.group_of_slice][rank];
        const A rstd = rstds[step * args.G];
        UNROLL
        for (int j = 0; j < V; ++j) {
          const A g = widen(dy[p].v[j]);
          const A d = widen(again.v[j]) - mean;
          const A scaled = g * rstd;
          dx.v[j] = narrow<T>(scaled * weight.v[j] + (scaled + (gain * d + rise)));
          dweight.v[j] += scaled * d;
          dbias.v[j] += g;
        }
      }
      store(static_cast<T*>(args.dx) + at, dx);
    }
    sync_block();  // all threads are done with x
    store(columns + work.warp * kColumns + work.lane * V, dweight);
    store(columns + (kWarps + work.warp) * kColumns + work.lane * V, dbias);
    if (c == 0 && threadIdx.x == 0) {
      while (load_acquire(turns) != turn) {
      }
    }
    sync_block();  // the warps' sums are there, and it is this tile's turn
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kColumns; i += kThreads) {
      const int of_chunk = i % kColumns / V;
      const int64_t g = tile.slice * plan.groups + of_chunk / plan.lanes;
      const int64_t unit = c * plan.lanes + of_chunk % plan.lanes;
      if (g >= args.G || unit >= plan.units) continue;
      A sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += columns[(i / kColumns * kWarps + w) * kColumns + i % kColumns];
      A* total_sum = reinterpret_cast<A*>(memory + room.sums) + (i / kColumns * room.parts + part) * args.D +
                     g * plan.K + unit * V + i % V;
      *total_sum = turn == 0 ? sum : *total_sum + sum;
    }
    sync_block();  // the part has them, and they may be overwritten
  });
  if (threadIdx.x == 0) store_release(turns, turn + 1);
}

}  // namespace
}  // namespace megalodon::cuda
