"""timestep_norm against the same equation as torch operations."""

from typing import Any

import pytest
import torch
from harness import maker, measure, sizes, sizes_of_long_gpu
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
@pytest.mark.parametrize("size", sizes((2, 4096, 512), (2, 2048, 1024)), ids=str)
def test_timestep_norm(
    benchmark: Any, size: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size, 32),
        _arguments(dtype, 2, 64, size[2], 32),
        backward=backward,
        peers={"torch": _torch},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("G", [32, 64, 128])
@pytest.mark.parametrize(
    "size", sizes_of_long_gpu((1, 1048576, 1024), (64, 512, 4096), (4, 8192, 8192)), ids=str
)
def test_groups(benchmark: Any, size: tuple[int, int, int], G: int, backward: bool) -> None:
    """One very long row, many short ones, wide ones."""
    dtype = torch.bfloat16
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size, G),
        _arguments(dtype, 2, 64, size[2], G),
        backward=backward,
        peers={"torch": _torch},
        label=f" G={G}",
    )


SEGMENTS = (512, 64, 1400, 300, 900, 180, 740)  # tokens; 4096 in all


def _unpacked(*args: Any) -> tuple[Tensor, ...]:
    """The same tokens as one row."""
    y: tuple[Tensor, ...] = OP.overload(*args[:-1], None)
    return y


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", sizes((1, 8192, 512), (1, 4096, 1024)), ids=str)
def test_packed(
    benchmark: Any, size: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> None:
    B, L, D = size
    make, none = maker(dtype), (None,) * 4
    measure(
        benchmark,
        OP,
        (
            *_arguments(dtype, 1, B * L, D, 32),
            *none,
            make.bounds(*SEGMENTS * (B * L // sum(SEGMENTS))),
        ),
        (*_arguments(dtype, 1, 64, D, 32), *none, make.bounds(30, 0, 1, 33)),
        backward=backward,
        peers={"unpacked": _unpacked},
    )
