"""timestep_norm against the same equation as torch operations."""

from typing import Any

import pytest
import torch
from harness import maker, measure
from torch import Tensor

from megalodon_ops import registry

OP = registry["timestep_norm"]


def _torch(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """By cumulative sums: fast, and good enough for a short sequence of mean 0."""
    groups = x.float().unflatten(-1, (num_groups, -1))
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    mean = groups.mean(-1).cumsum(1) / steps
    var = groups.square().mean(-1).cumsum(1) / steps - mean.square()
    normed = (groups - mean[..., None]) * (var + eps).rsqrt()[..., None]
    return (normed.flatten(-2) * (weight + 1) + bias).to(x.dtype)


def _arguments(dtype: torch.dtype, B: int, L: int, D: int, G: int) -> tuple[Any, ...]:
    make = maker(dtype)
    return make.activation(B, L, D), make.stat(D), make.stat(D), G, 1e-5


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "G"), [(512, 32), (1024, 32)])
def test_timestep_norm(benchmark: Any, D: int, G: int, dtype: torch.dtype, backward: bool) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, 2, 2097152 // D, D, G),
        _arguments(dtype, 2, 64, D, G),
        backward=backward,
        peers={"torch": _torch},
    )


SEGMENTS = (512, 64, 1400, 300, 900, 180, 740)  # tokens; 4096 in all


def _unpacked(*args: Any) -> tuple[Tensor, ...]:
    """The same tokens as one row."""
    y: tuple[Tensor, ...] = OP.overload(*args[:-1], None)
    return y


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "G"), [(512, 32), (1024, 32)])
def test_packed(benchmark: Any, D: int, G: int, dtype: torch.dtype, backward: bool) -> None:
    make, none = maker(dtype), (None,) * 4
    measure(
        benchmark,
        OP,
        (
            *_arguments(dtype, 1, 4194304 // D, D, G),
            *none,
            make.bounds(*SEGMENTS * (1024 // D)),
        ),
        (*_arguments(dtype, 1, 64, D, G), *none, make.bounds(30, 0, 1, 33)),
        backward=backward,
        peers={"unpacked": _unpacked},
    )
