"""rms_norm: root-mean-square normalisation of every row of D elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, row_stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    return like(x), row_stat(x)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return like(x), like(weight, of=rstd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _gradients(ctx: Any, dy: Tensor, _drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    import torch

    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megalodon.rms_norm_backward(dy, x, weight, rstd)
    return dx, dweight if weight is not None else None, None


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("no weight", (make.activation(2, 5, 24), None, 1e-5))
    yield Sample("weight", (make.activation(3, 37), make.stat(37), 1e-3))


def _cost(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=4 * x.numel())


OP = registry.add(
    Op(
        name="rms_norm",
        summary="root-mean-square norm over the last dimension",
        equation="y = x / sqrt(mean(x^2) + eps) * (weight + 1)",
        schema="(Tensor x, Tensor? weight=None, float eps=1e-05) -> (Tensor y, Tensor rstd)",
        fake=_fake,
        backward_schema=(
            "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
