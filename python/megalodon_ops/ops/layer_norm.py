"""layer_norm: normalisation of every row of D elements to mean 0 and variance 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, row_stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), row_stat(x), row_stat(x)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), like(weight, of=rstd), like(weight, of=rstd)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(
    ctx: Any, dy: Tensor, _dmean: Tensor | None, _drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    import torch

    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.megalodon.layer_norm_backward(dy, x, weight, mean, rstd)
    if weight is None:
        return dx, None, None, None
    return dx, dweight, dbias, None


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("no parameters", (make.activation(2, 5, 24), None, None, 1e-5))
    yield Sample("weight and bias", (make.activation(3, 37), make.stat(37), make.stat(37), 1e-3))


def _cost(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=7 * x.numel())


OP = registry.add(
    Op(
        name="layer_norm",
        summary="layer norm over the last dimension",
        equation="y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + 1) + bias",
        schema=(
            "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05)"
            " -> (Tensor y, Tensor mean, Tensor rstd)"
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
