"""qk_norm_rope against the same steps in torch."""

from typing import Any

import pytest
import torch
from harness import maker, measure, sizes
from torch import Tensor

from megalodon_ops import registry

OP = registry["qk_norm_rope"]


def _torch(
    z: Tensor, gamma: Tensor, beta: Tensor, H: int, C: int, base: float, *_: Any
) -> tuple[Tensor, ...]:
    """With cosines and sines made in each call, as ours are."""
    B, L, D = z.shape
    S = D // H
    pair = torch.arange(0, S, 2, device=z.device) / S
    angle = (torch.arange(L, device=z.device) % C)[:, None] * base**-pair
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    zn = torch.nn.functional.rms_norm(z.view(B, L, H, S).float(), (S,), None, 1e-5)
    out = []
    for g, b in zip(gamma, beta, strict=True):
        u = zn * ((g + 1) / S**0.5).view(H, S) + b.view(H, S)
        turned = torch.view_as_complex(u.unflatten(-1, (-1, 2))) * turn
        out.append(torch.view_as_real(turned).flatten(-2).to(z.dtype))
    return tuple(out)


def _arguments(dtype: torch.dtype, B: int, L: int, H: int, S: int) -> tuple[Any, ...]:
    make = maker(dtype)
    scales = make.stat(2, H * S, scale=0.3), make.stat(2, H * S, scale=0.3)
    return make.activation(B, L, H * S), *scales, H, 2048, 10000.0, None, 1e-5, None


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "S"), [(1, 256), (4, 256)], ids=["H1", "H4"])
@pytest.mark.parametrize("size", sizes((2, 4096, 0)), ids=str)
def test_qk_norm_rope(
    benchmark: Any,
    size: tuple[int, int, int],
    H: int,
    S: int,
    dtype: torch.dtype,
    backward: bool,
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size[:2], H, S),
        _arguments(dtype, 2, 100, H, S),
        backward=backward,
        peers={"torch": _torch},
    )


SEGMENTS = (512, 64, 1400, 300, 900, 180, 740)  # tokens; 4096 in all


def _unpacked(*args: Any) -> tuple[Tensor, ...]:
    """The same tokens as one row."""
    outputs: tuple[Tensor, ...] = OP.overload(*args[:-1], None)
    return outputs


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "S"), [(1, 256), (4, 256)], ids=["H1", "H4"])
def test_packed(benchmark: Any, H: int, S: int, dtype: torch.dtype, backward: bool) -> None:
    make = maker(dtype)
    measure(
        benchmark,
        OP,
        (*_arguments(dtype, 1, 8192, H, S)[:-1], make.bounds(*SEGMENTS * 2)),
        (*_arguments(dtype, 1, 100, H, S)[:-1], make.bounds(40, 0, 1, 59)),
        backward=backward,
        peers={"unpacked": _unpacked},
    )
