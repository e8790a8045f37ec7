"""Root-mean-square normalisation, with the released Megalodon code's weight + 1."""

from torch import Tensor

from ._common import stat_dtype


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square over the last axis.

        rstd = 1 / sqrt(mean(x^2) + eps),   y = x rstd (weight + 1)

    Shapes: x (..., D); weight (D). Returns y (..., D) in x's dtype and rstd (...). Differentiable
    in x and weight.
    """
    u = x.to(stat_dtype(x))
    rstd = (u.square().mean(-1) + eps).rsqrt()
    y = u * rstd[..., None]
    if weight is not None:
        y = y * (weight.to(y.dtype) + 1)
    return y.to(x.dtype), rstd
