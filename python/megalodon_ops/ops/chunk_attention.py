"""chunk_attention: causal softmax attention inside chunks, with DropKey and caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
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
    B, L, H, _ = q.shape
    return like(v), stat(q, B, H, L)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    chunk_size: int,
    dropout_p: float,
    seed: int,
    cu_seqlens: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    position: Tensor | None,
    sliding: bool,
    dropout_mode: str,
) -> tuple[Tensor, ...]:
    return like(q), like(k), like(v), like(k_cache, of=k), like(v_cache, of=v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, chunk_size, dropout_p, seed, cu_seqlens, *state, sliding, mode = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, *state)
    ctx.sizes, ctx.modes = (chunk_size, dropout_p, seed), (sliding, mode)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    import torch

    q, k, v, o, lse, cu_seqlens, k_cache, v_cache, position = ctx.saved_tensors
    dq, dk, dv, dk_cache, dv_cache = torch.ops.megalodon.chunk_attention_backward(
        *(dout, q, k, v, o, lse, *ctx.sizes, cu_seqlens, k_cache, v_cache, position, *ctx.modes)
    )
    caches = (dk_cache, dv_cache) if k_cache is not None else (None, None)
    return dq, dk, dv, None, None, None, None, *caches, None, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    import torch

    def inputs(B: int, L: int, H: int, S: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
        q = make.activation(B, L, H, S) * S**-0.5
        return q, make.activation(B, L, H, S), make.activation(B, L, H, E)

    def caches(B: int, C: int, H: int, S: int, E: int) -> tuple[Tensor, Tensor]:
        return make.activation(B, C, H, S), make.activation(B, C, H, E)

    yield Sample("plain", (*inputs(2, 11, 2, 8, 12), 4, 0.0, 0, None, None, None, None))
    yield Sample("dropout", (*inputs(1, 70, 2, 6, 5), 64, 0.25, -7, None, None, None, None))
    yield Sample(
        "caches",
        (*inputs(3, 9, 1, 4, 36), 8, 0.0, 0, None, *caches(3, 8, 1, 4, 36), make.ints(0, 5, 23)),
    )
    yield Sample(
        "caches and dropout",
        (*inputs(2, 7, 3, 2, 3), 6, 0.5, 99, None, *caches(2, 6, 3, 2, 3), make.ints(4, 12)),
    )
    weights = (*inputs(1, 70, 2, 6, 5), 64, 0.25, -7, None, None, None, None, False, "weight")
    yield Sample("dropout of weights", weights)
    bounds = make.bounds(1, 0, 9, 4, dtype=torch.int32)
    yield Sample("packed", (*inputs(1, 14, 2, 8, 12), 4, 0.0, 0, bounds, None, None, None))
    yield Sample(
        "packed, caches and dropout",
        (
            *(*inputs(1, 30, 2, 3, 5), 8, 0.3, 7, make.bounds(0, 17, 1, 12)),
            *(*caches(4, 8, 2, 3, 5), make.ints(3, 5, 7, 16)),
        ),
    )


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    dropout_p: float = 0.0,
    seed: int = 0,
    cu_seqlens: Tensor | None = None,
    *state: Any,
) -> Cost:
    """Without what lies in caches."""
    B, L, H, S = q.shape
    lengths = [L] * B if cu_seqlens is None else cu_seqlens.diff().tolist()
    pairs = 0
    for length in lengths:
        whole, rest = divmod(length, chunk_size)
        pairs += H * (whole * chunk_size * (chunk_size + 1) + rest * (rest + 1)) // 2
        if len(state) > 3 and state[3] and whole > 0:  # sliding: what lies before the chunk
            pairs += H * ((whole - 1) * chunk_size * (chunk_size - 1) // 2)
            pairs += H * rest * (2 * chunk_size - rest - 1) // 2
    return Cost(
        bytes=2 * (q.numel() + v.numel()) * q.element_size(), flops=2 * pairs * (S + v.shape[3])
    )


OP = registry.add(
    Op(
        name="chunk_attention",
        summary="causal softmax attention inside chunks",
        equation="o_i = sum_j softmax_j(q_i . k_j) v_j, j <= i in i's chunk (sliding: i - C < j)",
        schema=(
            "(Tensor q, Tensor k, Tensor v, SymInt chunk_size, float dropout_p=0.0, SymInt seed=0,"
            " Tensor? cu_seqlens=None, Tensor? k_cache=None, Tensor? v_cache=None,"
            " Tensor? position=None, bool sliding=False,"
            ' str dropout_mode="key") -> (Tensor o, Tensor lse)'
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt chunk_size,"
            " float dropout_p, SymInt seed, Tensor? cu_seqlens, Tensor? k_cache, Tensor? v_cache,"
            " Tensor? position, bool sliding, str dropout_mode)"
            " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_cache, Tensor dv_cache)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
        # A score's gradient is P (do . v - do . o). Where a query sees one key the two sums are
        # equal, ours are added up in different orders, and what remains is their rounding.
        tolerance=4.0,
    )
)
