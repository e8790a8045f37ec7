"""silu_mul: shapes drawn at random, extremes, bad arguments."""

import pytest
import torch
from checks import DTYPES, check_forward, check_gradients
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops import registry, silu_mul
from megalodon_ops._library import Maker

OP = registry["silu_mul"]


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(isa: str, shape: list[int], gated: bool, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    args = (make.activation(*shape), make.activation(*shape) if gated else None)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_more_elements_than_threads_of_a_grid(isa: str) -> None:
    make = Maker(torch.float32)
    args = (make.activation(541_001), make.activation(541_001))
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_whole_range(isa: str, dtype: torch.dtype) -> None:
    """From where sigmoid is 0 to where it is 1, and what is no number."""
    a = torch.cat([torch.linspace(-1000, 1000, 4001), torch.linspace(-20, 20, 4001)]).to(dtype)
    wanted = torch.nn.functional.silu(a.double())
    relative = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(silu_mul(a).double(), wanted, rtol=relative, atol=1e-36)
    special = silu_mul(torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype))
    assert special[0] == float("inf")
    assert special[1:].isnan().all()  # -inf * 0, as in torch


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"silu_mul: b must be \[2, 3\] like a; got \[3, 2\]"):
        silu_mul(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(TypeError, match="silu_mul: b must be float32 like a; got bfloat16"):
        silu_mul(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"silu_mul: a must be float32, .*; got complex64"):
        silu_mul(torch.ones(2, 3, dtype=torch.complex64))
