"""silu_mul: the gate of the attention and feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like

if TYPE_CHECKING:
    from torch import Tensor


def _fake(a: Tensor, b: Tensor | None = None) -> Tensor:
    return like(a)


def _backward_fake(dy: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    return like(a), like(b, of=a)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    import torch

    a, b = ctx.saved_tensors
    da, db = torch.ops.megalodon.silu_mul_backward(dy, a, b)
    return da, db if b is not None else None


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("one input", (make.activation(3, 37), None))
    yield Sample("two inputs", (make.activation(2, 5, 24), make.activation(2, 5, 24)))


def _cost(a: Tensor, b: Tensor | None = None) -> Cost:
    tensors = 2 if b is None else 3
    return Cost(bytes=tensors * a.numel() * a.element_size(), flops=20 * a.numel())


OP = registry.add(
    Op(
        name="silu_mul",
        summary="silu, and its product with a second input",
        equation="y = silu(a) * b",
        schema="(Tensor a, Tensor? b=None) -> Tensor y",
        fake=_fake,
        backward_schema="(Tensor dy, Tensor a, Tensor? b) -> (Tensor da, Tensor db)",
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
