// timestep_norm on the GPU. Not yet run on a GPU.
//
// Computes  timestep norm (arXiv 2404.08801, as the released code has it) and its gradients (ops/timestep_norm.h).
// Layout    x, y, dy, dx (B, L, D); states (B, G); step_mean, step_rstd (B, L, G); mask (B, L); all compact.
// Mapping   a tile is 32 steps of as many groups as fill a warp with 16-byte packs (64 channels of bfloat16: 4 groups,
//           8 lanes each); a block of 8 warps is given one by ticket, a warp holds 4 of its steps. What the tiles
//           before it (backward: after it) do to the recurrence comes by a look-back (core/look_back.cuh), for which a
//           lane is a step and a warp a group; padded steps are left out. Then the steps are finished from registers.
//           Backward, a tile adds its sums of dweight and dbias to one of a few parts, which stay in L2; tiles of a
//           part take turns.
// Traffic   forward 2, backward 3 elements moved per element, 10 and 25 FLOPs; step_mean and step_rstd 8 bytes per
//           group; slots 32 bytes per group and tile, read up to 31 times from L2: memory-bound.
// Numerics  a step is measured from its group's first channel, then its variance from its mean, in float (double for
//           float64). The recurrences are in double, and sums: those of (mu - m) and s + (mu - m)^2 with m the mean of
//           the first of the steps added, which is one of them, so that at most a factor of their number (32, then
//           1024) cancels; whole windows are merged as in Welford's recurrence. Backward the adjoints over n, bM and
//           bV, for which aM, aV <- c1 ... becomes a sum: bV -= p, bM -= q + e bV with p = r^3 sum(u (x - M')) / (2 n),
//           q = r sum(u) / n, e = 2 (mu - M') / (n - 1). dweight, dbias: the parts are sums in float, added in order.
// Limits    2^31 tiles. Groups of no multiple of 16 bytes, or not so aligned, go element by element. Groups beyond 32
//           packs (256 channels of bfloat16) are read again: forward three times, backward twice.
#include "core/look_back.cuh"
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "core/scan.cuh"
#include "ops/timestep_norm.h"

namespace megalodon::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kHeld = 4;  // steps of a warp
constexpr int kSteps = kWarps * kHeld;
constexpr int kThreads = kWarps * 32;
constexpr int kRow = kSteps + 1;  // of shared memory: a group's values by step, and no bank conflicts
static_assert(kSteps == TimestepNormChains::kSteps && kSteps == 32, "the look-back has a step per lane");
static_assert(kWindow == TimestepNormChains::kWindow && sizeof(Slot) == TimestepNormChains::kSlotBytes);

struct Plan {
  int64_t K;
  int64_t units;   // packs of a group
  int64_t chunks;  // of `lanes` packs of a group, at least 1
  int slices;      // of the groups
  int tiles;       // of a row
  int rows;
  int lanes;   // of a group: a power of two
  int groups;  // of a slice

  static Plan of(const TimestepNormChains& chains, int64_t K, int V) {
    Plan plan{};
    plan.K = K;
    plan.units = K / V;
    plan.lanes = 1;
    while (plan.lanes < 32 && plan.lanes < plan.units) plan.lanes *= 2;
    plan.chunks = plan.units <= plan.lanes ? 1 : ceil_div(plan.units, plan.lanes);
    plan.groups = 32 / plan.lanes;
    plan.slices = static_cast<int>(ceil_div(chains.G, plan.groups));
    plan.tiles = static_cast<int>(chains.tiles);
    plan.rows = static_cast<int>(chains.B);
    return plan;
  }
  int64_t blocks() const { return static_cast<int64_t>(rows) * tiles * slices; }
};

// What a thread works on: packs of one group, at kHeld steps of a tile.
struct Work {
  int slice, b, number, tile;  // number: of the tiles of all rows of this slice, in the order of tickets
  int64_t first_row;           // of the tile: b * L + the first step
  int group;                   // may be beyond the last
  int warp, lane, lane_of_group, group_of_slice;
  int length;      // steps of the tile
  uint32_t steps;  // those that are not padded

