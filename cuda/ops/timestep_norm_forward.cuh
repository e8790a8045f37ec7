// timestep_norm forward: the merging of moments, and the kernel.
#pragma once

#include "core/look_back.cuh"
#include "core/pack.cuh"
#include "core/reduce.cuh"
#include "core/scan.cuh"
#include "ops/timestep_norm_tile.cuh"

namespace megalodon::cuda {
namespace {

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
  const Tile& tile = take_ticket(plan.looks_back ? static_cast<uint32_t*>(args.workspace) : nullptr,
                                 [&](uint32_t ticket) { return Tile::of(plan, args.sequences, ticket, false); });
  const auto slots = [&] { return static_cast<char*>(args.workspace) + TimestepNormChains::kTicketBytes; };
  if (!tile.is_piece) {
    if (plan.looks_back) tile.publish_nothing(slots(), plan, args.G);
    return;
  }
  const Work work(plan, tile, args.padding_mask);
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
    const int g = tile.slice * plan.groups + i;
    if (g >= args.G) break;
    const int64_t state = tile.sequence * args.G + g;
    const int lane = work.lane;
    const bool some = lane < count;
    const Moments steps = scan_steps(some ? mu[i][lane] : 0, some ? rstd[i][lane] : 0, some);
    Moments all = shuffle_all(steps, count > 0 ? count - 1 : 0);
    if (count == 0) all = {};
    const auto given = [&] {
      if (args.count == nullptr) return Moments{0, 0, 1};
      return Moments{static_cast<double>(args.count[tile.sequence]), static_cast<const A*>(args.mean)[state],
                     static_cast<const A*>(args.var)[state]};
    };
    Moments before;
    if (plan.looks_back) {
      Slot* const chain = tile.slots_of(slots(), plan, args.G, g);
      before = look_back(chain, plan.tiles, tile.first, tile.tile, all, given, pool, merge);
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
    if (!tile.is_last) continue;
    const Moments last = merge(before, all);
    if (g == 0) args.last_count[tile.sequence] = static_cast<int64_t>(last.n);
    static_cast<A*>(args.last_mean)[state] = static_cast<A>(last.mean);
    static_cast<A*>(args.last_var)[state] = static_cast<A>(last.var);
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
      if (!exists || step >= tile.length) continue;
      const int rank = work.rank(step) + work.has(p);
      const A m = mean[work.group_of_slice][rank];
      const A r = rstd[work.group_of_slice][rank];
      const int64_t row = tile.first_row + step;
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

}  // namespace
}  // namespace megalodon::cuda
