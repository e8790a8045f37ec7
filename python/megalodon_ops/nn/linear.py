"""The product of a linear layer, by the faster of the libraries that torch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Multiplications from which oneDNN's float32 product is ahead of MKL's, whatever the shape; below
# 2^20 it is up to four times behind. Measured 2026-11-27 (AMD Zen 4, torch 2.13, 1 and 2 threads):
# 1.05 to 1.15 times as fast; an Intel CPU with AVX-512 gave 207 GFLOP/s against 94.
_ENOUGH = 1 << 25

# Rows from which torch's products are about as fast as those of `linear_step`, which take 0.3 to
# 0.8 of their time for 2 to 16. Measured 2026-11-29 (AMD Zen 4, torch 2.13, one thread).
_MANY_ROWS = 32

_one_dnn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> x weight^T + bias.

    `torch.nn.functional.linear`, which multiplies float32 on the CPU by MKL, but on the CPU for few
    rows without gradients, which `linear_step` multiplies, and for large float32 products, which
    oneDNN makes.
    """
    if _is_step(x, weight, bias):
        rows = torch.ops.megalodon.linear_step(x.flatten(0, -2), weight, bias)
        y: Tensor = rows.unflatten(0, x.shape[:-1])
        return y
    if _one_dnn is None or not _is_for_one_dnn(x, weight):
        return F.linear(x, weight, bias)
    y = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def _is_step(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dim() > 1
        and x.numel() < _MANY_ROWS * x.shape[-1]
        and x.dtype == weight.dtype
        and _is_plain(x, weight)
        and (bias is None or bias.dtype == x.dtype)
        and not (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (x, weight, bias))
        )
    )


def _is_for_one_dnn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _ENOUGH
        and bool(torch.backends.mkldnn.enabled)
        and _is_plain(x, weight)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Tracing and other subclasses see torch's own op."""
    return (
        type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _one_dnn is not None
    y: Tensor = _one_dnn(x, weight, bias, "none", [], "")
    return y


class _OneDnnLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            _product(dy, weight.t(), None) if wants_x else None,
            # Over a long inner dimension MKL is ahead.
            rows.t() @ x.flatten(0, -2) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
