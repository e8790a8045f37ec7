"""fft_conv against torch's FFT, transposes included."""

from typing import Any

import pytest
import torch
from harness import measure
from torch import Tensor

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["fft_conv"]


def _torch(x: Tensor, k: Tensor) -> Tensor:
    L = x.shape[1]
    size = 1 << (2 * L - 1).bit_length()
    u = x.float().transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(u, n=size) * torch.fft.rfft(k, n=size), n=size)
    return y[..., :L].transpose(1, 2).to(x.dtype)


def _arguments(dtype: torch.dtype, B: int, L: int, D: int) -> tuple[Any, ...]:
    make = Maker(dtype)
    return make.activation(B, L, D), make.stat(D, L, scale=L**-0.5)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("L", [1024, 3000, 4096, 16384])
def test_fft_conv(benchmark: Any, L: int, backward: bool) -> None:
    measure(
        benchmark,
        OP,
        _arguments(torch.float32, 2, L, 512 if L < 16384 else 128),
        _arguments(torch.float32, 2, 300, 64),
        backward=backward,
        floor="fma",
        peers={"torch fft": _torch},
    )
