"""Causal attention inside chunks, arXiv 2404.08801, with the DropKey of the released code."""

import math

import torch
from torch import Tensor

from ._common import per_segment, row, stat_dtype

WORD = 0xFFFFFFFF


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11): four random words from a counter and a key.

    Counter words are int64 tensors holding values in [0, 2^32), broadcast together; so are the
    results.
    """

    def multiply(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
        low = m * (c & 0xFFFF)
        high = m * (c >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def dropkey_mask(
    seed: int, dropout_p: float, num_heads: int, i: Tensor, j: Tensor, first_row: int = 0
) -> Tensor:
    """Which keys each query drops.

    For row b, head h, query position i and key position j (absolute in the row, so a row cut into
    calls draws what the whole row draws), all as uint32:

        words = philox4x32-10(counter = (j >> 2, i, h, b), key = (seed mod 2^32, seed div 2^32))
        dropped = words[j & 3] < floor(dropout_p * 2^32)

    seed is an int64, taken as its 64 bits; dropout_p in [0, 1). i (B, Lq), j (B, Lk) int64; b
    counts from first_row. Returns (B, H, Lq, Lk) bool.
    """
    i, j = i[:, None, :, None] & WORD, j[:, None, None, :] & WORD
    h = torch.arange(num_heads, device=i.device)[:, None, None]
    b = torch.arange(first_row, first_row + i.shape[0], device=i.device)[:, None, None, None]
    words = philox4x32_10((j >> 2, i, h, b), (seed & WORD, seed >> 32 & WORD))
    lane = j & 3
    pair0 = torch.where(lane == 0, words[0], words[1])
    pair1 = torch.where(lane == 2, words[2], words[3])
    return torch.where(lane < 2, pair0, pair1) < math.floor(dropout_p * 2**32)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    dropout_p: float = 0.0,
    seed: int = 0,
    cu_seqlens: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    position: Tensor | None = None,
    sliding: bool = False,
    dropout_mode: str = "key",
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention among the tokens of each chunk, nothing across chunks.

        o_i = sum_j softmax_j(q_i . k_j) v_j,   j <= i in the chunk of i, not dropped

    Sliding, j is any of the C tokens i - C + 1 .. i instead, and the caches hold the last C tokens
    before, position p in slot p mod C. dropout_mode "key" drops keys before the softmax, "weight"
    weights after it, of which the others are divided by 1 - dropout_p.

    Token t of row b stands at position[b] + t; chunk c holds the positions c C .. c C + C - 1 with
    C = chunk_size. The m = position[b] mod C tokens of the running chunk that came before are
    k_cache[b, :m], v_cache[b, :m]; later slots are not read. Scores are not scaled and what remains
    after DropKey is not rescaled. A query without keys gives o = 0, lse = -inf.

    Shapes: q, k (B, L, H, S); v (B, L, H, E); k_cache (B, C, H, S), v_cache (B, C, H, E) and
    position (B) int64 together or not at all. Returns o (B, L, H, E) in q's dtype and lse (B, H,
    L), the logarithm of each softmax's denominator. With cu_seqlens (segments + 1), q, k and v are
    (1, T, H, S or E), every segment is run alone (its number is b for DropKey), and the caches and
    position have a row per segment. Differentiable in q, k, v, k_cache, v_cache; o only, not lse.
    """
    options = chunk_size, dropout_p, seed, sliding, dropout_mode
    if cu_seqlens is not None:

        def alone(i: int, t: slice) -> tuple[Tensor, Tensor]:
            state = row(k_cache, i), row(v_cache, i), row(position, i)
            return _attend(q[:, t], k[:, t], v[:, t], *options, *state, i)

        return per_segment(alone, cu_seqlens, dims=(1, 2))
    return _attend(q, k, v, *options, k_cache, v_cache, position, 0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    dropout_p: float,
    seed: int,
    sliding: bool,
    dropout_mode: str,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    position: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """chunk_attention of rows that DropKey knows as first_row, first_row + 1, .."""
    stat = stat_dtype(q)
    B, L, H, _ = q.shape
    C = chunk_size
    if position is None:
        position = torch.zeros(B, dtype=torch.int64, device=q.device)
    i = j = position[:, None] + torch.arange(L, device=q.device)
    if k_cache is not None and v_cache is not None:
        slot = torch.arange(C, device=q.device)
        # The position that a slot holds; where that is no key of a token here, -1.
        before = position[:, None] - 1
        cached = before - (before - slot) % C if sliding else position[:, None] // C * C + slot
        filled = (cached >= 0) & (cached < position[:, None])
        unread = ~filled[..., None, None]
        k = torch.cat((k_cache.masked_fill(unread, 0), k), 1)
        v = torch.cat((v_cache.masked_fill(unread, 0), v), 1)
        j = torch.cat((torch.where(filled, cached, -1), i), 1)

    query, key = i[:, None, :, None], j[:, None, None, :]
    in_chunk = key > query - C if sliding else key.div(C, rounding_mode="floor") == query // C
    hidden = (key < 0) | (key > query) | ~in_chunk
    kept = torch.ones_like(hidden)
    if dropout_p > 0:
        kept = ~dropkey_mask(seed, dropout_p, H, i, j, first_row)
    if dropout_mode == "key":
        hidden = hidden | ~kept

    scores = torch.einsum("bihs,bjhs->bhij", q.to(stat), k.to(stat)).masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1).masked_fill(hidden | ~kept, 0)
    if dropout_mode == "weight":
        weights = weights / (1 - dropout_p)
    o = torch.einsum("bhij,bjhe->bihe", weights, v.to(stat))
    return o.to(q.dtype), scores.detach().logsumexp(-1)
