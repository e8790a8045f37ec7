"""One decoding step of chunk attention, arXiv 2404.08801."""

import math

import torch
from torch import Tensor

from ._common import stat_dtype


@torch.no_grad()
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
    """Put one token per row into its running chunk's caches and let it attend to what they hold.

        m = position mod C,   k_cache[m] = k,   v_cache[m] = v
        o = sum_{j <= m} softmax_j(q . k_cache[j]) v_cache[j]

    Shapes: q, k (B, H, S); v (B, H, E); k_cache (B, C, H, S), v_cache (B, C, H, E), changed in
    place; position (B) int64 and C = chunk_size. Slots above m are not read; sliding, all that have
    been written are, which is every slot from position C - 1 on. Returns o (B, H, E) in
    q's dtype. Not differentiable.
    """
    stat = stat_dtype(q)
    row, m = torch.arange(q.shape[0], device=q.device), position % chunk_size
    k_cache[row, m] = k
    v_cache[row, m] = v

    last = position.clamp(max=chunk_size - 1) if sliding else m
    unread = torch.arange(chunk_size, device=q.device) > last[:, None]
    values = v_cache.to(stat).masked_fill(unread[..., None, None], 0)
    scores = torch.einsum("bhs,bjhs->bhj", q.to(stat), k_cache.to(stat))
    weights = scores.masked_fill(unread[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhj,bjhe->bhe", weights, values).to(q.dtype)
