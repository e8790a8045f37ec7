"""rms_norm: shapes drawn at random, extremes, bad arguments."""

from typing import Any

import pytest
import torch
from checks import DTYPES, check_forward, check_gradients
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops import registry, rms_norm
from megalodon_ops._library import Maker

OP = registry["rms_norm"]


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    D=st.integers(1, 200),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(isa: str, lead: list[int], D: int, affine: bool, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    args = (make.activation(*lead, D), make.stat(D) if affine else None, 1e-5)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1027, 8200])
def test_wide_rows(isa: str, D: int, dtype: torch.dtype) -> None:
    """Wider than the registers of a GPU's block of threads."""
    make = Maker(dtype)
    args = (make.activation(35, D), make.stat(D), 1e-5)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_empty_rows() -> None:
    assert rms_norm(torch.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_large_values_stay_finite(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64, dtype=dtype)
    x[1] = 1e4
    y = rms_norm(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[1], torch.ones_like(y[1]))


def test_nan_and_inf_propagate() -> None:
    x = torch.ones(3, 40)
    x[0, 7] = float("nan")
    x[1, 7] = float("inf")
    y = rms_norm(x)
    assert y[0].isnan().all()
    assert y[1, 7].isnan()
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(())}, ValueError, r"rms_norm: x must be \[\.\.\., D\]; got \[\]"),
        (
            {"weight": torch.ones(7)},
            ValueError,
            r"rms_norm: weight must be \[D\] with D = 8 \(x\.shape\[2\]\); got \[7\]",
        ),
        (
            {"weight": torch.ones(8, dtype=torch.float64)},
            TypeError,
            "rms_norm: weight must be float32; got float64",
        ),
        ({"eps": -1.0}, ValueError, "rms_norm: eps must be positive and finite; got -1"),
        ({"eps": float("nan")}, ValueError, "rms_norm: eps must be positive and finite; got nan"),
        (
            {"eps": 1e-60},
            ValueError,
            "rms_norm: eps must be positive and finite in float32; got 1e-60",
        ),
        (
            {"x": torch.ones(2, 3, 8).to(torch.float8_e4m3fn)},
            TypeError,
            "rms_norm: x must be float32, bfloat16, float16 or float64; got float8",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 3, 8), "weight": torch.ones(8), "eps": 1e-5}
    with pytest.raises(error, match=message):
        rms_norm(**{**arguments, **change})
