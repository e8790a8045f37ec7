"""qk_norm_rope: the queries and keys of normalised attention from one shared z."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
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
    B, L, D = z.shape
    shape = (B, L, num_heads, D // num_heads)
    return z.new_empty(shape), z.new_empty(shape), stat(z, B, L, num_heads)


def _backward_fake(
    dq: Tensor,
    dk: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rstd: Tensor,
    num_heads: int,
    chunk_size: int,
    rope_base: float,
    position: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return like(z), like(gamma), like(beta)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, gamma, beta, num_heads, chunk_size, rope_base, position, eps, cu_seqlens = inputs
    rstd = output[2]
    ctx.save_for_backward(z, gamma, beta, rstd, position, cu_seqlens)
    ctx.sizes = num_heads, chunk_size, rope_base, eps
    ctx.mark_non_differentiable(rstd)


def _gradients(
    ctx: Any, dq: Tensor, dk: Tensor, _drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    import torch

    z, gamma, beta, rstd, position, cu_seqlens = ctx.saved_tensors
    num_heads, chunk_size, rope_base, eps = ctx.sizes
    dz, dgamma, dbeta = torch.ops.megalodon.qk_norm_rope_backward(
        dq, dk, z, gamma, beta, rstd, num_heads, chunk_size, rope_base, position, eps, cu_seqlens
    )
    return dz, dgamma, dbeta, None, None, None, None, None, None


def _samples(make: Maker) -> Iterator[Sample]:
    import torch

    def parameters(D: int) -> tuple[Tensor, Tensor]:
        return make.stat(2, D, scale=0.3), make.stat(2, D, scale=0.3)

    yield Sample(
        "no position", (make.activation(2, 9, 48), *parameters(48), 2, 4, 10000.0, None, 1e-5, None)
    )
    yield Sample(
        "position",
        (make.activation(3, 5, 42), *parameters(42), 3, 7, 1e5, make.ints(0, 3, 20), 1e-3, None),
    )
    bounds = make.bounds(4, 0, 1, 9, dtype=torch.int32)
    packed = make.activation(1, 14, 48), *parameters(48), 2, 4, 10000.0
    yield Sample("packed", (*packed, None, 1e-5, bounds))
    starts = make.ints(3, 7, 0, 21)
    yield Sample("packed, position", (*packed, starts, 1e-5, make.bounds(0, 5, 8, 1)))


def _cost(z: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * z.numel() * z.element_size(), flops=20 * z.numel())


OP = registry.add(
    Op(
        name="qk_norm_rope",
        summary="queries and keys of normalised attention from one shared z",
        equation="q, k = rope(z / sqrt(mean(z^2) + eps) * (gamma + 1) / sqrt(S) + beta)",
        schema=(
            "(Tensor z, Tensor gamma, Tensor beta, SymInt num_heads, SymInt chunk_size,"
            " float rope_base=10000.0, Tensor? position=None, float eps=1e-05,"
            " Tensor? cu_seqlens=None) -> (Tensor q, Tensor k, Tensor rstd)"
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dq, Tensor dk, Tensor z, Tensor gamma, Tensor beta, Tensor rstd,"
            " SymInt num_heads, SymInt chunk_size, float rope_base, Tensor? position, float eps,"
            " Tensor? cu_seqlens) -> (Tensor dz, Tensor dgamma, Tensor dbeta)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
