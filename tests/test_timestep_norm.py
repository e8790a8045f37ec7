"""timestep_norm: golden data, shapes drawn at random, streams, masks, extremes, bad arguments."""

import itertools
from typing import Any

import golden
import pytest
import torch
from backend import BACKEND, values_are_read
from checks import DTYPES, check_forward, check_gradients
from golden import Case
from hypothesis import given
from hypothesis import strategies as st
from packing import BAD_BOUNDS
from torch import Tensor

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["timestep_norm"]
F32, F64 = torch.float32, torch.float64


def timestep_norm(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.ops.megalodon.timestep_norm(*args, **kwargs)


@golden.each("timestep_norm", F64, F32)
def test_golden(isa: str, case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_timestep_norm(case, timestep_norm, dtype), dtype)


@golden.each("timestep_norm_stream", F64, F32)
def test_golden_stream(isa: str, case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_timestep_norm(case, timestep_norm, dtype), dtype)


# Group sizes by how the kernel takes them: powers of two, whole vectors, partial vectors; numbers
# of groups beyond a block of them and beyond a tile (128).
GROUP_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 24, 32, 37, 64)


def arguments(
    make: Maker, B: int, L: int, G: int, K: int, state: bool, mask: bool
) -> tuple[Any, ...]:
    count, mean, var = None, None, None
    if state:
        count = make.ints(*(3 * b for b in range(B)))
        mean, var = make.stat(B, G), make.stat(B, G).square() + 0.5
    padding_mask = make.mask(B, L, probability=0.4) if mask else None
    D = G * K
    x = make.activation(B, L, D)
    return x, make.stat(D), make.stat(D), G, 0.1, count, mean, var, padding_mask


@given(
    B=st.integers(0, 3),
    L=st.integers(0, 20),
    G=st.sampled_from((1, 2, 3, 8, 17, 33)),
    K=st.sampled_from(GROUP_SIZES),
    state=st.booleans(),
    mask=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str, B: int, L: int, G: int, K: int, state: bool, mask: bool, dtype: torch.dtype
) -> None:
    args = arguments(Maker(dtype), B, L, G, K, state, mask)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize(("G", "K"), [(16, K) for K in GROUP_SIZES] + [(300, 1), (131, 40)])
def test_every_group_size(isa: str, G: int, K: int) -> None:
    for dtype in (F32, F64):
        args = arguments(Maker(dtype), 2, 9, G, K, True, True)
        check_forward(OP, args)
        check_gradients(OP, args)


@pytest.mark.parametrize("K", [1, 4, 6])
@pytest.mark.parametrize("mask", [False, True])
def test_gradcheck_of_the_whole_jacobian(K: int, mask: bool) -> None:
    args = arguments(Maker(F64), 2, 6, 2, K, True, mask)
    leaves = [
        a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]

    def differentiable(*values: Any) -> tuple[Tensor, ...]:
        y, _, last_mean, last_var, _, _ = timestep_norm(*values)
        return y, last_mean, last_var

    assert torch.autograd.gradcheck(differentiable, leaves, nondet_tol=0.0)


