"""The shapes and dtypes that fakes have in common. Nothing is checked here: kernels check, fakes
infer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of parameters, states and statistics: float32, or float64 where x is float64."""
    import torch

    return torch.float64 if x.dtype == torch.float64 else torch.float32


def like(tensor: Tensor | None, of: Tensor | None = None) -> Tensor:
    """A contiguous tensor like this one; for an absent one, a tensor of shape [0] like ``of``."""
    import torch

    if tensor is None:
        assert of is not None
        return of.new_empty((0,))
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def stat(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """A tensor of this shape and of x's statistics dtype."""
    return x.new_empty(shape, dtype=stat_dtype(x))


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int | torch.SymInt:
    """Rows that a state has: one per row of x (B, ...), or one per segment of a packed row."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def row_stat(x: Tensor) -> Tensor:
    """One number per row of x: its shape without the last dimension."""
    return stat(x, *x.shape[:-1])
