"""fft_conv: a causal convolution over time, as long as the row, per channel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x: Tensor, k: Tensor) -> Tensor:
    return like(x)


def _backward_fake(dy: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return like(x), like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    import torch

    x, k = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor] = torch.ops.megalodon.fft_conv_backward(dy, x, k)
    return gradients


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("short", (make.activation(2, 9, 5), make.stat(5, 9)))
    yield Sample("long", (make.activation(2, 130, 19), make.stat(19, 130, scale=0.1)))


def _cost(x: Tensor, k: Tensor) -> Cost:
    # Two transforms of an element and one of k: log2(L) levels of 5 FLOPs per point each.
    B, L, D = x.shape
    levels = math.log2(max(L, 2))
    return Cost(
        bytes=2 * x.numel() * x.element_size() + k.numel() * k.element_size(),
        flops=int((2 * B + 1) * L * D * 5 * levels),
    )


OP = registry.add(
    Op(
        name="fft_conv",
        summary="causal convolution per channel with a kernel of the row's length",
        equation="y_t = sum_{s <= t} k_s x_{t-s}",
        schema="(Tensor x, Tensor k) -> Tensor y",
        fake=_fake,
        backward_schema="(Tensor dy, Tensor x, Tensor k) -> (Tensor dx, Tensor dk)",
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
