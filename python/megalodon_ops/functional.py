"""Friendly functions on the ops: differentiable, states as values, official parameter shapes
accepted.

Activations are float32, bfloat16, float16 or float64. Parameters, states and statistics ("stat"
below) are float32, or float64 where the activation is. Every function raises ValueError for a wrong
shape or number and TypeError for a wrong dtype, naming op, argument, wanted and got. Equations are
those of arXiv 2404.08801 as the released code computes them (docs/deviations.md).

``cu_seqlens`` (segments + 1), int32 or int64, ascending from 0 to T, packs: the tokens
cu_seqlens[i] .. cu_seqlens[i + 1] - 1 of one row (1, T, ...) are a sequence of their own, computed
as if it were alone, and states and positions, in and out, have a row per segment instead of per
row of a batch. Its values are checked on the CPU; on a GPU wrong ones give wrong results, never
access outside the tensors.

Derivatives are the first, in reverse mode: torch.autograd, and grad, vjp and jacrev of torch.func.
Forward mode and second derivatives raise NotImplementedError.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TimestepNormState",
    "block_step",
    "cema",
    "cema_kernel",
    "chunk_attention",
    "chunk_attention_step",
    "fft_conv",
    "layer_norm",
    "linear_step",
    "normalized_attention",
    "qk_norm_rope",
    "rms_norm",
    "silu_mul",
    "timestep_norm",
]

_ops = torch.ops.megalodon


class TimestepNormState(NamedTuple):
    """The running statistics of timestep_norm: steps seen, mean and biased variance per group."""

    count: Tensor  # type: ignore[assignment]  # (B) int64; hides tuple.count
    mean: Tensor  # (B, G) stat
    var: Tensor  # (B, G) stat


def _squeeze(parameter: Tensor, ndim: int) -> Tensor:
    """The official (D, N, 1), (D, 1, 1) and (D, 1) as (D, N), (D) and (D)."""
    while parameter.ndim > ndim and parameter.shape[-1] == 1:
        parameter = parameter.squeeze(-1)
    return parameter


def block_step(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: TimestepNormState,
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
    """One decoding step of a whole block, with its state updated in place.

    What a `Block` computes from one token per row, in one call: t = timestep_norm(x), mx =
    rms_norm(cema(t)); q, k from Wz mx, v = silu(Wv t); o = chunk_attention_step(q, k, v); y1 = x +
    Wh1 mx + Wh2 (silu(Wr mx) o); u = layer_norm(y1); x + ffn_alpha W2 (silu(W1 u) W3 u).

    Args:
        x: (B, D) activation.
        k_cache, v_cache: (B, C, H, S), (B, C, H, E) activation; written at slot position % C.
        norm: count (B) int64, mean and var (B, G) stat, of :func:`timestep_norm`; written.
        h: (B, D, N, 2) stat, of :func:`cema`; written.
        position: (B) int64, steps before this one; rows may differ.
        timenorm_weight, timenorm_bias: (D) stat.
        cema_alpha, cema_delta, cema_theta, cema_gamma, cema_omega: as in :func:`cema`.
        rmsnorm_weight: (D) stat, or None.
        wv_weight, wr_weight: (H E, D) activation, as all weights; their biases (H E).
        wz_weight: (H S, D); its bias (H S). wh1_weight: (D, D); its bias (D).
        wh2_weight: (D, H E).
        gamma, beta: (2, H S) stat, as in :func:`qk_norm_rope`.
        norm_weight, norm_bias: (D) stat, of the layer norm; both or neither.
        fc1_weight, fc3_weight: (F, D); fc3_weight is None without a gate. fc2_weight: (D, F).
        ffn_alpha: (D) activation, or None.
        num_groups, num_heads, chunk_size: G, H, C.
        rope_base: of the rotary frequencies.
        eps: of every norm.
        sliding: attend to the last C tokens, rotary positions being absolute, instead of the chunk.

    Returns:
        y (B, D) like x. For inference: not differentiable. It is meant for up to some hundred rows:
        its products of all rows with a weight are not those of a GEMM library.

    Source: section 3 of the paper.
    """
    y: Tensor = _ops.block_step(
        x,
        k_cache,
        v_cache,
        *norm,
        h,
        position,
        timenorm_weight,
        timenorm_bias,
        _squeeze(cema_alpha, 2),
        _squeeze(cema_delta, 2),
        _squeeze(cema_theta, 1),
        cema_gamma,
        _squeeze(cema_omega, 1),
        rmsnorm_weight,
        wv_weight,
        wv_bias,
        wz_weight,
        wz_bias,
        wr_weight,
        wr_bias,
        wh1_weight,
        wh1_bias,
        wh2_weight,
        gamma,
        beta,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc2_weight,
        fc3_weight,
        ffn_alpha,
        num_groups,
        num_heads,
        chunk_size,
        rope_base,
        eps,
        sliding,
    )
    return y


def cema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    algorithm: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Complex exponential moving average over time, with N wavelets per channel.

    With ``a = sigmoid(alpha)``, ``q = (1 - a sigmoid(delta)) exp(2 pi i n sigmoid(theta) / N)`` and
    ``g = gamma / sqrt(N)``::

        h_t = a x_t + q h_{t-1},        y_t = Re sum_n g h_t  +  omega x_t

    Args:
        x: (B, L, D) activation, any L.
        alpha, delta: (D, N) or (D, N, 1) stat, before their sigmoids.
        theta: (D) or (D, 1, 1) stat, before its sigmoid.
        gamma: (D, N, 2) stat, real and imaginary part.
        omega: (D) or (D, 1) stat, weight of the input in the output.
        state: (B, D, N, 2) stat, h after the previous call; None is zero.
        algorithm: "scan", "fft", or "auto", the faster of the two by measurement (on a GPU the
            scan; "fft" is the scan there, too, where a state or its gradient is given, and
            everywhere where cu_seqlens is).
        cu_seqlens: bounds of the segments of a packed row x (1, T, D), as this module says.

    Returns:
        y (B, L, D) like x, and the state h (B, D, N, 2) after the last step. Differentiable in all
        tensors, states included. Calling it on the parts of a sequence, each with the state of the
        one before, equals one call.

    Source: section 3.1 of the paper; the input is not rotated, as in the released code.
    """
    y, h = _ops.cema(
        x,
        _squeeze(alpha, 2),
        _squeeze(delta, 2),
        _squeeze(theta, 1),
        gamma,
        _squeeze(omega, 1),
        state,
        cu_seqlens,
        algorithm,
    )
    return y, h


