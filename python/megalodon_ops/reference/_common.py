"""What every reference shares: the dtype of its arithmetic and the refusal of packed rows."""

import torch
from torch import Tensor


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype of parameters, states and arithmetic: float64 iff x is, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse_cu_seqlens(op: str, cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Raise NotImplementedError when packed rows are asked for."""
    if cu_seqlens is not None:
        raise NotImplementedError(f"{op}: cu_seqlens is not implemented yet on {x.device.type}")
