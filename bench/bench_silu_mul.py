"""silu_mul against torch's silu and multiplication."""

from typing import Any

import pytest
import torch
from harness import maker, measure, sizes
from torch import Tensor

from megalodon_ops import registry

OP = registry["silu_mul"]


def _torch(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.silu(a) * b


def _arguments(dtype: torch.dtype, B: int, L: int, D: int) -> tuple[Any, ...]:
    make = maker(dtype)
    return make.activation(B, L, D), make.activation(B, L, D)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", sizes((2, 4096, 512)), ids=str)
def test_silu_mul(
    benchmark: Any, size: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size),
        _arguments(dtype, 2, 64, 512),
        backward=backward,
        peers={"torch": _torch},
    )
