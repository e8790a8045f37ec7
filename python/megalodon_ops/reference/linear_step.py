"""The product of a linear layer."""

from torch import Tensor

from ._common import stat_dtype


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias.

    Shapes: x (B, in), weight (out, in), bias (out); y (B, out), of x's dtype.
    """
    stat = stat_dtype(x)
    y = x.to(stat) @ weight.to(stat).t()
    if bias is not None:
        y = y + bias.to(stat)
    return y.to(x.dtype)
