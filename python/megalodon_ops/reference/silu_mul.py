"""The gated activation of SwiGLU (arXiv 2002.05202), and plain SiLU."""

from torch import Tensor

from ._common import stat_dtype


def silu_mul(a: Tensor, b: Tensor | None = None) -> Tensor:
    """y = a sigmoid(a) b, or a sigmoid(a) without b.

    Shapes: a, b and y alike, any. y has a's dtype. Differentiable in a and b.
    """
    u = a.to(stat_dtype(a))
    y = u * u.sigmoid()
    if b is not None:
        y = y * b.to(y.dtype)
    return y.to(a.dtype)
