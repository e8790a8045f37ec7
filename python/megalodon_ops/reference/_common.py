"""What every reference shares: the dtype of its arithmetic, and packed rows."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of parameters, states and arithmetic: float64 iff x is, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_segment(
    call: Callable[[int, slice], tuple[Tensor, ...]], cu_seqlens: Tensor, dims: tuple[int, ...]
) -> tuple[Any, ...]:
    """What a packed row means: call(i, tokens) for every segment alone, the outputs concatenated.

    cu_seqlens (segments + 1) holds the bounds of segments, 0 first and T last; output j is
    concatenated along dims[j].
    """
    bounds = enumerate(pairwise(cu_seqlens.tolist()))
    parts = [call(i, slice(begin, end)) for i, (begin, end) in bounds]
    return tuple(
        torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), dims, strict=True)
    )


def row(state: Tensor | None, i: int) -> Tensor | None:
    """Row i of an optional state, as a batch of one."""
    return None if state is None else state[i : i + 1]
