"""MegaAttention: timestep norm, CEMA, normalised chunk attention and its gate."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import functional as F
from ..config import MegalodonConfig
from ..functional import TimestepNormState
from ..state import LayerState
from .cema import CEMA
from .init import Linear
from .norms import RMSNorm, TimestepNorm
from .packing import Packing
from .precision import KeepsPrecision, activation_dtype, wide_zeros


class MegaAttention(KeepsPrecision):
    """x + Wh1 mx + Wh2 (o * r): the attention sub-layer with its residual.

    arXiv 2404.08801 section 3.3, as the released code computes it:

        t = TimestepNorm(x);  mx = RMSNorm(CEMA(t))
        q, k = rope(normalised Wz mx, times gamma + 1, plus beta);  v = silu(Wv t)
        r = silu(Wr mx);  o = causal softmax attention inside chunks, or in a sliding window

    Parameters besides the children's: gamma and beta (2, S), row 0 for q and row 1 for k, both
    initially 0.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.value_head_dim = config.value_head_dim
        self.chunk_size = config.chunk_size
        self.sliding = config.is_sliding
        self.rope_chunk = config.rope_chunk
        self.rope_base = config.rope_base_value
        self.eps = config.norm_eps
        self.attention_dropout = config.attention_dropout
        self.attention_dropout_mode = config.attention_dropout_mode
        dim, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        mode = config.init_mode

        self.timenorm = TimestepNorm(dim, config.norm_num_groups, eps=config.norm_eps)
        self.cema = CEMA(dim, config.cema_ndim)
        self.rmsnorm = RMSNorm(dim, config.norm_eps, config.norm_affine)
        self.wv = Linear(dim, value_dim, bias=True, init_mode=mode)
        self.wz = Linear(dim, z_dim, bias=True, init_mode=mode)
        self.wr = Linear(dim, value_dim, bias=True, init_mode=mode)
        self.wh1 = Linear(dim, dim, bias=True, init_mode=mode)
        self.wh2 = Linear(value_dim, dim, bias=False, init_mode=mode)
        self.gamma = nn.Parameter(wide_zeros(2, z_dim))
        self.beta = nn.Parameter(wide_zeros(2, z_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        position: Tensor | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        packing: Packing | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Run the sub-layer on x, after the tokens that `state` summarises.

        Args:
            x: (B, L, D), any L.
            state: what an earlier call returned; None starts at position 0.
            position: (B) int64, tokens consumed before x; given exactly where state is.
            return_state: whether to make the state after x.
            inplace_state: write it into `state`'s own tensors (no gradients).
            packing: the segments of a packed row x (1, T, D); state and position then have a row
                per segment.

        Returns:
            (B, L, D) of x's dtype, and the new state, or None without `return_state`.
        """
        old_norm, old_h = (None, None) if state is None else (state.norm, state.h)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        t, norm = self.timenorm(x.to(activation_dtype(x)), old_norm, cu_seqlens=cu_seqlens)
        averaged, h = self.cema(t, old_h, cu_seqlens)
        mx = self.hidden_dropout(self.rmsnorm(averaged))

        q, k = F.qk_norm_rope(
            self.wz(mx),
            self.gamma,
            self.beta,
            self.num_heads,
            self.rope_chunk,
            self.rope_base,
            position,
            self.eps,
            cu_seqlens,
        )
        v = F.silu_mul(self.wv(t))
        v = v.view(*v.shape[:2], self.num_heads, self.value_head_dim)
        o, caches = self._attend(q, k, v, state, position, return_state, inplace_state, packing)

        gated = self.hidden_dropout(F.silu_mul(self.wr(mx), o.flatten(-2)))
        out = x + self.dropout(self.wh1(mx) + self.wh2(gated))
        if caches is None:
            return out, None
        if inplace_state and state is not None:
            _overwrite_norm(state.norm, norm)
            state.h.copy_(h)
            return out, state
        return out, LayerState(*caches, norm, h)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        position: Tensor | None,
        return_state: bool,
        inplace_state: bool,
        packing: Packing | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Attention and, where a state is wanted, the caches after it."""
        dropout_p = self.attention_dropout if self.training else 0.0
        seed = _draw_seed() if dropout_p > 0.0 else 0
        attend = functools.partial(
            F.chunk_attention,
            *(q, k, v, self.chunk_size, dropout_p, seed),
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            sliding=self.sliding,
            dropout_mode=self.attention_dropout_mode,
        )
        if state is None or position is None:
            o = attend()
            if not return_state:
                return o, None
            rows = q.shape[0] if packing is None else packing.segments
            k_cache = k.new_zeros(rows, self.chunk_size, *k.shape[2:])
            v_cache = v.new_zeros(rows, self.chunk_size, *v.shape[2:])
            start = torch.zeros(rows, dtype=torch.int64, device=q.device)
            return o, self._write(k_cache, v_cache, k, v, start, False, packing)

        k_cache, v_cache = state.k_cache, state.v_cache
        is_step = q.shape[1] == 1 and packing is None and return_state and dropout_p == 0.0
        if is_step and not _tracked(q, k, v, state):
            if not inplace_state:
                k_cache, v_cache = k_cache.clone(), v_cache.clone()
            o = F.chunk_attention_step(
                q[:, 0], k[:, 0], v[:, 0], k_cache, v_cache, position, self.chunk_size, self.sliding
            )
            return o.unsqueeze(1), (k_cache, v_cache)
        o = attend(k_cache=k_cache, v_cache=v_cache, position=position)
        if not return_state:
            return o, None
        return o, self._write(k_cache, v_cache, k, v, position, inplace_state, packing)

    def _write(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        inplace: bool,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor]:
        """Put a sequence's last C keys and values, at most, into slots (position + t) % C."""
        length, chunk = k.shape[1], self.chunk_size
        if packing is None:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            kept = min(length, chunk)  # more would write a slot twice
            steps = torch.arange(length - kept, length, device=k.device)
            slots = (position[:, None] + steps) % chunk
            k_tail, v_tail = k[:, length - kept :], v[:, length - kept :]
        else:
            tokens, rows, steps = packing.tails(chunk)
            slots = (position[rows] + steps) % chunk
            k_tail, v_tail = k[0, tokens], v[0, tokens]
        if inplace:
            return (
                k_cache.index_put_((rows, slots), k_tail),
                v_cache.index_put_((rows, slots), v_tail),
            )
        return (
            k_cache.index_put((rows, slots), k_tail),
            v_cache.index_put((rows, slots), v_tail),
        )


def _draw_seed() -> int:
    """A DropKey seed from torch's default generator: on the CPU, so that no device is waited for.

    Checkpointing restores that generator before it recomputes, and so draws the same seed again.
    """
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))


def _tracked(q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> bool:
    """Whether autograd records what is done with these (the one-token kernel has no backward)."""
    tensors = (q, k, v, state.k_cache, state.v_cache)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _overwrite_norm(state: TimestepNormState, new: TimestepNormState) -> None:
    for mine, value in zip(state, new, strict=True):
        mine.copy_(value)
