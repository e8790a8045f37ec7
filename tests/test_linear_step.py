"""linear_step: shapes drawn at random, many rows, threads, NaN; where the model calls it."""

import pytest
import torch
from backend import BACKEND
from checks import DTYPES, check_forward
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_ops import linear_step, registry
from megalodon_ops._library import Maker
from megalodon_ops.nn.linear import linear

OP = registry["linear_step"]


def arguments(dtype: torch.dtype, B: int, into: int, out: int, bias: bool) -> tuple[Tensor, ...]:
    make = Maker(dtype)
    weight = make.activation(out, into) * max(1, into) ** -0.5
    return make.activation(B, into), weight, make.activation(out) if bias else None


@given(
    B=st.integers(0, 11),
    into=st.integers(0, 150),
    out=st.integers(0, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(isa: str, B: int, into: int, out: int, bias: bool, dtype: torch.dtype) -> None:
    check_forward(OP, arguments(dtype, B, into, out, bias))


def test_any_number_of_threads(isa: str) -> None:
    args = arguments(torch.float32, 7, 512, 300, True)
    check_forward(OP, args)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(linear_step(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_nan_stays_in_its_row(isa: str) -> None:
    x, weight, bias = arguments(torch.float32, 6, 40, 30, True)
    want = linear_step(x, weight, bias)
    x[4, 7] = float("nan")
    got = linear_step(x, weight, bias)
    assert got[4].isnan().all()
    assert torch.equal(got[[0, 1, 2, 3, 5]], want[[0, 1, 2, 3, 5]])


def test_no_gradient() -> None:
    x, weight, bias = arguments(torch.float32, 2, 4, 3, True)
    with pytest.raises(NotImplementedError, match="linear_step: has no gradient"):
        linear_step(x.requires_grad_(), weight, bias)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 1, 4)}, ValueError, r"x must be \[B, in\]; got \[2, 1, 4\]"),
        (
            {"weight": torch.ones(3, 5)},
            ValueError,
            r"weight must be \[out, in\] with in = 4 \(x.shape\[1\]\); got \[3, 5\]",
        ),
        (
            {"bias": torch.ones(4)},
            ValueError,
            r"bias must be \[out\] with out = 3 \(weight.shape\[0\]\); got \[4\]",
        ),
        (
            {"weight": torch.ones(3, 4, dtype=torch.bfloat16)},
            TypeError,
            "weight must be float32; got bfloat16",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    args = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    with pytest.raises(error, match=f"linear_step: {message}"):
        linear_step(**{**args, **change})


class Calls(TorchDispatchMode):
    """Counts the calls of linear_step."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is OP.overload
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(BACKEND == "cuda", reason="of the CPU")
def test_where_the_model_calls_it() -> None:
    def count(rows: int, dtype: torch.dtype = torch.float32, leading: tuple[int, ...] = ()) -> int:
        x, weight, bias = arguments(dtype, rows, 20, 30, True)
        x = x.reshape(*leading, rows, 20)
        with Calls() as calls:
            got = linear(x, weight, bias)
        torch.testing.assert_close(got, F.linear(x, weight, bias))
        return calls.count

    with torch.no_grad():
        assert count(1) == count(31) == count(3, torch.bfloat16) == count(3, leading=(1,)) == 1
        assert count(32) == 0
    assert count(1) == 1  # no input wants a gradient
    x, weight, _ = arguments(torch.float32, 2, 4, 3, False)
    with Calls() as calls:
        linear(x, weight.requires_grad_()).sum().backward()
    assert calls.count == 0
    assert weight.grad is not None
