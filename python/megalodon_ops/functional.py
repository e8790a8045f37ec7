"""Friendly functions on the ops: differentiable, states as named tuples, official parameter shapes accepted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm"]

_ops = torch.ops.megalodon


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last dimension: ``y = x / sqrt(mean(x^2) + eps) * (weight + 1)``.

    Args:
        x: (..., D), float32, bfloat16, float16 or float64.
        weight: (D), float32 (float64 if x is float64), or None for scale 1. Note the ``+ 1``.
        eps: added to the mean square; positive.

    Returns:
        y, like x. Differentiable in x and weight.

    Raises:
        ValueError, TypeError: an argument of wrong shape, size or dtype; the message names it.

    Source: the normalisation of section 3 of arXiv 2404.08801, with the released code's ``weight + 1``.
    """
    y: Tensor = _ops.rms_norm(x, weight, eps)[0]
    return y
