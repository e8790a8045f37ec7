"""timestep_norm of packed rows: segments drawn at random, alone and together, very many."""

import itertools
from typing import Any

import pytest
import torch
from backend import BACKEND
from checks import DTYPES, check_forward, check_gradients
from hypothesis import given
from hypothesis import strategies as st
from packing import BOUNDS_DTYPES, LENGTHS
from test_timestep_norm import F32, GROUP_SIZES, OP, arguments, timestep_norm
from torch import Tensor

from megalodon_ops._library import Maker


def packed(
    make: Maker, lengths: list[int], G: int, K: int, state: bool, mask: bool
) -> tuple[Any, ...]:
    """Without cu_seqlens."""
    x, weight, bias, *_ = arguments(make, 1, sum(lengths), G, K, False, False)
    _, _, _, G, eps, *state_rows, _ = arguments(make, len(lengths), 0, G, K, state, False)
    padding = make.mask(1, sum(lengths), probability=0.4) if mask else None
    return x, weight, bias, G, eps, *state_rows, padding


@given(
    lengths=LENGTHS,
    bounds_dtype=BOUNDS_DTYPES,
    G=st.sampled_from((1, 2, 3, 8, 17, 33)),
    K=st.sampled_from(GROUP_SIZES),
    state=st.booleans(),
    mask=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_packed(
    isa: str,
    lengths: list[int],
    bounds_dtype: torch.dtype,
    G: int,
    K: int,
    state: bool,
    mask: bool,
    dtype: torch.dtype,
) -> None:
    make = Maker(dtype)
    args = *packed(make, lengths, G, K, state, mask), make.bounds(*lengths, dtype=bounds_dtype)
    check_forward(OP, args)
    check_gradients(OP, args)


# Long ones among short ones: narrow and wide tiles, several parts; on the GPU several windows.
MIXED = [[700, 0, 3, 1, 40, 0, 250, 6], [1] * 150 + [1300] + [30] * 20, [90] * 12]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lengths", MIXED, ids=["mixed", "one long", "equal"])
def test_segments_equal_themselves_alone(isa: str, lengths: list[int], mask: bool) -> None:
    G, K = (33, 16) if BACKEND == "" else (3, 8)
    make = Maker(F32)
    if BACKEND in ("simt_asan", "simt_race"):
        lengths = [n // 4 for n in lengths]
    args = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in packed(make, lengths, G, K, True, mask)
    ]
    x, weight, bias, _, eps, count, mean, var, padding = args
    whole = timestep_norm(*args, make.bounds(*lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    parts = []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        start = count[i : i + 1], mean[i : i + 1], var[i : i + 1]
        part = None if padding is None else padding[:, a:b]
        parts.append(timestep_norm(x[:, a:b], weight, bias, G, eps, *start, part))
    alone = [
        torch.cat(p, d) for p, d in zip(zip(*parts, strict=True), (1, 0, 0, 0, 1, 1), strict=True)
    ]
    assert torch.equal(whole[1], alone[1])
    for got, want in zip(whole, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    leaves = x, weight, bias, mean, var
    cotangents = [make.activation(*whole[j].shape) for j in (0, 2, 3)]
    got, want = (
        torch.autograd.grad([outs[j] for j in (0, 2, 3)], leaves, cotangents)
        for outs in (whole, alone)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


def test_many_segments() -> None:
    """Thousands of them, most empty or short, beside the same ones in rows of two tokens."""
    count = 10_000 if BACKEND == "" else 1200  # on the GPU more tiles than parts of the sums
    lengths = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(0))
    make = Maker(F32)
    x, weight, bias, G, eps, *state, _ = arguments(make, count, 2, 2, 3, True, False)
    there = torch.arange(2) < lengths[:, None]
    row = x[there][None].requires_grad_()
    y, *last, _, _ = timestep_norm(
        row, weight, bias, G, eps, *state, None, make.bounds(*lengths.tolist())
    )
    x.requires_grad_()
    want, *want_last, _, _ = timestep_norm(x, weight, bias, G, eps, *state, ~there)
    torch.testing.assert_close(y[0], want[there], rtol=1e-5, atol=1e-5)
    for a, b in zip(last, want_last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y.square().sum() + last[1].sum(), row)
    (want_dx,) = torch.autograd.grad(want.square().sum() + want_last[1].sum(), x)
    torch.testing.assert_close(dx[0], want_dx[there], rtol=1e-4, atol=1e-4)
