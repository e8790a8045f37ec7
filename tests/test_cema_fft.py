"""cema by the algorithm "fft": the same laws as the scan, and the same numbers."""

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

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["cema"]
F32, F64 = torch.float32, torch.float64


def fft(*args: Any) -> tuple[Tensor, Tensor]:
    x, alpha, delta, theta, gamma, omega, *h0 = args
    return OP.overload(x, alpha, delta, theta, gamma, omega, h0[0] if h0 else None, None, "fft")


def arguments(dtype: torch.dtype, B: int, L: int, D: int, N: int, state: bool) -> tuple[Any, ...]:
    make = Maker(dtype)
    x = make.activation(B, L, D)
    p = (make.stat(*s) for s in ((D, N), (D, N), (D,), (D, N, 2), (D,)))
    return x, *p, make.stat(B, D, N, 2) if state else None


@golden.each("cema", F64, F32)
def test_official_numbers(isa: str, case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_cema(case, fft, dtype), dtype)


@given(
    B=st.sampled_from([0, 1, 3]),
    L=st.integers(0, 70),
    D=st.integers(1, 40),
    N=st.integers(1, 9),
    state=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str, B: int, L: int, D: int, N: int, state: bool, dtype: torch.dtype
) -> None:
    args = (*arguments(dtype, B, L, D, N, state), None, "fft")
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("L", [63, 64, 65, 129, 372, 1134, 4096])
@pytest.mark.parametrize("shift", [0.0, -12.0], ids=["decaying", "lasting"])
@pytest.mark.parametrize("state", [False, True], ids=["stateless", "state"])
def test_equals_the_scan(isa: str, L: int, shift: float, state: bool) -> None:
    if L > 2000 and BACKEND == "simt_race":
        pytest.skip("takes minutes there")
    make = Maker(F64, seed=1)
    x, alpha, delta, *rest = arguments(F64, 2, L, 19, 5, state)
    args = (x, alpha, delta + shift, *rest)
    dy, dh = make.activation(2, L, 19), make.stat(2, 19, 5, 2)
    results = []
    for algorithm in ("fft", "scan"):
        leaves = [a if a is None else a.clone().requires_grad_() for a in args]
        y, h = OP.overload(*leaves, None, algorithm)
        wanted = [a for a in leaves if a is not None]
        outputs, cotangents = ((y, h), (dy, dh)) if state else ((y,), (dy,))
        results.append([y, h, *torch.autograd.grad(outputs, wanted, cotangents)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize(("B", "L", "D", "N"), [(3, 300, 5, 40), (1100, 3, 1, 1)])
def test_many_wavelets_and_rows(isa: str, B: int, L: int, D: int, N: int) -> None:
    args = arguments(F64, B, L, D, N, False)
    for got, want in zip(fft(*args), OP.overload(*args, None, "scan"), strict=True):
        assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("cut", [0, 1, 64, 130])
def test_streams(isa: str, cut: int) -> None:
    x, *p, h0 = arguments(F64, 2, 130, 5, 3, True)
    y, h = fft(x, *p, h0)
    y0, h1 = fft(x[:, :cut], *p, h0)
    y1, h1 = fft(x[:, cut:], *p, h1)
    torch.testing.assert_close(torch.cat((y0, y1), 1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(h1, h, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("N", "L", "transforms"), [(16, 256, True), (16, 255, False), (15, 256, False)]
)
@pytest.mark.parametrize("state", [False, True], ids=["stateless", "state"])
def test_auto_takes_the_transforms_backward(
    isa: str, N: int, L: int, transforms: bool, state: bool
) -> None:
    """Bit for bit the algorithm that the rule in cema.h names; forward, and on a GPU, the scan,
    which there is also what "fft" means with a state.
    """
    x, *p, h0 = arguments(F32, 2, L, 5, N, state)
    dy = Maker(F32, seed=1).activation(2, L, 5)
    backward = torch.ops.megalodon.cema_backward
    auto, scan, by_fft = (
        backward(dy, None, x, *p, h0, None, name) for name in ("auto", "scan", "fft")
    )
    chosen = by_fft if transforms and not state and not BACKEND else scan
    assert all(torch.equal(a, b) for a, b in zip(auto, chosen, strict=True))
    assert torch.equal(scan[0], by_fft[0]) == (state and bool(BACKEND))
    for a, b in zip(OP.overload(x, *p, h0), OP.overload(x, *p, h0, None, "scan"), strict=True):
        assert torch.equal(a, b)


def test_gradients_by_auto(isa: str) -> None:
    args = arguments(F32, 2, 300, 5, 16, False)
    check_forward(OP, args)
    check_gradients(OP, args)
