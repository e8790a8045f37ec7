"""cema_kernel: the impulse response of cema, without its omega term."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like

if TYPE_CHECKING:
    from torch import SymInt, Tensor


def _fake(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int | SymInt
) -> Tensor:
    return alpha.new_empty((alpha.shape[0], length))


def _backward_fake(
    dk: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor
) -> tuple[Tensor, ...]:
    return like(alpha), like(delta), like(theta), like(gamma)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *parameters, _ = inputs
    ctx.save_for_backward(*parameters)


def _gradients(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
    import torch

    return *torch.ops.megalodon.cema_kernel_backward(dk, *ctx.saved_tensors), None


def _parameters(make: Maker, D: int, N: int) -> tuple[Tensor, ...]:
    return make.stat(D, N), make.stat(D, N), make.stat(D), make.stat(D, N, 2)


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("short", (*_parameters(make, 5, 3), 9))
    yield Sample("long", (*_parameters(make, 19, 16), 150))


def _cost(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, length: int) -> Cost:
    # Per step and wavelet Re c q^t: two FMA.
    D, N = alpha.shape
    return Cost(bytes=D * length * alpha.element_size(), flops=4 * N * D * length)


OP = registry.add(
    Op(
        name="cema_kernel",
        summary="impulse response of cema, without omega",
        equation="k_t = Re sum_n a g_n q_n^t",
        schema=(
            "(Tensor alpha, Tensor delta, Tensor theta, Tensor gamma, SymInt length) -> Tensor k"
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dk, Tensor alpha, Tensor delta, Tensor theta, Tensor gamma) "
            "-> (Tensor dalpha, Tensor ddelta, Tensor dtheta, Tensor dgamma)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
        dtypes=("float32", "float64"),
    )
)