@given(
    L=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    state=st.booleans(),
    mask=st.booleans(),
)
def test_pieces_equal_the_whole(L: int, cuts: list[int], state: bool, mask: bool) -> None:
    """Values and, through the states, gradients."""
    x, weight, bias, G, eps, *start, padding = arguments(Maker(F64), 2, L, 3, 5, state, mask)
    x.requires_grad_()
    y, *whole, _, _ = timestep_norm(x, weight, bias, G, eps, *start, padding)
    ends = [0, *sorted(min(c, L) for c in cuts), L]
    pieces = []
    for a, b in itertools.pairwise(ends):
        part = None if padding is None else padding[:, a:b]
        out, *start, _, _ = timestep_norm(x[:, a:b], weight, bias, G, eps, *start, part)
        pieces.append(out)
    streamed = torch.cat(pieces, 1)
    torch.testing.assert_close(streamed, y, rtol=1e-12, atol=1e-12)
    for got, want in zip(start, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cot, cot_mean, cot_var = torch.randn_like(y), *(torch.randn_like(s) for s in whole[1:])
    want, got = (
        torch.autograd.grad((out * cot).sum() + (m * cot_mean).sum() + (v * cot_var).sum(), x)[0]
        for out, (_, m, v) in ((y, whole), (streamed, start))
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_steps_are_as_if_they_were_not_there(isa: str, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    x, weight, bias, G, eps, *state, padding = arguments(make, 1, 30, 4, 8, True, True)
    keep = ~padding[0]
    x[0, padding[0]] = float("nan")
    x.requires_grad_()
    y, *last, _, _ = timestep_norm(x, weight, bias, G, eps, *state, padding)
    dense = x.detach()[:, keep].requires_grad_()
    y_dense, *last_dense, _, _ = timestep_norm(dense, weight, bias, G, eps, *state)
    assert torch.equal(y[:, keep], y_dense)
    assert not y[:, ~keep].any()
    assert all(torch.equal(a, b) for a, b in zip(last, last_dense, strict=True))
    cot = make.activation(*y.shape)
    cot[0, padding[0]] = float("nan")
    (dx,) = torch.autograd.grad((y * cot)[:, keep].sum(), x)
    (dx_dense,) = torch.autograd.grad((y_dense * cot[:, keep]).sum(), dense)
    assert torch.equal(dx[:, keep], dx_dense)
    assert not dx[:, ~keep].any()


def test_fully_padded_rows_return_their_state() -> None:
    x, zero = torch.randn(2, 5, 6), torch.zeros(6)
    padding = torch.ones(2, 5, dtype=torch.bool)
    y, count, mean, var, _, _ = timestep_norm(x, zero, zero, 2, padding_mask=padding)
    assert not y.any()
    assert (count.tolist(), mean.unique().tolist(), var.unique().tolist()) == ([0, 0], [0.0], [1.0])
    given_mean, given_var = torch.randn(2, 2), torch.rand(2, 2)
    state = torch.tensor([0, 7]), given_mean, given_var
    _, count, mean, var, _, _ = timestep_norm(x, zero, zero, 2, 1e-5, *state, padding)
    assert count.tolist() == [0, 7]
    assert torch.equal(mean, given_mean)
    assert torch.equal(var, given_var)


def test_a_state_of_count_zero_has_no_weight() -> None:
    x, zero = torch.randn(1, 4, 6), torch.zeros(6)
    state = torch.tensor([0]), torch.full((1, 2), 1e6), torch.full((1, 2), 1e6)
    for got, want in zip(
        timestep_norm(x, zero, zero, 2, 1e-5, *state), timestep_norm(x, zero, zero, 2), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 8, 12])
def test_constant_input_gives_the_bias(isa: str, dtype: torch.dtype, K: int) -> None:
    make = Maker(dtype)
    D = 4 * K
    x = torch.full((2, 50, D), 1e4, dtype=dtype, requires_grad=True)
    bias = make.stat(D)
    y, _, mean, var, _, _ = timestep_norm(x, make.stat(D), bias, 4)
    assert torch.equal(y, bias.to(dtype).expand_as(y))
    assert torch.equal(mean, torch.full_like(mean, x.flatten()[0].item()))
    assert not var.any()
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values(isa: str, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    x = (make.activation(2, 40, 64) * 1e4).requires_grad_()
    args = (x, make.stat(64), make.stat(64), 4)
    check_forward(OP, args)
    (dx,) = torch.autograd.grad(timestep_norm(*args)[0].float().square().sum(), x)
    assert torch.isfinite(dx).all()


def test_a_large_mean_does_not_cancel(isa: str) -> None:
    """E[x^2] - M^2 would be wrong by 10."""
    x = torch.randn(2, 100, 64) + 1e4
    args = (torch.zeros(64), torch.zeros(64), 4)
    _, _, _, var, _, _ = timestep_norm(x, *args)
    want = timestep_norm(x.double(), *(t.double() for t in args[:2]), 4)[3]
    torch.testing.assert_close(var.double(), want, rtol=1e-5, atol=0)
    check_forward(OP, (x, *args))
    check_gradients(OP, (x, *args))


def test_a_shift_changes_nothing(isa: str) -> None:
    """In float64, where E[x^2] - M^2 would be wrong by 1e-4 of it."""
    x = (torch.randn(2, 100, 64).double() * 2**16).round() / 2**16  # the shift is exact
    weight, bias = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    y = timestep_norm(x, weight, bias, 4)[0]
    shifted = timestep_norm(x + 2**20, weight, bias, 4)[0]
    torch.testing.assert_close(shifted, y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("jump", [1e2, 1e4, 1e8])
def test_a_jump_of_the_mean_does_not_cancel(isa: str, jump: float) -> None:
    """A step is measured from the mean of those before it, which may be far from its own."""
    x = torch.randn(2, 40, 64)
    x[:, 1:20] += jump
    x[:, 30:] -= jump
    weight, bias = torch.zeros(64), torch.zeros(64)
    steps = timestep_norm(x, weight, bias, 4)[5]
    want = timestep_norm(x.double(), weight.double(), bias.double(), 4)[5]
    torch.testing.assert_close(steps.double(), want, rtol=1e-6, atol=0)


def test_nan_stays_in_its_group_and_after_its_step() -> None:
    x = torch.randn(2, 12, 48)
    x[0, 5, 20] = float("nan")
    y = timestep_norm(x, torch.zeros(48), torch.zeros(48), 3)[0]
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[0, 5:, 16:32] = True
    assert torch.equal(y.isnan(), bad)


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
def test_a_million_steps_do_not_drift() -> None:
    """In float32, in pieces, against the pooled statistics in float64."""
    L, D = 1_000_000, 8
    x = torch.randn(1, L, D) * 3 + 100
    y, count, mean, var, _, _ = timestep_norm(x, torch.zeros(D), torch.zeros(D), 2)
    groups = x.double().view(L, 2, 4)
    want_mean = groups.mean((0, 2))
    want_var = (groups - want_mean[:, None]).square().mean((0, 2))
    assert count.item() == L
    torch.testing.assert_close(mean[0].double(), want_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var[0].double(), want_var, rtol=1e-6, atol=0)
    last = (groups[-1] - want_mean[:, None]) / (want_var[:, None] + 1e-5).sqrt()
    torch.testing.assert_close(y[0, -1].double(), last.flatten(), rtol=0, atol=1e-5)


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
def test_many_padded_steps() -> None:
    """More tiles than a block has threads that count the steps before each."""
    x, dy = torch.randn(2, 1, 70_000, 2)
    mask = torch.rand(1, 70_000) < 0.3

    def run(x: Tensor, dy: Tensor, mask: Tensor | None) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = timestep_norm(leaf, torch.zeros(2), torch.zeros(2), 1, padding_mask=mask)[0]
        return [y, torch.autograd.grad(y, leaf, dy)[0]]

    for got, want in zip(run(x, dy, mask), run(x[~mask][None], dy[~mask][None], None), strict=True):
        torch.testing.assert_close(got[~mask][None], want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
def test_parameter_gradients_of_many_steps_do_not_drift() -> None:
    x, dy = torch.randn(1, 200_000, 4), torch.rand(1, 200_000, 4)
    parameters = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    y = timestep_norm(x, *parameters, 2)[0]
    dweight, dbias = torch.autograd.grad((y * dy).sum(), parameters)
    torch.testing.assert_close(dbias.double(), dy.double().sum((0, 1)), rtol=1e-6, atol=0)
    want = (y.detach().double() * dy.double()).sum((0, 1))
    torch.testing.assert_close(dweight.double(), want, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(3, 8)},
            ValueError,
            r"timestep_norm: x must be \[B, L, D\]; got \[3, 8\]",
        ),
        ({"num_groups": 0}, ValueError, "timestep_norm: num_groups must be at least 1; got 0"),
        (
            {"num_groups": 3},
            ValueError,
            r"timestep_norm: num_groups must be a divisor of D = 8 \(x\.shape\[2\]\); got 3",
        ),
        (
            {"weight": torch.ones(7)},
            ValueError,
            r"timestep_norm: weight must be \[D\] with D = 8 \(x\.shape\[2\]\); got \[7\]",
        ),
        (
            {"bias": torch.ones(8, dtype=F64)},
            TypeError,
            "timestep_norm: bias must be float32; got float64",
        ),
        ({"eps": 0.0}, ValueError, "timestep_norm: eps must be positive and finite; got 0"),
        ({"eps": 1e39}, ValueError, "timestep_norm: eps must be positive and finite in float32; "),
        pytest.param(
            {"count": torch.tensor([3, -5])},
            ValueError,
            r"timestep_norm: count must be at least 0 everywhere; got -5 at \[1\]",
            marks=values_are_read,
        ),
        (
            {"count": None},
            ValueError,
            "timestep_norm: count, mean and var must be given all three or none; got count none, "
            "mean given, var given",
        ),
        (
            {"count": torch.ones(2, dtype=torch.int32)},
            TypeError,
            "timestep_norm: count must be int64; got int32",
        ),
        (
            {"mean": torch.ones(2, 3)},
            ValueError,
            r"timestep_norm: mean must be \[B, G\] with B = 2 \(x\.shape\[0\]\), G = 4; "
            r"got \[2, 3\]",
        ),
        (
            {"padding_mask": torch.ones(2, 3)},
            TypeError,
            "timestep_norm: padding_mask must be bool; got float32",
        ),
        (
            {"padding_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"timestep_norm: padding_mask must be \[B, L\] with B = 2 \(x\.shape\[0\]\), L = 3 "
            r"\(x\.shape\[1\]\); got \[2, 4\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            r"timestep_norm: x must be one packed row, \[1, T, ...\], .*; got \[2, 3, 8\]",
        ),
        (
            {"x": torch.ones(1, 3, 8), "cu_seqlens": torch.tensor([0, 1, 1, 3])},
            ValueError,
            r"timestep_norm: count must be \[segments\] with segments = 3; got \[2\]",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 3, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "num_groups": 4,
        "eps": 1e-5,
        "count": torch.ones(2, dtype=torch.int64),
        "mean": torch.ones(2, 4),
        "var": torch.ones(2, 4),
    }
    with pytest.raises(error, match=message):
        timestep_norm(**{**arguments, **change})


@pytest.mark.parametrize(("bounds", "error", "message"), BAD_BOUNDS)
def test_bad_bounds(bounds: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"timestep_norm: .*{message}"):
        timestep_norm(torch.ones(1, 6, 8), torch.ones(8), torch.ones(8), 2, cu_seqlens=bounds)
