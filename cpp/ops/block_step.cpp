// block_step on the CPU.
//
// Computes  one decoding step of a block from the kernels of its parts (ops/block_step.h); arXiv 2404.08801 section 3.
// Layout    x, y (B, D); weights (out, in) as torch has them; the state as in the ops it belongs to; all compact.
// Mapping   the parts follow each other; each is split over the threads by its own rule. Products with one x share one
//           parallel loop (core/linear_kernel.h).
// Traffic   every weight, the filled slots of the caches and the state once: bound by reading them for few rows, by
//           FMAs for many.
// Numerics  as the parts; products and residual sums in stat, rounded once; with AVX512_BF16 pairs of bf16 are
//           multiplied exactly and added at once, subnormal ones as zeros. In place: a part reads its state before it
//           writes it. Independent of the number of threads.
// Limits    those of the parts.
#include "ops/block_step.h"

#include "core/linear_kernel.h"

namespace megalodon::cpu::MEGALODON_ISA {

void block_step_forward(const BlockStep& s) {
  visit_activation(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    timestep_norm_forward(s.timenorm);
    if (s.B > 0) std::memcpy(s.count, s.timenorm.last_count, s.B * sizeof(int64_t));
    cema_forward(s.cema);
    rms_norm_forward(s.rmsnorm);
    linear<T>(s.inner, s.B);
    qk_norm_rope_forward(s.rope);
    silu_mul_forward(s.value);
    chunk_attention_step_forward(s.attention);
    silu_mul_forward(s.gate);
    linear<T>(s.wh2, s.B);
    layer_norm_forward(s.norm);
    linear<T>(s.up, s.B);
    silu_mul_forward(s.hidden);
    linear<T>(s.fc2, s.B);
  });
}

}  // namespace megalodon::cpu::MEGALODON_ISA

#ifdef MEGALODON_ENTRY
using namespace megalodon;

extern "C" int megalodon_block_step_forward_outputs(
    const DLTensor* x, DLTensor* k_cache, DLTensor* v_cache, DLTensor* count, DLTensor* mean, DLTensor* var,
    DLTensor* h, const DLTensor* position, const DLTensor* timenorm_weight, const DLTensor* timenorm_bias,
    const DLTensor* cema_alpha, const DLTensor* cema_delta, const DLTensor* cema_theta, const DLTensor* cema_gamma,
    const DLTensor* cema_omega, const DLTensor* rmsnorm_weight, const DLTensor* wv_weight, const DLTensor* wv_bias,
    const DLTensor* wz_weight, const DLTensor* wz_bias, const DLTensor* wr_weight, const DLTensor* wr_bias,
    const DLTensor* wh1_weight, const DLTensor* wh1_bias, const DLTensor* wh2_weight, const DLTensor* gamma,
    const DLTensor* beta, const DLTensor* norm_weight, const DLTensor* norm_bias, const DLTensor* fc1_weight,
    const DLTensor* fc2_weight, const DLTensor* fc3_weight, const DLTensor* ffn_alpha, int64_t num_groups,
    int64_t num_heads, int64_t chunk_size, double rope_base, double eps, int64_t sliding, megalodon_spec* outputs) {
  return guarded([&] {
    Checker c("block_step");
    check_block_step(c, {x,          k_cache,         v_cache,       count,      mean,       var,        h,
                         position,   timenorm_weight, timenorm_bias, cema_alpha, cema_delta, cema_theta, cema_gamma,
                         cema_omega, rmsnorm_weight,  wv_weight,     wv_bias,    wz_weight,  wz_bias,    wr_weight,
                         wr_bias,    wh1_weight,      wh1_bias,      wh2_weight, gamma,      beta,       norm_weight,
                         norm_bias,  fc1_weight,      fc2_weight,    fc3_weight, ffn_alpha,  num_groups, num_heads,
                         chunk_size, rope_base,       eps,           sliding},
                     Outputs(outputs));
  });
}

extern "C" int megalodon_block_step_forward(
    const DLTensor* x, DLTensor* k_cache, DLTensor* v_cache, DLTensor* count, DLTensor* mean, DLTensor* var,
    DLTensor* h, const DLTensor* position, const DLTensor* timenorm_weight, const DLTensor* timenorm_bias,
    const DLTensor* cema_alpha, const DLTensor* cema_delta, const DLTensor* cema_theta, const DLTensor* cema_gamma,
    const DLTensor* cema_omega, const DLTensor* rmsnorm_weight, const DLTensor* wv_weight, const DLTensor* wv_bias,
    const DLTensor* wz_weight, const DLTensor* wz_bias, const DLTensor* wr_weight, const DLTensor* wr_bias,
    const DLTensor* wh1_weight, const DLTensor* wh1_bias, const DLTensor* wh2_weight, const DLTensor* gamma,
    const DLTensor* beta, const DLTensor* norm_weight, const DLTensor* norm_bias, const DLTensor* fc1_weight,
    const DLTensor* fc2_weight, const DLTensor* fc3_weight, const DLTensor* ffn_alpha, int64_t num_groups,
    int64_t num_heads, int64_t chunk_size, double rope_base, double eps, int64_t sliding, DLTensor* y,
    DLTensor* workspace, void* stream) {
  return guarded([&] {
    Checker c("block_step");
    const BlockStep args = check_block_step(
        c, {x,          k_cache,         v_cache,       count,      mean,       var,        h,
            position,   timenorm_weight, timenorm_bias, cema_alpha, cema_delta, cema_theta, cema_gamma,
            cema_omega, rmsnorm_weight,  wv_weight,     wv_bias,    wz_weight,  wz_bias,    wr_weight,
            wr_bias,    wh1_weight,      wh1_bias,      wh2_weight, gamma,      beta,       norm_weight,
            norm_bias,  fc1_weight,      fc2_weight,    fc3_weight, ffn_alpha,  num_groups, num_heads,
            chunk_size, rope_base,       eps,           sliding},
        {y, workspace});
    c.not_negative("count", args.count, args.B);
    c.not_negative("position", args.rope.position, args.B);
    run_on(c, args, cpu::block_step_forward, cuda::block_step_forward, stream);
  });
}
#endif