  DEVICE static Work of(const Plan& plan, uint32_t ticket, bool backwards, const uint8_t* mask, int64_t L) {
    Work work;
    work.slice = static_cast<int>(ticket) % plan.slices;
    work.number = static_cast<int>(ticket) / plan.slices;
    work.b = work.number % plan.rows;
    work.tile = work.number / plan.rows;
    const int64_t start = static_cast<int64_t>(backwards ? plan.tiles - 1 - work.tile : work.tile) * kSteps;
    work.first_row = static_cast<int64_t>(work.b) * L + start;
    work.warp = static_cast<int>(threadIdx.x) / 32;
    work.lane = static_cast<int>(threadIdx.x) % 32;
    work.lane_of_group = work.lane % plan.lanes;
    work.group_of_slice = work.lane / plan.lanes;
    work.group = work.slice * plan.groups + work.group_of_slice;
    work.length = static_cast<int>(L - start < kSteps ? L - start : kSteps);
    const bool exists = work.lane < work.length;
    work.steps = ballot(exists && (mask == nullptr || mask[work.first_row + work.lane] == 0));
    return work;
  }
  DEVICE int step(int p) const { return p * kWarps + warp; }
  DEVICE bool has(int p) const { return (steps >> step(p) & 1) != 0; }
  // How many unpadded steps are before a step of the tile.
  DEVICE int rank(int step) const { return count_bits(steps & ((uint32_t{1} << step) - 1)); }
};

// A thread's packs of one chunk, at its steps.
template <class T, int V>
DEVICE void load_steps(Pack<T, V> (&packs)[kHeld], const void* from, const Work& work, int64_t D, int64_t column,
                       bool exists) {
  UNROLL
  for (int p = 0; p < kHeld; ++p) {
    packs[p] = {};
    if (exists && work.has(p)) {
      packs[p] = load<V>(static_cast<const T*>(from) + (work.first_row + work.step(p)) * D + column);
    }
  }
}

// body(c, column, mine) for every chunk of the thread's group: the column of its pack, and whether there is one.
template <int V, class Body>
DEVICE void for_chunks(const Plan& plan, const Work& work, bool exists, Body&& body) {
  for (int64_t c = 0; c < plan.chunks; ++c) {
    const int64_t unit = c * plan.lanes + work.lane_of_group;
    body(c, work.group * plan.K + unit * V, exists && unit < plan.units);
  }
}

