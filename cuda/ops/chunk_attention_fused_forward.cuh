// chunk_attention forward in one pass.
#pragma once

#include "ops/chunk_attention_fused.cuh"

namespace megalodon::cuda {
namespace {

// A block owns queries; keys and, a slab later, values move. 80 keys where o takes half of the registers.
template <class T, int width>
using FusedForwardPlan = FusedPlan<T, width, 1, width <= 128 ? 128 : 80, 2, 1, false>;

// Of the two rows that a thread has a part of: the scores that weights are relative to, and the weights' sums.
struct FusedRows {
  float reference[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Scores become weights, which are relative to the row's new reference; what was relative to the old one is to be
  // multiplied by `scale`.
  template <class T, class Scores>
  DEVICE void weigh(Scores& scores, float (&scale)[2]) {
    const float lowest = -INFINITY;
    UNROLL
    for (int r = 0; r < 2; ++r) {
      float best = lowest;
      UNROLL
      for (int c = 0; c < Scores::kColumns; ++c) best = scores.sum[r][c] > best ? scores.sum[r][c] : best;
      UNROLL
      for (int bits = 1; bits < 4; bits *= 2) {
        const float other = shuffle_xor(best, bits);
        best = other > best ? other : best;
      }
      best = reference_of<T>(best);
      const float old = reference[r];
      if (best > old) reference[r] = best;
      scale[r] = best > old ? exp2_approximate((old - best) * kLog2E) : 1;
      const float shift = reference[r] == lowest ? 0 : reference[r];  // nothing visible yet
      float added = 0;
      UNROLL
      for (int c = 0; c < Scores::kColumns; ++c) {
        added += scores.sum[r][c] = exp2_approximate((scores.sum[r][c] - shift) * kLog2E);
      }
      sum[r] = sum[r] * scale[r] + added;
    }
  }
  DEVICE float total(int r) const {
    float whole = sum[r];
    UNROLL
    for (int bits = 1; bits < 4; bits *= 2) whole += shuffle_xor(whole, bits);
    return whole;
  }
};

// While a slab of scores becomes weights, the last one's weights are multiplied by its values.
template <class T, class Plan>
__global__ void __launch_bounds__(kBulkThreads, 1)
    chunk_attention_fused_kernel(ChunkAttentionForward args, FusedOrder order, GRID_CONSTANT typename Plan::Maps maps) {
  constexpr int kStages = Plan::kStages;
  DYNAMIC_SHARED(typename Plan::Shared, shared);
  SHARED(FusedState<Plan>, state);
  constexpr int kMany = Plan::kWidth > 128 ? 224 : 216;
  run_fused<Plan, kMany>(*shared, state, args, order, maps, nullptr, nullptr, [&](const FusedWork& work, int before) {
    auto& keys = state.moving[0];
    auto& values = state.moving[1];
    typename Plan::Out o;
    typename Plan::Scores scores;
    FusedWeights<Plan> weights;
    FusedRows rows;
    float scale[2];
    const auto stage_of = [&](int slab) { return (before + slab) % kStages; };
    const auto use_of = [&](int slab) { return (before + slab) / kStages; };
    const auto begin = [&](int slab) {
      keys[stage_of(slab)].wait_full(use_of(slab));
      begin_scores<Plan>(scores, shared->own[0], shared->moving[0][stage_of(slab)]);
    };
    // The slab's scores are there: they become weights.
    const auto weigh = [&](int slab) {
      keys[stage_of(slab)].release();
      if (slab == work.slabs<Plan>() - 1) state.own.release();
      const ScoreTile at{work.chunk(), work.place, slab * Plan::kMoving};
      hide_keys(scores, args, at);
      rows.weigh<T>(scores, scale);
      if (args.drops_weights) set_dropped(scores, args, at, 0.0f);
    };
    const auto wait_values = [&](int slab) { values[stage_of(slab)].wait_full(use_of(slab)); };
    const auto begin_product = [&](int slab) {
      weights.begin_product(o, shared->moving[1][stage_of(slab)]);
      wgmma_commit();
    };
    const auto finish_product = [&](int slab) {
      o.finish();
      values[stage_of(slab)].release();
    };

    o.clear();
    begin(0);
    scores.finish();
    weigh(0);
    weights.set(scores);
    ROLL for (int slab = 1; slab < work.slabs<Plan>(); ++slab) {
      begin(slab);
      wait_values(slab - 1);
      begin_product(slab - 1);
      scores.template finish<1>();
      weigh(slab);
      finish_product(slab - 1);
      if (ballot(scale[0] != 1 || scale[1] != 1) != 0) {
        UNROLL
        for (int r = 0; r < 2; ++r) {
          UNROLL
          for (int c = 0; c < Plan::Out::kColumns; ++c) o.sum[r][c] *= scale[r];
        }
      }
      weights.set(scores);
    }
    const int last = work.slabs<Plan>() - 1;
    wait_values(last);
    if (clear_rows<Plan>(work, shared->moving[1][stage_of(last)])) {
      state.publish();
    }
    begin_product(last);
    finish_product(last);
    UNROLL
    for (int r = 0; r < 2; ++r) {
      const float total = rows.total(r), inverse = total == 0 ? 0 : static_cast<float>(args.kept_scale) / total;
      const int query = work.place + o.row(r);
      if (threadIdx.x % 4 == 0 && query < work.end) {
        static_cast<float*>(args.lse)[work.statistic + query] = rows.reference[r] + log(total);
      }
      UNROLL
      for (int c = 0; c < Plan::Out::kColumns; ++c) o.sum[r][c] *= inverse;
    }
    write_rows<true>(o, QueryRows<T>(args, work.chunk(), static_cast<T*>(args.o), args.E), work.place, work.end, 0,
                     args.E);
  });
}

template <class T, int width>
void launch_fused_forward(const ChunkAttentionForward& args, void* stream) {
  using Plan = FusedForwardPlan<T, width>;
  const char* const kernel = "chunk_attention_fused";
  const FusedOrder order = FusedOrder::of(args, Plan::kRows, false);
  const typename Plan::Maps maps{
      {rows_map(kernel, args, args.q, args.S, Plan::kRows)},
      {rows_map(kernel, args, args.k, args.S, Plan::kMoving), rows_map(kernel, args, args.v, args.E, Plan::kMoving)}};
  launch({kernel, dim3(order.blocks), dim3(kBulkThreads), sizeof(typename Plan::Shared), stream},
         chunk_attention_fused_kernel<T, Plan>, args, order, maps);
}

}  // namespace
}  // namespace megalodon::cuda
