"""cema: the complex exponential moving average over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalodon_ops._library import Cost, Maker, Op, Sample, registry
from megalodon_ops._shapes import like, sequences, stat

if TYPE_CHECKING:
    from torch import Tensor


def _fake(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:
    rows = sequences(x, cu_seqlens)
    return like(x), stat(x, rows, x.shape[2], alpha.shape[1], 2)


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    algorithm: str,
) -> tuple[Tensor, ...]:
    parameters = (like(p) for p in (alpha, delta, theta, gamma, omega))
    return like(x), *parameters, like(h0, of=alpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, algorithm = inputs
    ctx.save_for_backward(*tensors)
    ctx.algorithm = algorithm
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    import torch

    x, *parameters, h0, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    *grads, dh0 = torch.ops.megalodon.cema_backward(
        dy, dh, x, *parameters, h0, cu_seqlens, ctx.algorithm
    )
    return *grads, dh0 if h0 is not None else None, None, None


def _parameters(make: Maker, D: int, N: int) -> tuple[Tensor, ...]:
    shapes = (D, N), (D, N), (D,), (D, N, 2), (D,)
    return tuple(make.stat(*shape) for shape in shapes)


def _samples(make: Maker) -> Iterator[Sample]:
    import torch

    yield Sample("no state", (make.activation(2, 9, 5), *_parameters(make, 5, 3)))
    yield Sample(
        "state",
        (make.activation(2, 70, 19), *_parameters(make, 19, 4), make.stat(2, 19, 4, 2)),
    )
    yield Sample(
        "scan",
        (make.activation(1, 3, 16), *_parameters(make, 16, 2), None, None, "scan"),
    )
    yield Sample(
        "fft",
        (
            make.activation(2, 70, 19),
            *_parameters(make, 19, 4),
            make.stat(2, 19, 4, 2),
            None,
            "fft",
        ),
    )
    yield Sample(
        "packed",
        (make.activation(1, 75, 19), *_parameters(make, 19, 4), None, make.bounds(0, 70, 1, 4)),
    )
    yield Sample(
        "packed state",
        (
            make.activation(1, 160, 19),
            *_parameters(make, 19, 4),
            make.stat(4, 19, 4, 2),
            make.bounds(1, 150, 0, 9, dtype=torch.int32),
            "fft",
        ),
    )


def _cost(x: Tensor, alpha: Tensor, *_: Any) -> Cost:
    # Per element and wavelet a complex q h + x (4 FMA) and Re c h (2 FMA).
    N = alpha.shape[1]
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=12 * N * x.numel())


OP = registry.add(
    Op(
        name="cema",
        summary="complex exponential moving average over time, with its state",
        equation="h_t = a x_t + q h_{t-1},  y_t = Re sum_n g_n h_{t,n} + omega x_t",
        schema=(
            "(Tensor x, Tensor alpha, Tensor delta, Tensor theta, Tensor gamma, Tensor omega, "
            'Tensor? h0=None, Tensor? cu_seqlens=None, str algorithm="auto") '
            "-> (Tensor y, Tensor h)"
        ),
        fake=_fake,
        backward_schema=(
            "(Tensor dy, Tensor? dh, Tensor x, Tensor alpha, Tensor delta, Tensor theta, "
            "Tensor gamma, Tensor omega, Tensor? h0, Tensor? cu_seqlens, str algorithm) "
            "-> (Tensor dx, Tensor dalpha, Tensor ddelta, Tensor dtheta, Tensor dgamma, "
            "Tensor domega, Tensor dh0)"
        ),
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        gradients=_gradients,
        samples=_samples,
        cost=_cost,
    )
)