def cema_kernel(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int) -> Tensor:
    """The impulse response of cema without omega: ``k[d, t] = Re sum_n a g q^t``.

    Args:
        alpha, delta, theta, gamma: as for :func:`cema`, all float32 or all float64.
        length: number of steps, >= 0.

    Returns:
        k (D, length), of the parameters' dtype. Differentiable in all four.

    Source: section 3.1 of the paper.
    """
    k: Tensor = _ops.cema_kernel(
        _squeeze(alpha, 2), _squeeze(delta, 2), _squeeze(theta, 1), gamma, length
    )
    return k


def fft_conv(x: Tensor, k: Tensor) -> Tensor:
    """Causal long convolution by FFT: ``y[b, t, d] = sum_{s <= t} k[d, t - s] x[b, s, d]``.

    Args:
        x: (B, L, D) activation, any L; padded inside, so never circular.
        k: (D, L) stat.

    Returns:
        y (B, L, D) like x. Differentiable in both.
    """
    y: Tensor = _ops.fft_conv(x, k)
    return y


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | tuple[Tensor, Tensor, Tensor] | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, TimestepNormState]:
    """Group norm with statistics over all steps so far, the current one included.

    With the mean and biased variance of all values of the group in steps 0..t, M_t and V_t::

        y_t = (x_t - M_t) / sqrt(V_t + eps) * (weight + 1) + bias

    Args:
        x: (B, L, D) activation, any L.
        weight, bias: (D) stat. Note the ``+ 1``.
        num_groups: G, groups of D / G consecutive channels; must divide D.
        eps: added to the variance; positive.
        state: the statistics after the previous call; None is none seen.
        padding_mask: (B, L) bool, True = padded: the step gives 0 and leaves the statistics alone.
        cu_seqlens: bounds of the segments of a packed row x (1, T, D), as this module says.

    Returns:
        y (B, L, D) like x, and the statistics after the last step. Differentiable in x, weight,
        bias and the state's mean and variance.

    Source: section 3.2 of the paper.
    """
    if state is not None and len(state) != 3:
        raise ValueError(
            f"timestep_norm: state must be (count, mean, var); got {len(state)} of them"
        )
    count, mean, var = (None, None, None) if state is None else state
    y, count, mean, var, _, _ = _ops.timestep_norm(
        x, weight, bias, num_groups, eps, count, mean, var, padding_mask, cu_seqlens
    )
    return y, TimestepNormState(count, mean, var)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last dimension.

    ``y = x / sqrt(mean(x^2) + eps) * (weight + 1)``

    Args:
        x: (..., D) activation.
        weight: (D) stat, or None for scale 1. Note the ``+ 1``.
        eps: added to the mean square; positive.

    Returns:
        y, like x. Differentiable in x and weight.

    Source: section 3.3 of the paper (normalisation), with the released code's ``weight + 1``.
    """
    y: Tensor = _ops.rms_norm(x, weight, eps)[0]
    return y


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the last dimension: ``y = (x - mean) / sqrt(var + eps) * (weight + 1) +
    bias``.

    Args:
        x: (..., D) activation.
        weight, bias: (D) stat, both or neither. Note the ``+ 1``.
        eps: added to the biased variance; positive.

    Returns:
        y, like x. Differentiable in x, weight and bias.
    """
    y: Tensor = _ops.layer_norm(x, weight, bias, eps)[0]
    return y


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` for the few rows of a decoding step.

    Args:
        x: (B, in) activation.
        weight: (out, in) like x.
        bias: (out) like x, or None.

    Returns:
        y (B, out) like x. For inference: not differentiable. Fast for up to some hundred rows.
    """
    y: Tensor = _ops.linear_step(x, weight, bias)
    return y


def silu_mul(a: Tensor, b: Tensor | None = None) -> Tensor:
    """``silu(a) * b``, or ``silu(a)``, with ``silu(u) = u / (1 + exp(-u))``.

    Args:
        a: activation of any shape.
        b: like a, or None.

    Returns:
        y, like a. Differentiable in both.
    """
    y: Tensor = _ops.silu_mul(a, b)
    return y


def qk_norm_rope(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    position: Tensor | None = None,
    eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of normalized attention from their shared representation z.

    Per head, with ``zn = z / sqrt(mean(z^2) + eps)``::

        q = rope(zn (gamma[0] + 1) / sqrt(S) + beta[0]),    k = the same with gamma[1], beta[1]

    rope turns adjacent pairs (2j, 2j + 1) by the angle ``p rope_base^(-2j / S)``, p being the
    position inside the chunk.

    Args:
        z: (B, L, H * S) activation, S even.
        gamma, beta: (2, H * S) stat; row 0 for queries, row 1 for keys.
        num_heads: H.
        chunk_size: C; positions restart at multiples of it.
        rope_base: base of the rotation's frequencies.
        position: (B) int64, steps before this call, or None for 0.
        eps: added to the mean square; positive.
        cu_seqlens: bounds of the segments of a packed row z (1, T, H * S), as this module says;
            positions begin anew with each.

    Returns:
        q, k: (B, L, H, S) like z. Differentiable in z, gamma and beta.

    Source: section 3.3 of the paper.
    """
    q, k, _ = _ops.qk_norm_rope(
        z, gamma, beta, num_heads, chunk_size, rope_base, position, eps, cu_seqlens
    )
    return q, k


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    dropout_p: float = 0.0,
    seed: int = 0,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding: bool = False,
    dropout_mode: str = "key",
) -> Tensor:
    """Causal softmax attention inside chunks of C steps: ``o_t = sum_s softmax_s(q_t . k_s) v_s``.

    s runs over the steps up to t of t's own chunk. Scores are not scaled.

    Args:
        q, k: (B, L, H, S) activation, any L.
        v: (B, L, H, E) activation.
        chunk_size: C, >= 1.
        dropout_p: probability with which a key, or its weight, is dropped.
        seed: of the dropped keys; the same seed drops the same keys.
        k_cache, v_cache: (B, C, H, S), (B, C, H, E): keys and values of the running chunk, of which
            the first ``position % C`` count; given together with position.
        position: (B) int64, steps before this call.
        cu_seqlens: bounds of the segments of a packed row, q, k (1, T, H, S), v (1, T, H, E), as
            this module says; each has chunks of its own.
        sliding: a window instead of chunks: s runs over the C steps up to and including t. The
            caches then hold the last C steps before this call, step p in slot p % C. On a GPU not
            implemented yet for more than one step.
        dropout_mode: "key" drops keys before the softmax (DropKey); "weight" weights after it, of
            which the others are divided by 1 - dropout_p.

    Returns:
        o (B, L, H, E) like v. A row with every key dropped is 0. Differentiable in q, k, v and the
        caches.

    Source: section 3.3 of the paper.
    """
    o: Tensor = _ops.chunk_attention(
        *(q, k, v, chunk_size, dropout_p, seed, cu_seqlens, k_cache, v_cache, position),
        *(sliding, dropout_mode),
    )[0]
    return o


def chunk_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    chunk_size: int,
    sliding: bool = False,
) -> Tensor:
    """One step of :func:`chunk_attention` for decoding, with the caches updated in place.

    Args:
        q, k: (B, H, S) activation, after rope.
        v: (B, H, E) activation.
        k_cache, v_cache: (B, C, H, S), (B, C, H, E); k and v are written to slot position % C.
        position: (B) int64, steps before this one; rows may differ.
        chunk_size: C.
        sliding: attend to the last C tokens instead of those of the chunk.

    Returns:
        o (B, H, E) like v. For inference: not differentiable.
    """
    o: Tensor = _ops.chunk_attention_step(q, k, v, k_cache, v_cache, position, chunk_size, sliding)
    return o


def normalized_attention(
    z: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
) -> Tensor:
    """Normalized attention of whole sequences: :func:`qk_norm_rope`, then :func:`chunk_attention`.

    Args:
        z: (B, L, H * S) activation.
        v: (B, L, H * E) activation.
        gamma, beta: (2, H * S) stat.
        num_heads, chunk_size, rope_base, eps: as for :func:`qk_norm_rope`.

    Returns:
        o (B, L, H * E) like v. Differentiable in z, v, gamma and beta.
    """
    q, k = qk_norm_rope(z, gamma, beta, num_heads, chunk_size, rope_base, eps=eps)
    if v.ndim != 3 or v.shape[2] % num_heads:
        raise ValueError(
            f"normalized_attention: v must be [B, L, H * E] with H = {num_heads}; "
            f"got {list(v.shape)}"
        )
    o = chunk_attention(q, k, v.unflatten(2, (num_heads, -1)), chunk_size)
    return o.flatten(2)
