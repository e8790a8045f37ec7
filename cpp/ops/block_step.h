// block_step: one decoding step of a whole block, for every row; the state is updated in place. With rms, norm, rope as
// in the ops of these names:
//   t = timestep_norm(x),   mx = rms_norm(cema(t)),   q, k = qk_norm_rope(Wz mx + bz)
//   o = chunk_attention_step(q, k, silu(Wv t + bv)),   u = layer_norm(x + Wh1 mx + bh1 + Wh2 (silu(Wr mx + br) o))
//   y = x + ffn_alpha (F2 (silu(F1 u) F3 u))
// F3 and ffn_alpha are 1 where they are absent. Inference only. Nothing is computed here that other ops do not: their
// kernels are run one after the other, on memory of the workspace.
#pragma once

#include "core/linear.h"
#include "ops/cema.h"
#include "ops/chunk_attention_step.h"
#include "ops/layer_norm.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/silu_mul.h"
#include "ops/timestep_norm.h"

namespace megalodon {

struct BlockStep {
  DType dtype;
  int64_t B, D, E, F;  // E, of all heads
  int64_t* count;      // [B]
  TimestepNormForward timenorm;
  CemaForward cema;
  RmsNormForward rmsnorm;
  Linear inner[4];  // wv of t; wz, wr, wh1 of mx
  QkNormRopeForward rope;
  SiluMulForward value, gate;
  ChunkAttentionStep attention;
  Linear wh2[1];
  LayerNormForward norm;
  Linear up[2];  // fc1, fc3; out = 0 where there is none
  SiluMulForward hidden;
  Linear fc2[1];
};

// Memory handed out from its start; without any, only counted.
class BlockStepMemory {
 public:
  explicit BlockStepMemory(void* start) : start_(static_cast<char*>(start)) {}
  void* take(int64_t bytes) {
    void* taken = start_ == nullptr ? nullptr : start_ + used_;
    used_ += round_up(bytes, 64);
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// Gives what one kernel makes to the next, and returns the bytes of the workspace. All pointers to inputs, weights and
// the state are there already.
static inline int64_t connect_block_step(BlockStep& s, bool on_cuda, void* workspace) {
  BlockStepMemory memory(workspace);
  const int64_t width = size_of(s.dtype), stat = size_of(stat_dtype(s.dtype));
  const auto rows = [&](int64_t n) { return memory.take(s.B * n * width); };
  const auto stats = [&](int64_t n) { return memory.take(s.B * n * stat); };
  const auto feed = [&](Linear& linear, const void* x) {
    linear.x = x;
    linear.wide = width < stat && !on_cuda ? stats(linear.in) : nullptr;
  };

  s.timenorm.y = rows(s.D);
  s.timenorm.last_count = static_cast<int64_t*>(memory.take(s.B * 8));  // tiles of one row must not overwrite it
  s.timenorm.step_mean = stats(s.timenorm.G);
  s.timenorm.step_rstd = stats(s.timenorm.G);
  s.timenorm.workspace = memory.take(s.timenorm.workspace_bytes(on_cuda));
  s.cema.x = s.timenorm.y;
  s.cema.y = rows(s.D);
  s.cema.workspace = memory.take(on_cuda ? s.cema.cuda_bytes() : s.cema.workspace_bytes());
  s.rmsnorm.x = s.cema.y;
  s.rmsnorm.y = rows(s.D);
  s.rmsnorm.rstd = stats(1);

  feed(s.inner[0], s.timenorm.y);
  for (int i = 1; i < 4; ++i) feed(s.inner[i], s.rmsnorm.y);
  for (Linear& linear : s.inner) linear.y = rows(linear.out);
  s.rope.z = s.inner[1].y;
  s.rope.q = rows(s.rope.H * s.rope.S);
  s.rope.k = rows(s.rope.H * s.rope.S);
  s.rope.rstd = stats(s.rope.H);
  s.rope.workspace = memory.take(s.rope.workspace_bytes(on_cuda));
  s.value.a = s.inner[0].y;
  s.value.y = rows(s.E);
  s.attention.q = s.rope.q;
  s.attention.k = s.rope.k;
  s.attention.v = s.value.y;
  s.attention.o = rows(s.E);
  s.attention.workspace = memory.take(s.attention.workspace_bytes(on_cuda));
  s.gate.a = s.inner[2].y;
  s.gate.b = s.attention.o;
  s.gate.y = rows(s.E);
  feed(s.wh2[0], s.gate.y);
  s.wh2[0].added[1] = s.inner[3].y;
  s.wh2[0].y = rows(s.D);

  s.norm.x = s.wh2[0].y;
  s.norm.y = rows(s.D);
  s.norm.mean = stats(1);
  s.norm.rstd = stats(1);
  for (Linear& linear : s.up) {
    feed(linear, s.norm.y);
    linear.y = rows(linear.out);
  }
  s.hidden.a = s.up[0].y;
  s.hidden.b = s.up[1].out == 0 ? nullptr : s.up[1].y;
  s.hidden.y = rows(s.F);
  feed(s.fc2[0], s.hidden.y);
  return memory.used();
}

constexpr int64_t kEndless = int64_t{1} << 62;  // a chunk whose end no position reaches

struct BlockStepTensors {
  const DLTensor *x, *k_cache, *v_cache, *count, *mean, *var, *h, *position;
  const DLTensor *timenorm_weight, *timenorm_bias;
  const DLTensor *cema_alpha, *cema_delta, *cema_theta, *cema_gamma, *cema_omega, *rmsnorm_weight;
  const DLTensor *wv_weight, *wv_bias, *wz_weight, *wz_bias, *wr_weight, *wr_bias, *wh1_weight, *wh1_bias, *wh2_weight;
  const DLTensor *gamma, *beta, *norm_weight, *norm_bias, *fc1_weight, *fc2_weight, *fc3_weight, *ffn_alpha;
  int64_t num_groups, num_heads, chunk_size;
  double rope_base, eps;
  int64_t sliding;
};

static inline BlockStep check_block_step(Checker& c, const BlockStepTensors& in, Outputs&& out) {
  const Tensor x = c.activation("x", in.x, {any("B"), any("D")});
  const DType dtype = x.dtype, stat = stat_dtype(dtype);
  const Dim B = x.dim(0, "B"), D = x.dim(1, "D"), H{"H", in.num_heads}, C{"C", in.chunk_size}, G{"G", in.num_groups};
  c.at_least("num_groups", G.size, 1);
  c.require(D.size % G.size == 0, "num_groups", "a divisor of D = " + std::to_string(D.size) + " (x.shape[1])",
            std::to_string(G.size));
  c.at_least("num_heads", H.size, 1);
  c.at_least("chunk_size", C.size, 1);
  c.positive("rope_base", in.rope_base);
  c.positive("eps", in.eps, stat);
  const Tensor k_cache = c.tensor("k_cache", in.k_cache, dtype, {B, C, H, any("S")});
  const Tensor v_cache = c.tensor("v_cache", in.v_cache, dtype, {B, C, H, any("E")});
  c.require(k_cache.shape[3] % 2 == 0, "k_cache", "[B, C, H, S] with S even",
            "S = " + std::to_string(k_cache.shape[3]));
  const Tensor count = c.tensor("count", in.count, DType::kInt64, {B});
  const Tensor mean = c.tensor("mean", in.mean, stat, {B, G});
  const Tensor var = c.tensor("var", in.var, stat, {B, G});
  const Tensor h = c.tensor("h", in.h, stat, {B, D, any("N"), Dim{"2", 2}});
  const Tensor position = c.tensor("position", in.position, DType::kInt64, {B});
  const Dim S = k_cache.dim(3, "S"), N = h.dim(2, "N");
  const Dim HS{"H S", H.size * S.size}, HE{"H E", H.size * v_cache.shape[3]};
  c.at_least("h.shape[2]", N.size, 1);
  c.apart({k_cache, v_cache, count, mean, var, h}, {x, position});

  BlockStep s{};
  s.B = B.size;
  s.D = D.size;
  s.E = HE.size;
  s.dtype = s.timenorm.dtype = s.cema.dtype = s.rmsnorm.dtype = s.rope.dtype = s.value.dtype = s.attention.dtype =
      s.gate.dtype = s.norm.dtype = s.hidden.dtype = dtype;
  s.timenorm.x = x.data;
  s.timenorm.weight = c.tensor("timenorm_weight", in.timenorm_weight, stat, {D}).data;
  s.timenorm.bias = c.tensor("timenorm_bias", in.timenorm_bias, stat, {D}).data;
  s.timenorm.count = s.count = static_cast<int64_t*>(count.data);
  s.timenorm.mean = s.timenorm.last_mean = mean.data;
  s.timenorm.var = s.timenorm.last_var = var.data;
  s.rmsnorm.R = s.attention.B = s.norm.R = s.B;
  s.timenorm.sequences = s.rope.sequences = Sequences::of_rows(s.B, 1);
  s.timenorm.D = s.cema.D = s.rmsnorm.D = s.norm.D = s.D;
  s.timenorm.G = G.size;
  s.timenorm.eps = s.rmsnorm.eps = s.rope.eps = s.norm.eps = in.eps;

  s.cema.sequences = Sequences::of_rows(s.B, 1);
  s.cema.N = N.size;
  s.cema.algorithm = CemaAlgorithm::kScan;
  s.cema.alpha = c.tensor("cema_alpha", in.cema_alpha, stat, {D, N}).data;
  s.cema.delta = c.tensor("cema_delta", in.cema_delta, stat, {D, N}).data;
  s.cema.theta = c.tensor("cema_theta", in.cema_theta, stat, {D}).data;
  s.cema.gamma = c.tensor("cema_gamma", in.cema_gamma, stat, {D, N, Dim{"2", 2}}).data;
  s.cema.omega = c.tensor("cema_omega", in.cema_omega, stat, {D}).data;
  s.cema.h0 = s.cema.h = h.data;
  s.rmsnorm.weight = c.optional("rmsnorm_weight", in.rmsnorm_weight, stat, {D}).data;

  const auto linear = [&](const char* name, const DLTensor* weight, const Dim& rows, const Dim& columns) {
    Linear one{};
    one.weight = c.tensor(name, weight, dtype, {rows, columns}).data;
    one.out = rows.size;
    one.in = columns.size;
    return one;
  };
  s.inner[0] = linear("wv_weight", in.wv_weight, HE, D);
  s.inner[0].bias = c.tensor("wv_bias", in.wv_bias, dtype, {HE}).data;
  s.inner[1] = linear("wz_weight", in.wz_weight, HS, D);
  s.inner[1].bias = c.tensor("wz_bias", in.wz_bias, dtype, {HS}).data;
  s.inner[2] = linear("wr_weight", in.wr_weight, HE, D);
  s.inner[2].bias = c.tensor("wr_bias", in.wr_bias, dtype, {HE}).data;
  s.inner[3] = linear("wh1_weight", in.wh1_weight, D, D);
  s.inner[3].bias = c.tensor("wh1_bias", in.wh1_bias, dtype, {D}).data;
  s.wh2[0] = linear("wh2_weight", in.wh2_weight, D, HE);
  s.wh2[0].added[0] = x.data;

  s.rope.gamma = c.tensor("gamma", in.gamma, stat, {Dim{"2", 2}, HS}).data;
  s.rope.beta = c.tensor("beta", in.beta, stat, {Dim{"2", 2}, HS}).data;
  s.rope.position = s.attention.position = static_cast<const int64_t*>(position.data);
  s.rope.H = s.attention.H = H.size;
  s.rope.S = s.attention.S = S.size;
  s.attention.C = C.size;
  s.attention.sliding = in.sliding != 0;
  s.rope.C = in.sliding != 0 ? kEndless : C.size;
  s.rope.rope_base = in.rope_base;
  s.rope.divide(c.on_cuda());
  s.value.n = s.gate.n = s.B * s.E;
  s.attention.k_cache = k_cache.data;
  s.attention.v_cache = v_cache.data;
  s.attention.E = v_cache.shape[3];
  s.attention.divide(c.on_cuda());

  const Tensor norm_weight = c.optional("norm_weight", in.norm_weight, stat, {D});
  const Tensor norm_bias = c.optional("norm_bias", in.norm_bias, stat, {D});
  c.require(norm_weight.present == norm_bias.present, "norm_weight and norm_bias", "given both or neither",
            norm_weight.present ? "norm_weight alone" : "norm_bias alone");
  s.norm.weight = norm_weight.data;
  s.norm.bias = norm_bias.data;
  const Tensor fc1 = c.tensor("fc1_weight", in.fc1_weight, dtype, {any("F"), D});
  const Dim F = fc1.dim(0, "F");
  s.F = F.size;
  s.up[0] = linear("fc1_weight", in.fc1_weight, F, D);
  s.fc2[0] = linear("fc2_weight", in.fc2_weight, D, F);
  if (in.fc3_weight != nullptr) s.up[1] = linear("fc3_weight", in.fc3_weight, F, D);
  s.hidden.n = s.B * s.F;
  s.fc2[0].scale = c.optional("ffn_alpha", in.ffn_alpha, dtype, {D}).data;
  s.fc2[0].added[0] = x.data;
  s.fc2[0].y = out.like(c, "y", x);
  const int64_t bytes = connect_block_step(s, c.on_cuda(), nullptr);
  connect_block_step(s, c.on_cuda(), out.workspace(c, bytes));
  return s;
}

}  // namespace megalodon

MEGALODON_KERNEL_BF16(block_step_forward, BlockStep)
