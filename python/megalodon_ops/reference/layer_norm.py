"""Layer normalisation, with the released Megalodon code's weight + 1."""

from torch import Tensor

from ._common import stat_dtype


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by mean and biased variance over the last axis.

        rstd = 1 / sqrt(var(x) + eps),   y = (x - mean(x)) rstd (weight + 1) + bias

    Shapes: x (..., D); weight, bias (D), both or neither. Returns y (..., D) in x's dtype, mean
    (...) and rstd (...). Differentiable in x, weight, bias.
    """
    u = x.to(stat_dtype(x))
    mean = u.mean(-1)
    centred = u - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[..., None]
    if weight is not None and bias is not None:
        y = y * (weight.to(y.dtype) + 1) + bias.to(y.dtype)
    return y.to(x.dtype), mean, rstd
