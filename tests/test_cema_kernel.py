"""cema_kernel: official numbers, every length, saturated and nearly undamped wavelets, bad
arguments.
"""

import math
from typing import Any

import golden
import pytest
import torch
from checks import check_forward, check_gradients
from golden import Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalodon_ops import cema_kernel, fft_conv, reference, registry
from megalodon_ops._library import Maker

OP = registry["cema_kernel"]
F32, F64 = torch.float32, torch.float64


def parameters(dtype: torch.dtype, D: int, N: int) -> tuple[Tensor, ...]:
    make = Maker(dtype)
    return make.stat(D, N), make.stat(D, N), make.stat(D), make.stat(D, N, 2)


@golden.each("cema", F64, F32, having="out/kernel")
def test_official_numbers(isa: str, case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_cema_kernel(case, cema_kernel, dtype), dtype)


@golden.each("cema", F64, F32, having="out/kernel", lacking="in/hx")
def test_official_convolution(isa: str, case: Case, dtype: torch.dtype) -> None:
    got = golden.run_cema_convolution(case, cema_kernel, fft_conv, dtype)
    golden.assert_golden(case, got, dtype)


@given(
    D=st.integers(0, 40),
    N=st.integers(1, 20),
    L=st.integers(0, 300),
    dtype=st.sampled_from([F32, F64]),
)
def test_any_shape(isa: str, D: int, N: int, L: int, dtype: torch.dtype) -> None:
    args = (*parameters(dtype, D, N), L)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("L", [0, 1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 372, 1134, 2049, 4096])
def test_lengths(isa: str, L: int) -> None:
    args = (*parameters(F32, 5, 3), L)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize(("D", "N", "L"), [(2, 35, 130), (2, 3, 12388), (1, 18, 8195)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_shapes_at_which_a_gpu_divides(
    isa: str, D: int, N: int, L: int, dtype: torch.dtype
) -> None:
    """More wavelets than are worked on together, more steps than a block has."""
    args = (*parameters(dtype, D, N), L)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("N", [3, 17])
def test_many_channels(isa: str, N: int) -> None:
    """So many that a block of a GPU works on several pieces of a channel."""
    D, L = 1100, 4100
    p = [t.requires_grad_() for t in parameters(F64, D, N)]
    dk = Maker(F64).stat(D, L)
    k = cema_kernel(*p, L)
    got = torch.autograd.grad(k, p, dk)
    some = torch.tensor([0, 517, D - 1])
    few = [t.detach()[some].requires_grad_() for t in p]
    want = reference.cema_kernel(*few, L)
    torch.testing.assert_close(k[some], want, rtol=1e-11, atol=1e-11)
    for a, b in zip(got, torch.autograd.grad(want, few, dk[some]), strict=True):
        torch.testing.assert_close(a[some], b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("delta", [-40.0, 40.0])
@pytest.mark.parametrize("alpha", [-40.0, 40.0])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_saturated(isa: str, alpha: float, delta: float, dtype: torch.dtype) -> None:
    a, d, theta, gamma = parameters(dtype, 3, 2)
    args = (torch.full_like(a, alpha), torch.full_like(d, delta), theta, gamma, 300)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
def test_error_does_not_grow_with_length(isa: str, distance: float) -> None:
    """|q| = 1 - distance throughout, in float32 against float64."""
    L = 32768
    alpha, _, theta, gamma = parameters(F32, 3, 4)
    alpha.zero_()
    delta = torch.full_like(alpha, math.log(2 * distance / (1 - 2 * distance)))
    p = [t.requires_grad_() for t in (alpha, delta, theta, gamma)]
    p64 = [t.detach().double().requires_grad_() for t in p]
    dk = Maker(F32).stat(3, L)
    k, k64 = cema_kernel(*p, L), reference.cema_kernel(*p64, L)
    got = k, *torch.autograd.grad(k, p, dk)
    want = k64, *torch.autograd.grad(k64, p64, dk.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 2e-6 * b.abs().max()


def test_nan_stays_in_its_channel(isa: str) -> None:
    alpha, *rest = parameters(F32, 19, 3)
    alpha[4, 1] = float("nan")
    k = cema_kernel(alpha, *rest, 300)
    assert k[4].isnan().all()
    k[4] = 0
    assert k.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"alpha": torch.ones(4)},
            ValueError,
            r"cema_kernel: alpha must be \[D, N\]; got \[4\]",
        ),
        (
            {"gamma": torch.ones(4, 3, 1)},
            ValueError,
            r"cema_kernel: gamma must be \[D, N, 2\] with D = 4 .*; got \[4, 3, 1\]",
        ),
        (
            {"theta": torch.ones(4, dtype=F64)},
            TypeError,
            "cema_kernel: theta must be float32; got float64",
        ),
        (
            {"alpha": torch.ones(4, 3, dtype=torch.bfloat16)},
            TypeError,
            "cema_kernel: alpha must be float32 or float64; got bfloat16",
        ),
        ({"length": -1}, ValueError, "cema_kernel: length must be at least 0; got -1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "alpha": torch.ones(4, 3),
        "delta": torch.ones(4, 3),
        "theta": torch.ones(4),
        "gamma": torch.ones(4, 3, 2),
        "length": 5,
    }
    with pytest.raises(error, match=message):
        OP.overload(*{**arguments, **change}.values())
