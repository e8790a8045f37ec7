"""fft_conv: every length, causality, no wrap-around, independence of rows and channels, bad
arguments.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import golden
import pytest
import torch
from backend import BACKEND
from checks import DTYPES, check_forward, check_gradients
from golden import Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalodon_ops import _C, fft_conv, reference, registry
from megalodon_ops._library import Maker

OP = registry["fft_conv"]
F32, F64 = torch.float32, torch.float64
LENGTHS = [0, 1, 2, 3, 16, 17, 24, 25, 63, 64, 65, 97, 129, 372, 1134, 4096]


def arguments(dtype: torch.dtype, B: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    make = Maker(dtype)
    return make.activation(B, L, D), make.stat(D, L)


def exact(x: Tensor, k: Tensor) -> Tensor:
    """The convolution in float64 by torch's FFT of a power of two, at least twice the length.

    At other lengths that of MKL loses up to ten times as much as the kernel on some machines.
    """
    L = x.shape[1]
    n = 2 << max(L - 1, 0).bit_length()
    spectrum = torch.fft.rfft(x.double(), n, dim=1) * torch.fft.rfft(k.double().T, n, dim=0)
    return torch.fft.irfft(spectrum, n, dim=1)[:, :L]


@golden.each("cema", F64, F32, having="out/kernel", lacking="in/hx")
def test_official_numbers(isa: str, case: Case, dtype: torch.dtype) -> None:
    got = golden.run_cema_convolution(case, reference.cema_kernel, fft_conv, dtype)
    golden.assert_golden(case, got, dtype)


@given(
    B=st.sampled_from([0, 1, 3]),
    L=st.integers(0, 70),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(isa: str, B: int, L: int, D: int, dtype: torch.dtype) -> None:
    args = arguments(dtype, B, L, D)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("L", LENGTHS)
def test_lengths(isa: str, L: int, dtype: torch.dtype) -> None:
    x, k = (a.requires_grad_() for a in arguments(dtype, 2, L, 19))
    dy = Maker(dtype, seed=1).activation(2, L, 19)
    y = fft_conv(x, k)
    y64 = exact(x, k)
    got = y, *torch.autograd.grad(y, (x, k), dy)
    want = y64, *torch.autograd.grad(y64, (x, k), dy.double())
    for a, b in zip(got, want, strict=True):
        bound = 5e-7 if dtype == F32 else 2e-15
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [2049, 4097, 8192, 8193, 20000])
def test_long(isa: str, L: int, dtype: torch.dtype) -> None:
    """On either side of where the CUDA kernels go from one plan to the other; a few channels, more
    than one row.
    """
    check_long(dtype, 2, L, 3)


def check_long(dtype: torch.dtype, B: int, L: int, D: int) -> None:
    x, k = (a.requires_grad_() for a in arguments(dtype, B, L, D))
    dy = Maker(dtype, seed=1).activation(B, L, D)
    y = fft_conv(x, k)
    y64 = exact(x, k)
    got = y, *torch.autograd.grad(y, (x, k), dy)
    want = y64, *torch.autograd.grad(y64, (x, k), dy.double())
    rounding = {F64: 2e-15, F32: 5e-7}.get(dtype, torch.finfo(dtype).eps)
    for a, b in zip(got, want, strict=True):
        bound = rounding if a.dtype == dtype else 5e-7  # dk of 16-bit numbers is float32
        assert (a.double() - b.double()).norm() <= bound * b.norm()


@pytest.fixture
def limits() -> Iterator[Callable[[int, int, int], None]]:
    """Sets where the plan of the CUDA kernels changes: FftConvCudaLimits in cpp/ops/fft_conv.h."""
    function = ctypes.CDLL(_C.__file__).megalodon_simt_fft_conv_limits
    function.argtypes = [ctypes.c_int64] * 3
    yield function
    function(2**15, 11, 2**28)


# A group of channels has 2^14 points where L is at most 2^13: 128 KiB of float32.
@pytest.mark.skipif(not BACKEND.startswith("simt"), reason="of the executor")
@pytest.mark.parametrize(
    ("B", "L", "D", "outer_levels", "slice_bytes"),
    [
        pytest.param(3, 600, 40, 11, 2**17, id="a_group_and_a_row"),
        pytest.param(5, 600, 20, 11, 5 * 2**17, id="a_group_and_some_rows"),
        pytest.param(5, 600, 20, 11, 7 * 2**17, id="a_group_and_some_rows_backward"),
        pytest.param(2, 600, 70, 11, 13 * 2**17, id="some_groups_and_all_rows"),
        pytest.param(2, 9000, 5, 11, 1, id="a_channel_and_a_row"),
        pytest.param(1, 20000, 5, 7, 2**28, id="two_passes"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_slices_and_passes(
    limits: Callable[[int, int, int], None],
    dtype: torch.dtype,
    B: int,
    L: int,
    D: int,
    outer_levels: int,
    slice_bytes: int,
) -> None:
    """Of long and many rows, at sizes that the executor can run."""
    if L > 10000 and dtype != F32 and BACKEND == "simt_race":
        pytest.skip("takes minutes there")
    limits(1024, outer_levels, slice_bytes * (2 if dtype == F64 else 1))
    check_long(dtype, B, L, D)


@pytest.mark.parametrize("L", [65, 96, 129])
def test_the_past_does_not_see_the_future(isa: str, L: int) -> None:
    x, k = arguments(F64, 1, L, 9)
    y = fft_conv(x, k)
    changed = x.clone()
    changed[:, L // 2 :] += 1
    torch.testing.assert_close(
        fft_conv(changed, k)[:, : L // 2], y[:, : L // 2], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("L", LENGTHS[1:])
def test_nothing_wraps_around(isa: str, L: int) -> None:
    """An impulse at the end reaches only the end; a delay of L - 1 moves only the first step."""
    x = torch.zeros(1, L, 3, dtype=F64)
    x[0, -1] = 1
    y = fft_conv(x, torch.ones(3, L, dtype=F64))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-13)
    k = torch.zeros(3, L, dtype=F64)
    k[:, -1] = 1
    y = fft_conv(torch.ones(1, L, 3, dtype=F64), k)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-13)


def test_rows_and_channels_are_alone(isa: str) -> None:
    x, k = arguments(F32, 5, 150, 19)
    x[2, 70, 4] = float("nan")
    y = fft_conv(x, k)
    assert y[2, :, 4].isnan().all()
    for b in range(5):
        torch.testing.assert_close(
            fft_conv(x[b : b + 1], k)[0], y[b], rtol=0, atol=0, equal_nan=True
        )
    y[2, :, 4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"fft_conv: x must be \[B, L, D\]; got \[3, 8\]"),
        (
            {"k": torch.ones(3, 8)},
            ValueError,
            r"fft_conv: k must be \[D, L\] with D = 8 \(x\.shape\[2\]\), L = 3 \(x\.shape\[1\]\); "
            r"got \[3, 8\]",
        ),
        (
            {"k": torch.ones(8, 3, dtype=F64)},
            TypeError,
            "fft_conv: k must be float32; got float64",
        ),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "fft_conv: x must be float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 3, 8), "k": torch.ones(8, 3)}
    with pytest.raises(error, match=message):
        fft_conv(**{**arguments, **change})
