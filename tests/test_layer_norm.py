"""layer_norm: shapes drawn at random, extremes, bad arguments."""

from typing import Any

import pytest
import torch
from checks import DTYPES, check_forward, check_gradients
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops import layer_norm, registry
from megalodon_ops._library import Maker

OP = registry["layer_norm"]


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    D=st.integers(2, 200),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(isa: str, lead: list[int], D: int, affine: bool, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    parameters = (make.stat(D), make.stat(D)) if affine else (None, None)
    args = (make.activation(*lead, D), *parameters, 1e-3)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1027, 8200])
def test_wide_rows(isa: str, D: int, dtype: torch.dtype) -> None:
    """Wider than the registers of a GPU's block of threads."""
    make = Maker(dtype)
    args = (make.activation(35, D), make.stat(D), make.stat(D), 1e-5)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_empty_rows() -> None:
    assert layer_norm(torch.empty(3, 0)).shape == (3, 0)


def test_one_element_gives_the_bias() -> None:
    y = layer_norm(torch.randn(4, 1), torch.randn(1), torch.tensor([2.0]))
    assert torch.equal(y, torch.full((4, 1), 2.0))


def test_a_large_mean_does_not_cancel() -> None:
    x = torch.randn(4, 512) + 1e4
    wanted = torch.nn.functional.layer_norm(x.double(), (512,))
    torch.testing.assert_close(layer_norm(x).double(), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [77, 1024])
def test_a_mean_of_any_size_keeps_the_statistics_exact(
    isa: str, D: int, dtype: torch.dtype
) -> None:
    """Means of 0 to 1000 deviations, in rows side by side; each row as if it were alone."""
    means = torch.tensor([0.0, 0.2, 0.34, 0.36, 1.0, 30.0, -0.35, 1000.0, -0.1]).double()
    x = ((Maker(torch.float64).activation(len(means), D) + means[:, None]) * 3).to(dtype)
    _, mean, rstd = torch.ops.megalodon.layer_norm(x, None, None, 1e-5)
    wanted = torch.rsqrt(x.double().var(1, correction=0) + 1e-5)
    tolerance = 1e-14 if dtype == torch.float64 else 4e-7
    torch.testing.assert_close(rstd.double(), wanted, rtol=tolerance, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=tolerance, atol=tolerance)
    for row, r in zip(x, rstd, strict=True):
        assert torch.equal(torch.ops.megalodon.layer_norm(row, None, None, 1e-5)[2], r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_give_zero(dtype: torch.dtype) -> None:
    assert not layer_norm(torch.full((2, 64), 1e4, dtype=dtype)).any()


def test_nan_and_inf_propagate_within_their_row() -> None:
    x = torch.randn(3, 40)
    x[0, 7], x[1, 7] = float("nan"), float("inf")
    y = layer_norm(x)
    assert y[0].isnan().all()
    assert y[1].isnan().all()
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(())}, ValueError, r"layer_norm: x must be \[\.\.\., D\]; got \[\]"),
        (
            {"bias": torch.ones(7)},
            ValueError,
            r"layer_norm: bias must be \[D\] with D = 8 \(x\.shape\[2\]\); got \[7\]",
        ),
        (
            {"bias": None},
            ValueError,
            "layer_norm: weight and bias must be given both or neither; got weight alone",
        ),
        (
            {"weight": torch.ones(8, dtype=torch.float64)},
            TypeError,
            "layer_norm: weight must be float32; got float64",
        ),
        ({"eps": 0.0}, ValueError, "layer_norm: eps must be positive and finite; got 0"),
        ({"eps": 1e-60}, ValueError, "layer_norm: eps must be positive and finite in float32; got"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 3, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "eps": 1e-5,
    }
    with pytest.raises(error, match=message):
        layer_norm(**{**arguments, **change})
