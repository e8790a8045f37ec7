"""Queries and keys of normalised attention, arXiv 2404.08801, rotated as in the released code."""

import math

import torch
from torch import Tensor

from ._common import per_segment, row, stat_dtype
from .rms_norm import rms_norm


def rotate(u: Tensor, position: Tensor, rope_base: float) -> Tensor:
    """Rotate the adjacent pair (2j, 2j + 1) of the last axis by position * rope_base^(-2j/S).

    Shapes: u (B, L, H, S); position (B, L).
    """
    S = u.shape[-1]
    pair = torch.arange(0, S, 2, dtype=torch.float64, device=u.device)
    angle = position[..., None, None] * rope_base ** (-pair / S)
    cos, sin = angle.cos().to(u.dtype), angle.sin().to(u.dtype)
    u0, u1 = u[..., 0::2], u[..., 1::2]
    return torch.stack((u0 * cos - u1 * sin, u0 * sin + u1 * cos), -1).flatten(-2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the shared z per head, scale and shift it into queries and keys, rotate both.

        zn = z rstd,   rstd = 1 / sqrt(mean(z^2) + eps) over the S components of a head
        q = rope(zn (gamma_0 + 1) / sqrt(S) + beta_0)
        k = rope(zn (gamma_1 + 1) / sqrt(S) + beta_1)

    rope turns token t of row b by its place in its chunk, (position[b] + t) mod chunk_size.

    Shapes: z (B, L, H S); gamma, beta (2, H S), row 0 for q and row 1 for k; position (B) int64,
    the absolute position of each row's first token (0 if None). Returns q, k (B, L, H, S) in z's
    dtype and rstd (B, L, H). With cu_seqlens (segments + 1), z is (1, T, H S), every segment is run
    alone, and position is (segments). Differentiable in z, gamma, beta.
    """
    if cu_seqlens is not None:
        sizes = num_heads, chunk_size, rope_base
        return per_segment(
            lambda i, t: qk_norm_rope(z[:, t], gamma, beta, *sizes, row(position, i), eps),
            cu_seqlens,
            dims=(1, 1, 1),
        )
    stat = stat_dtype(z)
    B, L, _ = z.shape
    heads = (num_heads, z.shape[-1] // num_heads)
    if position is None:
        position = torch.zeros(B, dtype=torch.int64, device=z.device)
    in_chunk = (position[:, None] + torch.arange(L, device=z.device)) % chunk_size

    zn, rstd = rms_norm(torch.unflatten(z.to(stat), -1, heads), eps=eps)
    scale = torch.unflatten((gamma.to(stat) + 1) / math.sqrt(heads[1]), -1, heads)
    shift = torch.unflatten(beta.to(stat), -1, heads)
    q, k = (rotate(zn * scale[i] + shift[i], in_chunk, rope_base).to(z.dtype) for i in (0, 1))
    return q, k, rstd
