"""linear_step: the product of a weight with the few rows of a decoding step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megalodon_ops._library import Cost, Maker, Op, Sample, registry

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("one row", (make.activation(1, 40), make.activation(37, 40) * 40**-0.5, None))
    yield Sample(
        "rows and bias",
        (make.activation(7, 67), make.activation(50, 67) * 67**-0.5, make.activation(50)),
    )


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    """The weight is read."""
    return Cost(bytes=weight.numel() * weight.element_size(), flops=2 * x.shape[0] * weight.numel())


OP = registry.add(
    Op(
        name="linear_step",
        summary="the product of a weight with the few rows of a decoding step",
        equation="y = x W^T + bias",
        schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor y",
        fake=_fake,
        samples=_samples,
        cost=_cost,
    )
)
