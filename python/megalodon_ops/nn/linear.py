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

_one_dnn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> x weight^T + bias.

    `torch.nn.functional.linear`, which multiplies float32 on the CPU by MKL, but for large float32
    products on the CPU, which oneDNN makes.
    """
    if _one_dnn is None or not _is_for_one_dnn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def _is_for_one_dnn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _ENOUGH
        and type(x) is Tensor  # tracing and other subclasses see the plain op
        and x.device.type == weight.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
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
