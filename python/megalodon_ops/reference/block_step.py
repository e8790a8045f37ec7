"""One decoding step of a block, arXiv 2404.08801 section 3."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import stat_dtype
from .cema import cema
from .chunk_attention_step import chunk_attention_step
from .layer_norm import layer_norm
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .silu_mul import silu_mul
from .timestep_norm import timestep_norm


@torch.no_grad()
def block_step(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    h: Tensor,
    position: Tensor,
    timenorm_weight: Tensor,
    timenorm_bias: Tensor,
    cema_alpha: Tensor,
    cema_delta: Tensor,
    cema_theta: Tensor,
    cema_gamma: Tensor,
    cema_omega: Tensor,
    rmsnorm_weight: Tensor | None,
    wv_weight: Tensor,
    wv_bias: Tensor,
    wz_weight: Tensor,
    wz_bias: Tensor,
    wr_weight: Tensor,
    wr_bias: Tensor,
    wh1_weight: Tensor,
    wh1_bias: Tensor,
    wh2_weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc3_weight: Tensor | None,
    ffn_alpha: Tensor | None,
    num_groups: int,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    sliding: bool = False,
) -> Tensor:
    """One token per row through `MegaAttention` and `FFN`.

    Shapes: x (B, D); k_cache (B, C, H, S), v_cache (B, C, H, E), count (B), mean and var (B, G), h
    (B, D, N, 2), all changed in place; position (B) int64. Returns y (B, D) in x's dtype. Not
    differentiable.
    """
    stat = stat_dtype(x)

    def linear(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = F.linear(u.to(stat), weight.to(stat), None if bias is None else bias.to(stat))
        return product.to(x.dtype)

    t, *norm_state, _, _ = timestep_norm(
        x[:, None], timenorm_weight, timenorm_bias, num_groups, eps, count, mean, var
    )
    averaged, state = cema(t, cema_alpha, cema_delta, cema_theta, cema_gamma, cema_omega, h)
    mx, _ = rms_norm(averaged, rmsnorm_weight, eps)
    z = linear(mx, wz_weight, wz_bias)
    turn = 2**62 if sliding else chunk_size  # of a window, the position is the absolute one
    q, k, _ = qk_norm_rope(z, gamma, beta, num_heads, turn, rope_base, position, eps)
    v = silu_mul(linear(t, wv_weight, wv_bias))[:, 0]
    heads = v.shape[0], num_heads, v_cache.shape[3]
    o = chunk_attention_step(
        q[:, 0], k[:, 0], v.reshape(heads), k_cache, v_cache, position, chunk_size, sliding
    )
    for old, new in zip((count, mean, var, h), (*norm_state, state), strict=True):
        old.copy_(new)

    gated = silu_mul(linear(mx, wr_weight, wr_bias)[:, 0], o.flatten(1))
    attended = linear(mx[:, 0], wh1_weight, wh1_bias) + linear(gated, wh2_weight)
    u, _, _ = layer_norm(x + attended, norm_weight, norm_bias, eps)
    hidden = silu_mul(linear(u, fc1_weight), None if fc3_weight is None else linear(u, fc3_weight))
    out = linear(hidden, fc2_weight)
    return x + (out if ffn_alpha is None else ffn_alpha * out)
