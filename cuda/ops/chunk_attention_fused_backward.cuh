// chunk_attention backward in two passes, of its queries and of its keys, for heads of at most 128 numbers. Scores are
// computed in both; no sums but a block's own.
#pragma once

#include "ops/chunk_attention_fused.cuh"

namespace megalodon::cuda {
namespace {

// of_keys: a block owns rows of k and v, and those of q and do move; it makes those of dk and dv. Else it owns rows of
// q and do, those of k and v move, and it makes those of dq. So the same tensors are the first and second ones in both.
template <class T, int width, bool of_keys>
using FusedBackwardPlan = FusedPlan<T, width, 2, of_keys ? 64 : 80, 3, 0, of_keys>;

// P and dS have the own rows as rows: of keys they are transposed. Of the next slab P is begun with the products of the
// last one, dS when these are there.
template <class T, class Plan>
__global__ void __launch_bounds__(kBulkThreads, 1)
    chunk_attention_fused_backward_kernel(ChunkAttentionBackward args, FusedOrder order,
                                          GRID_CONSTANT typename Plan::Maps maps, const float* D) {
  constexpr int kStages = Plan::kStages;
  constexpr bool kOfKeys = Plan::kOfKeys;
  using Scores = typename Plan::Scores;
  DYNAMIC_SHARED(typename Plan::Shared, shared);
  SHARED(FusedState<Plan>, state);
  const auto* const lse = static_cast<const float*>(args.lse);
  constexpr int kMany = Plan::kWidth > 64 && kOfKeys ? 240 : 216;
  run_fused<Plan, kMany>(*shared, state, args, order, maps, lse, D, [&](const FusedWork& work, int before) {
    typename Plan::Out first;                                              // dk or dq
    std::conditional_t<kOfKeys, typename Plan::Out, WgmmaSums<0>> second;  // dv
    Scores P, dS;
    FusedWeights<Plan> weights, gradients;
    float lse_of_row[2], D_of_row[2];
    const auto stage_of = [&](int slab) { return (before + slab) % kStages; };
    const auto use_of = [&](int slab) { return (before + slab) / kStages; };
    const auto begin = [&](int slab) {
      const int stage = stage_of(slab);
      state.moving[0][stage].wait_full(use_of(slab));
      state.moving[1][stage].wait_full(use_of(slab));
      if (slab == work.slabs<Plan>() - 1) {
        bool is_changed = clear_rows<Plan>(work, shared->moving[0][stage]);
        is_changed |= clear_rows<Plan>(work, shared->moving[1][stage]);
        if (is_changed) state.publish();
      }
      begin_scores<Plan>(P, shared->own[0], shared->moving[0][stage]);
    };
    const auto release = [&](int slab) {
      const int stage = stage_of(slab);
      state.moving[0][stage].release();
      state.moving[1][stage].release();
      if constexpr (kOfKeys) state.statistics[stage].release();
    };

    first.clear();
    if constexpr (kOfKeys) {
      second.clear();
    } else {
      UNROLL
      for (int r = 0; r < 2; ++r) {
        const int query = work.place + Scores::row(r);
        const bool is_query = query < work.end;
        lse_of_row[r] = is_query ? lse[work.statistic + query] : INFINITY;
        D_of_row[r] = is_query ? D[work.statistic + query] : 0;
      }
    }
    int slab = 0;
    do {
      const int stage = stage_of(slab);
      begin(slab);
      P.finish();
      if (slab > 0) release(slab - 1);
      begin_scores<Plan>(dS, shared->own[1], shared->moving[1][stage]);
      if constexpr (kOfKeys) state.statistics[stage].wait_full(use_of(slab));
      // f(r, c, statistic): of the query that belongs to the number.
      const auto for_numbers = [&](const float (&of_row)[2], const float* of_column, auto&& f) {
        UNROLL
        for (int c = 0; c < Scores::kColumns; ++c) {
          const float of_both = kOfKeys ? of_column[Scores::column(c)] : 0;
          UNROLL
          for (int r = 0; r < 2; ++r) f(r, c, kOfKeys ? of_both : of_row[r]);
        }
      };
      const auto& of_slab = state.of_slab[kOfKeys ? stage : 0];
      const int place = work.begin<Plan>() + slab * Plan::kMoving;
      const ScoreTile at{work.chunk(), kOfKeys ? place : work.place, kOfKeys ? work.place : place};
      hide_keys<kOfKeys>(P, args, at);
      for_numbers(lse_of_row, of_slab.lse, [&](int r, int c, float of_query) {
        float& score = P.sum[r][c];
        const float shift = of_query == -INFINITY ? INFINITY : of_query;  // a query without keys
        score = score == -INFINITY ? 0 : exp2_approximate((score - shift) * kLog2E);
      });
      uint64_t dropped = 0;
      if (args.drops_weights) dropped = dropped_bits<Scores, kOfKeys>(args, at);
      const auto kept_scale = static_cast<float>(args.kept_scale);
      if constexpr (kOfKeys) {
        weights.set(P);
        if (args.drops_weights) {
          weights.set_pairs([&](int r, int c) {
            float pair[2];
            UNROLL
            for (int i = 0; i < 2; ++i) {
              pair[i] = dropped >> (r * Scores::kColumns + c + i) & 1 ? 0 : P.sum[r][c + i] * kept_scale;
            }
            return bits_as<uint32_t>(narrow_run<T, 2>(pair));
          });
        }
      }
      dS.finish();
      if (slab == work.slabs<Plan>() - 1) state.own.release();
      if (args.drops_weights) {
        UNROLL
        for (int n = 0; n < 2 * Scores::kColumns; ++n) {
          float& product = dS.sum[n / Scores::kColumns][n % Scores::kColumns];
          product = dropped >> n & 1 ? 0 : product * kept_scale;
        }
      }
      for_numbers(D_of_row, of_slab.D, [&](int r, int c, float of_query) {
        const float weight = P.sum[r][c];
        dS.sum[r][c] = weight == 0 ? 0 : weight * (dS.sum[r][c] - of_query);
      });
      gradients.set(dS);
      gradients.begin_product(first, shared->moving[0][stage]);
      if constexpr (kOfKeys) weights.begin_product(second, shared->moving[1][stage]);
      wgmma_commit();
    } while (++slab < work.slabs<Plan>());
    first.finish();
    release(slab - 1);
    if constexpr (kOfKeys) {
      second.finish();
      const KeyRows<T> dk(args, work.chunk(), static_cast<T*>(args.dk), nullptr, args.S);
      const KeyRows<T> dv(args, work.chunk(), static_cast<T*>(args.dv), nullptr, args.E);
      write_rows<true>(first, dk, work.place, work.end, 0, args.S);
      write_rows<true>(second, dv, work.place, work.end, 0, args.E);
    } else {
      const QueryRows<T> dq(args, work.chunk(), static_cast<T*>(args.dq), args.S);
      write_rows<true>(first, dq, work.place, work.end, 0, args.S);
    }
  });
}

template <class T, int width, bool of_keys>
void launch_fused_gradients(const ChunkAttentionBackward& args, const float* D, void* stream) {
  using Plan = FusedBackwardPlan<T, width, of_keys>;
  const char* const kernel = of_keys ? "chunk_attention_fused_dkv" : "chunk_attention_fused_dq";
  const FusedOrder order = FusedOrder::of(args, Plan::kRows, of_keys);
  const auto map = [&](const void* tensor, int64_t n, bool is_own) {
    return rows_map(kernel, args, tensor, n, is_own ? Plan::kRows : Plan::kMoving);
  };
  const TensorMap q = map(args.q, args.S, !of_keys), dout = map(args.dout, args.E, !of_keys);
  const TensorMap k = map(args.k, args.S, of_keys), v = map(args.v, args.E, of_keys);
  typename Plan::Maps maps{{q, dout}, {k, v}};
  if (of_keys) maps = {{k, v}, {q, dout}};
  launch({kernel, dim3(order.blocks), dim3(kBulkThreads), sizeof(typename Plan::Shared), stream},
         chunk_attention_fused_backward_kernel<T, Plan>, args, order, maps, D);
}

template <class T, int width>
void launch_fused_backward(const ChunkAttentionBackward& args, void* stream) {
  float* const D = BackwardScratch<WgmmaTile<T, 128>>(args).D;
  launch_dot<T, kPackOf<T>>(args, D, stream);
  launch_fused_gradients<T, width, true>(args, D, stream);
  launch_fused_gradients<T, width, false>(args, D, stream);
}

}  // namespace
}  // namespace megalodon::cuda
