"""cema against the FFT convolution in plain torch, with a kernel made the same way."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import maker, measure, sizes
from torch import Tensor

from megalodon_ops import registry

OP = registry["cema"]


def _fft(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: None = None,
    cu_seqlens: None = None,
    algorithm: str = "auto",
) -> Tensor:
    """The output alone, without a state, in float32."""
    L, N = x.shape[1], alpha.shape[1]
    a = alpha.sigmoid()
    n = torch.arange(1, N + 1, dtype=alpha.dtype, device=x.device)
    phi = n * (2 * math.pi / N) * theta.sigmoid()[:, None]
    log_q = torch.complex(torch.log1p(-a * delta.sigmoid()), phi)
    c = a * torch.view_as_complex(gamma) / math.sqrt(N)
    # Powers by doubling: about 2 multiplications per kernel value instead of an exponential.
    powers = torch.exp(log_q[..., None] * torch.arange(64, device=x.device))
    coarse = (
        torch.exp(log_q[..., None] * 64 * torch.arange((L + 63) // 64, device=x.device))
        * c[..., None]
    )
    k = torch.einsum("dnj,dni->dij", powers, coarse).real.flatten(1)[:, :L]
    size = 1 << (2 * L - 1).bit_length()
    u = x.float()
    y = torch.fft.irfft(
        torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(k, n=size), n=size
    )
    return (y[..., :L].transpose(1, 2) + omega * u).to(x.dtype)


def _arguments(dtype: torch.dtype, B: int, L: int, D: int, N: int = 16) -> tuple[Any, ...]:
    make = maker(dtype)
    parameters = (make.stat(*s) for s in ((D, N), (D, N), (D,), (D, N, 2), (D,)))
    return make.activation(B, L, D), *parameters


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", sizes((2, 4096, 512)), ids=str)
def test_cema(
    benchmark: Any, size: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size),
        _arguments(dtype, 2, 300, 64),
        backward=backward,
        floor="fma",
        peers={"torch fft": _fft},
    )


def _lengths(tokens: int) -> Iterator[int]:
    """Of segments, mixed, 580 on average."""
    for length in itertools.cycle((256, 1024, 301, 640, 997, 259, 583)):
        if tokens <= length:
            yield tokens
            return
        yield length
        tokens -= length


def _unpacked(x: Tensor, *rest: Any) -> Any:
    *parameters, h0, _ = rest
    return OP.overload(x, *parameters, h0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", sizes((1, 8192, 512)), ids=str)
def test_cema_packed(
    benchmark: Any, size: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> None:
    """Segments, packed into one row, beside the same tokens as one sequence."""
    B, L, D = size
    make = maker(dtype)
    small = 256, 0, 1, 43
    measure(
        benchmark,
        OP,
        (*_arguments(dtype, 1, B * L, D), None, make.bounds(*_lengths(B * L))),
        (*_arguments(dtype, 1, sum(small), 64), None, make.bounds(*small)),
        backward=backward,
        floor="fma",
        peers={"unpacked": _unpacked},
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64, 16])
@pytest.mark.parametrize("size", sizes((1, 8192, 512)), ids=str)
def test_cema_short_segments(
    benchmark: Any, size: tuple[int, int, int], length: int, dtype: torch.dtype, backward: bool
) -> None:
    """All of one length."""
    B, L, D = size
    make = maker(dtype)
    measure(
        benchmark,
        OP,
        (*_arguments(dtype, 1, B * L, D), None, make.bounds(*[length] * (B * L // length))),
        (*_arguments(dtype, 1, 20 * length, 64), None, make.bounds(*[length] * 20)),
        backward=backward,
        floor="fma",
        peers={"unpacked": _unpacked},
        label=f" by {length}",
    )


@pytest.mark.parametrize("B", [1, 64])
def test_cema_step(benchmark: Any, B: int) -> None:
    """One decoded token of the 7B model's width."""
    args = *_arguments(torch.float32, B, 1, 4096), torch.zeros(B, 4096, 16, 2)
    measure(benchmark, OP, args, args)