// Over the lanes of every group.
template <class A>
DEVICE void add_lanes(A (&sums)[kHeld], int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    UNROLL
    for (int p = 0; p < kHeld; ++p) sums[p] += shuffle_xor(sums[p], bits);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Of n steps: the mean M of their mu, and V, that of s + (mu - M)^2.
struct Moments {
  double n, mean, var;
};

DEVICE Moments merge(const Moments& a, const Moments& b) {
  if (b.n == 0) return a;
  if (a.n == 0) return b;
  const double per_step = 1 / (a.n + b.n);
  const double d = b.mean - a.mean;
  const double weight = b.n * per_step;
  return {a.n + b.n, a.mean + weight * d, a.var + weight * (b.var - a.var + a.n * per_step * (d * d))};
}

// From the sums of (mu - center) and s + (mu - center)^2.
DEVICE Moments moments(double center, double n, double sum, double squares) {
  const double per_step = 1 / n;
  const double mean = sum * per_step;
  const double var = squares * per_step - mean * mean;
  return {n, center + mean, var < 0 ? 0 : var};
}

// Those of all lanes together.
DEVICE Moments pool(const Moments& lane) {
  const bool some = lane.n > 0;
  const uint32_t lanes = ballot(some);
  if (lanes == 0) return {};
  const double center = shuffle(lane.mean, count_bits((lanes & -lanes) - 1));
  const double d = lane.mean - center;
  return moments(center, warp_sum(lane.n), warp_sum(some ? lane.n * d : 0),
                 warp_sum(some ? lane.n * (lane.var + d * d) : 0));
}

// Of the steps up to and including the lane's; lanes beyond the last step have none.
DEVICE Moments scan_steps(double mu, double s, bool some) {
  const auto add = [](double a, double b) { return a + b; };
  const double center = shuffle(mu, 0);
  const double d = mu - center;
  const double sum = warp_scan(some ? d : 0, add);
  const double squares = warp_scan(some ? s + d * d : 0, add);
  return moments(center, lane_index() + 1, sum, squares);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3) timestep_norm_forward_kernel(TimestepNormForward args, Plan plan) {
  using A = stat_t<T>;
  using Packs = Pack<T, V>;
  SHARED(Packs, held, [kHeld][kThreads]);  // x; registers are short while the states are computed
  SHARED(double, mu, [32][kRow]);          // of the unpadded steps in order
  SHARED(A, mean, [32][kRow]);             // M' after so many unpadded steps of the tile
  SHARED(A, rstd, [32][kRow]);             // r likewise; before that, s in the order of mu
  const bool looks_back = plan.tiles > 1;
  const uint32_t ticket = looks_back ? take_ticket(static_cast<uint32_t*>(args.workspace)) : blockIdx.x;
  const Work work = Work::of(plan, ticket, false, args.padding_mask, args.L);
  const bool exists = work.group < args.G;
  const bool leads = exists && work.lane_of_group == 0;
  const auto size = static_cast<A>(plan.K);
  const A zero = 0;

  Pack<T, V> x[kHeld];
  A origin[kHeld];
  A away[kHeld] = {};  // mu - origin
  A squares[kHeld] = {};
  const bool reads_again = plan.chunks > 1;
  for_chunks<V>(plan, work, exists, [&](int64_t c, int64_t column, bool mine) {
    load_steps(x, args.x, work, args.D, column, mine);
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      if (c == 0) origin[p] = shuffle(widen(x[p].v[0]), work.lane - work.lane_of_group);
      UNROLL
      for (int j = 0; j < V; ++j) away[p] += mine ? widen(x[p].v[j]) - origin[p] : zero;
    }
  });
  add_lanes(away, plan.lanes);
  UNROLL
  for (int p = 0; p < kHeld; ++p) away[p] /= size;
  for_chunks<V>(plan, work, exists, [&](int64_t, int64_t column, bool mine) {
    if (reads_again) load_steps(x, args.x, work, args.D, column, mine);
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      hold_packed(x[p]);
      UNROLL
      for (int j = 0; j < V; ++j) {
        const A d = widen(x[p].v[j]) - origin[p] - away[p];
        squares[p] += mine ? d * d : zero;
      }
    }
  });
  add_lanes(squares, plan.lanes);
  UNROLL
  for (int p = 0; p < kHeld; ++p) {
    if (!leads || !work.has(p)) continue;
    const int rank = work.rank(work.step(p));
    mu[work.group_of_slice][rank] = static_cast<double>(origin[p]) + static_cast<double>(away[p]);
    rstd[work.group_of_slice][rank] = squares[p] / size;
  }
  UNROLL
  for (int p = 0; p < kHeld; ++p) held[p][threadIdx.x] = x[p];
  sync_block();  // every step has been measured

  const int count = count_bits(work.steps);
  for (int i = work.warp; i < plan.groups; i += kWarps) {
    const int g = work.slice * plan.groups + i;
    if (g >= args.G) break;
    const int64_t chain = work.b * args.G + g;
    const int lane = work.lane;
    const bool some = lane < count;
    const Moments steps = scan_steps(some ? mu[i][lane] : 0, some ? rstd[i][lane] : 0, some);
    Moments all = shuffle_all(steps, count > 0 ? count - 1 : 0);
    if (count == 0) all = {};
    const auto given = [&] {
      if (args.count == nullptr) return Moments{0, 0, 1};
      return Moments{static_cast<double>(args.count[work.b]), static_cast<const A*>(args.mean)[chain],
                     static_cast<const A*>(args.var)[chain]};
    };
    Moments before;
    if (looks_back) {
      auto* slots = reinterpret_cast<Slot*>(static_cast<char*>(args.workspace) + TimestepNormChains::kTicketBytes);
      const int of_chain = plan.tiles + plan.tiles / kWindow;
      before = look_back(slots + chain * of_chain, plan.tiles, work.tile, all, given, pool, merge);
    } else {
      before = given();
    }
    const auto keep = [&](int rank, const Moments& state) {
      mean[i][rank] = static_cast<A>(state.mean);
      rstd[i][rank] = A(1) / sqrt(static_cast<A>(state.var + args.eps));
    };
    sync_warp();  // every s has been read
    if (some) keep(lane + 1, merge(before, steps));
    if (lane > 0) continue;
    keep(0, before);
    if (work.tile + 1 < plan.tiles) continue;
    const Moments last = merge(before, all);
    if (g == 0) args.last_count[work.b] = static_cast<int64_t>(last.n);
    static_cast<A*>(args.last_mean)[chain] = static_cast<A>(last.mean);
    static_cast<A*>(args.last_var)[chain] = static_cast<A>(last.var);
  }
  sync_block();  // the states are there

  for_chunks<V>(plan, work, exists, [&](int64_t c, int64_t column, bool mine) {
    Pack<A, V> weight = {};
    Pack<A, V> bias = {};
    if (mine) {
      weight = load<V>(static_cast<const A*>(args.weight) + column);
      bias = load<V>(static_cast<const A*>(args.bias) + column);
    }
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      const int step = work.step(p);
      if (!exists || step >= work.length) continue;
      const int rank = work.rank(step) + work.has(p);
      const A m = mean[work.group_of_slice][rank];
      const A r = rstd[work.group_of_slice][rank];
      const int64_t row = work.first_row + step;
      if (c == 0 && leads) {
        static_cast<A*>(args.step_mean)[row * args.G + work.group] = m;
        static_cast<A*>(args.step_rstd)[row * args.G + work.group] = r;
      }
      if (!mine) continue;
      Pack<T, V> y = {};
      const int64_t at = row * args.D + column;
      if (work.has(p)) {
        const Pack<T, V> again = reads_again ? load<V>(static_cast<const T*>(args.x) + at) : held[p][threadIdx.x];
        UNROLL
        for (int j = 0; j < V; ++j) {
          const A normed = (widen(again.v[j]) - m) * r;
          y.v[j] = narrow<T>(normed * weight.v[j] + normed + bias.v[j]);
        }
      }
      store(static_cast<T*>(args.y) + at, y);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

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

// counts[b, i]: the unpadded steps of row b before tile i; a block per row, a thread per tile.
template <class Count>
__global__ void __launch_bounds__(1024)
    timestep_norm_count_kernel(const uint8_t* mask, int64_t L, int64_t tiles, Count* counts) {
  SHARED(double, sums, [32]);
  const int64_t b = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  double before = 0;
  for (int64_t start = 0; start <= tiles; start += blockDim.x) {
    const int64_t tile = start + threadIdx.x;
    const int64_t end = (tile + 1) * kSteps < L ? (tile + 1) * kSteps : L;
    double count = 0;
    for (int64_t t = tile * kSteps; t < end; ++t) count += mask[b * L + t] == 0;
    const double scan = warp_scan(count, [](double x, double y) { return x + y; });
    if (lane_index() == 31) sums[warp] = scan;
    sync_block();  // every warp's sum is there
    double warps_before = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
      if (w == warp) warps_before = before;
      before += sums[w];
    }
    if (tile <= tiles) counts[b * (tiles + 1) + tile] = static_cast<Count>(warps_before + scan - count);
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
  const uint32_t ticket = take_ticket(reinterpret_cast<uint32_t*>(memory));
  const Work work = Work::of(plan, ticket, true, args.padding_mask, args.L);
  const bool exists = work.group < args.G;
  const bool leads = exists && work.lane_of_group == 0;

  Pack<T, V> x[kHeld];
  Pack<T, V> dy[kHeld];
  const auto size = static_cast<A>(plan.K);
  const auto* means = static_cast<const A*>(args.step_mean) + work.first_row * args.G + work.group;
  const auto* rstds = static_cast<const A*>(args.step_rstd) + work.first_row * args.G + work.group;
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
  const int64_t start = args.count == nullptr ? 0 : args.count[work.b];
  int64_t before = static_cast<int64_t>(plan.tiles - 1 - work.tile) * kSteps;
  int64_t total = args.L;
  if (args.padding_mask != nullptr) {
    const auto* counts =
        reinterpret_cast<const int64_t*>(memory + room.counts) + static_cast<int64_t>(work.b) * (plan.tiles + 1);
    before = counts[plan.tiles - 1 - work.tile];
    total = counts[plan.tiles];
  }
  const double last_n = start + total > 0 ? static_cast<double>(start + total) : 1;
  for (int i = work.warp; i < plan.groups; i += kWarps) {
    const int g = work.slice * plan.groups + i;
    if (g >= args.G) break;
    const int64_t chain = work.b * args.G + g;
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
      if (args.dmean != nullptr) last.mean = static_cast<const A*>(args.dmean)[chain] / last_n;
      if (args.dvar != nullptr) last.var = static_cast<const A*>(args.dvar)[chain] / last_n;
      return last;
    };
    auto* slots = reinterpret_cast<Slot*>(memory + room.slots);
    const int of_chain = plan.tiles + plan.tiles / kWindow;
    const Adjoints later = look_back(slots + chain * of_chain, plan.tiles, work.tile, all, given, fold, apply);
    if (some) {
      const Adjoints a = apply(later, steps);
      shift[i][rank] = static_cast<A>(a.mean + step.e * a.var) / size;
      slope[i][rank] = static_cast<A>(2 * a.var) / size;
    }
    if (work.lane > 0 || work.tile + 1 < plan.tiles || args.dmean0 == nullptr) continue;
    const Adjoints first = apply(later, all);
    const double first_n = start + total > 0 ? static_cast<double>(start) : 1;
    static_cast<A*>(args.dmean0)[chain] = static_cast<A>(first_n * first.mean);
    static_cast<A*>(args.dvar0)[chain] = static_cast<A>(first_n * first.var);
  }
  sync_block();  // shift and slope are there

  const int parts = static_cast<int>(room.parts);
  const int part = work.number % parts;
  const auto turn = static_cast<uint32_t>(work.number / parts);
  uint32_t* turns = reinterpret_cast<uint32_t*>(memory + room.turns) + work.slice * room.parts + part;
  for_chunks<V>(plan, work, exists, [&](int64_t c, int64_t column, bool mine) {
    if (reads_again) load_steps(dy, args.dy, work, args.D, column, mine);
    const Pack<A, V> weight = load_weight(column, mine);
    Pack<A, V> dweight = {};
    Pack<A, V> dbias = {};
    UNROLL
    for (int p = 0; p < kHeld; ++p) {
      const int step = work.step(p);
      hold_packed(dy[p]);
      if (!mine || step >= work.length) continue;
      Pack<T, V> dx = {};
      const int64_t at = (work.first_row + step) * args.D + column;
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
      const int64_t g = work.slice * plan.groups + of_chunk / plan.lanes;
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

// ---- launching ------------------------------------------------------------------------------------------------------

template <class T, int V>
void forward(const TimestepNormForward& args, void* stream) {
  const TimestepNormChains chains = args.chains();
  const Plan plan = Plan::of(chains, args.K(), V);
  if (chains.tiles > 1) clear(args.workspace, args.workspace_bytes(true), stream);
  launch({"timestep_norm_forward", dim3(static_cast<unsigned>(plan.blocks())), dim3(kThreads), 0, stream},
         timestep_norm_forward_kernel<T, V>, args, plan);
}

template <class T, int V>
void backward(const TimestepNormBackward& args, void* stream) {
  using A = stat_t<T>;
  const TimestepNormChains chains = args.chains();
  const Plan plan = Plan::of(chains, args.K(), V);
  const auto room = TimestepNormBackwardRoom::of(chains, args.D, args.padding_mask != nullptr, stat_dtype(args.dtype));
  auto* memory = static_cast<char*>(args.workspace);
  if (args.B > 0) {
    clear(memory, room.counts, stream);
    if (args.padding_mask != nullptr) {
      launch({"timestep_norm_count", dim3(static_cast<unsigned>(args.B)), dim3(1024), 0, stream},
             timestep_norm_count_kernel<int64_t>, args.padding_mask, args.L, plan.tiles,
             reinterpret_cast<int64_t*>(memory + room.counts));
    }
    launch({"timestep_norm_backward", dim3(static_cast<unsigned>(plan.blocks())), dim3(kThreads), 0, stream},
           timestep_norm_backward_kernel<T, V>, args, plan, room);
  }
  const A* sums = reinterpret_cast<const A*>(memory + room.sums);
  add_parts(sums, room.parts, args.D, static_cast<A*>(args.dweight), stream);
  add_parts(sums + room.parts * args.D, room.parts, args.D, static_cast<A*>(args.dbias), stream);
}

}  // namespace

void timestep_norm_forward(const TimestepNormForward& args, void* stream) {
  if (args.B == 0) return;
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = args.K() % kPackOf<T> == 0 && can_pack<T>(args.D, args.x, args.weight, args.bias, args.y);
    packed ? forward<T, kPackOf<T>>(args, stream) : forward<T, 1>(args, stream);
  });
}

void timestep_norm_backward(const TimestepNormBackward& args, void* stream) {
  visit_activation(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = args.K() % kPackOf<T> == 0 && can_pack<T>(args.D, args.dy, args.x, args.weight, args.dx);
    packed ? backward<T, kPackOf<T>>(args, stream) : backward<T, 1>(args, stream);
  });
}

}  // namespace megalodon::cuda
