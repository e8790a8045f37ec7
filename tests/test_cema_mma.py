"""cema of 16-bit activations over long rows: on a GPU by matrix instructions, at the plan's edges.

States and gradients of parameters are float32, so that they show the error before the outputs are
rounded. On a CPU the same must hold.
"""

import math
from typing import Any

import pytest
import torch
from backend import BACKEND
from checks import check_forward, check_gradients
from test_cema import F32, OP, arguments, near_one
from torch import Tensor

from megalodon_ops._library import Maker

BF16, F16 = torch.bfloat16, torch.float16
cema = OP.overload


def errors(args: tuple[Any, ...]) -> tuple[float, float]:
    """Of y beyond half a unit in the last place, and of h: relative to the largest number."""
    y, h = cema(*args)
    y64, h64 = cema(*(None if a is None else a.double() for a in args))
    rounding = (y64.to(y.dtype).double() - y64).abs()
    beyond = ((y.double() - y64).abs() - rounding).max() / y64.abs().max()
    return beyond.item(), ((h.double() - h64).abs().max() / h64.abs().max()).item()


@pytest.mark.parametrize(
    ("B", "L", "D", "N", "state", "dtype"),
    [
        (1, 511, 3, 4, True, BF16),  # the scan's, by one step
        (1, 512, 1, 2, False, BF16),  # one group of tiles, one channel
        (2, 513, 9, 8, True, F16),  # one step beyond it, one channel beyond a block
        (1, 544, 8, 9, True, BF16),  # a whole tile; more than a block of wavelets; rows of 16 bytes
        (2, 1023, 7, 15, False, F16),
        (1, 1025, 16, 16, True, BF16),
        (1, 520, 3, 17, True, BF16),  # too many wavelets: the scan
        (1, 520, 2, 64, True, F16),
        (1, 2600, 3, 3, True, BF16),  # chunks of time
        (1, 2100, 1, 9, True, BF16),  # chunks, more than a block of wavelets
    ],
)
def test_edges_of_the_plan(B: int, L: int, D: int, N: int, state: bool, dtype: torch.dtype) -> None:
    args = arguments(dtype, B, L, D, N, state)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("B", "L", "D", "N", "distance"),
    [
        (1, 512, 1, 1, None),
        (2, 513, 9, 8, None),
        (1, 1025, 8, 16, None),
        (1, 600, 2, 17, None),
        (1, 2600, 3, 3, 1.5e-5),
    ],
)
def test_gradients_of_the_output_alone(
    B: int, L: int, D: int, N: int, distance: float | None, dtype: torch.dtype
) -> None:
    """Neither h0 nor dh: the adjoint goes by products, too."""
    x, *p = arguments(dtype, B, L, D, N, False)[:6]
    leaves = [x, *(p if distance is None else near_one(D, N, distance, F32))]
    dy = Maker(dtype, seed=1).activation(B, L, D)

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
        y, _ = cema(*inputs)
        return list(torch.autograd.grad(y, inputs, dy.to(y)))

    dx, *got = run(None)
    dx64, *want = run(torch.float64)
    rounding = (dx64.to(dtype).double() - dx64).abs()
    assert ((dx.double() - dx64).abs() - rounding).max() <= 2e-5 * dx64.abs().max()
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 5e-6 * b.abs().max()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("N", [1, 16])
@pytest.mark.parametrize("L", [512, 600, 4100])
def test_forward_is_accurate_before_rounding(L: int, N: int, dtype: torch.dtype) -> None:
    beyond, state = errors(arguments(dtype, 1, L, 2, N, True))
    assert beyond <= 2e-5
    assert state <= 2e-5


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_error_does_not_grow_with_length(dtype: torch.dtype) -> None:
    """max|q| = 1 - 1.5e-5: half of what a row has seen is still in its state at the end."""
    L = 32768 if BACKEND not in ("simt_asan", "simt_race") else 4096
    make = Maker(dtype)
    h0 = make.stat(1, 2, 4, 2)
    beyond, state = errors((make.activation(1, L, 2), *near_one(2, 4, 1.5e-5, F32), h0))
    assert beyond <= 2e-5
    assert state <= 2e-5


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("t", [0, 37, 543, 1029])
def test_nan_and_inf_stay_in_their_channel_and_future(
    t: int, value: float, dtype: torch.dtype
) -> None:
    """A zero of a matrix must not carry them back to the steps before, or to the next channel."""
    x, *rest = arguments(dtype, 2, 1030, 10, 3, False)
    x[1, t, 8] = value
    y, h = cema(x, *rest)
    bad = torch.zeros(x.shape, dtype=torch.bool)
    bad[1, t:, 8] = True
    assert torch.equal(~y.isfinite(), bad)
    assert torch.equal((~h.isfinite()).flatten(2).any(-1), bad[:, -1])
    dy = torch.zeros_like(x)
    dy[1, t, 8] = value
    x = x.nan_to_num(0, 0, 0).requires_grad_()
    (dx,) = torch.autograd.grad(cema(x, *rest)[0], x, dy)
    bad = torch.zeros(x.shape, dtype=torch.bool)
    bad[1, : t + 1, 8] = True
    assert torch.equal(~dx.isfinite(), bad)


def pieces(x: Tensor, rest: list[Any], cuts: list[int]) -> tuple[Tensor, Tensor]:
    outputs, h = [], None
    for part in x.tensor_split(cuts, dim=1):
        y, h = cema(part, *rest, h)
        outputs.append(y)
    assert h is not None
    return torch.cat(outputs, 1), h


@pytest.mark.parametrize("cuts", [[0, 600], [520], [512, 1100], [100]])
def test_streams(cuts: list[int]) -> None:
    x, *rest = arguments(BF16, 1, 1700, 3, 5, False)[:6]
    y, h = cema(x, *rest)
    got, last = pieces(x, rest, cuts)
    torch.testing.assert_close(last, h, rtol=0, atol=2e-5 * h.abs().max().item())
    ulp = torch.finfo(BF16).eps * y.abs().clamp(min=1).double()
    assert ((got.double() - y.double()).abs() <= ulp).all()


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
def test_several_rows_of_the_batch_in_a_block() -> None:
    x, *p, h0 = arguments(BF16, 1100, 512, 1, 1, True)
    y, h = cema(x, *p, h0)
    for b in (0, 1, 549, 1099):
        alone = cema(x[b : b + 1], *p, h0[b : b + 1])
        assert torch.equal(alone[0][0], y[b])
        assert torch.equal(alone[1][0], h[b])


def test_runs_are_bit_equal() -> None:
    args = arguments(BF16, 2, 1500, 9, 9, True)
    for a, b in zip(cema(*args), cema(*args), strict=True):
        assert torch.equal(a, b)
