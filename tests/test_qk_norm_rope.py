"""qk_norm_rope: random shapes and positions, long rows, extremes, bad arguments."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from backend import BACKEND, values_are_read
from checks import DTYPES, check_forward, check_gradients
from hypothesis import given
from hypothesis import strategies as st
from packing import BAD_BOUNDS, BOUNDS_DTYPES, LENGTHS
from torch import Tensor

from megalodon_ops import qk_norm_rope, registry
from megalodon_ops._library import Maker
from megalodon_ops.reference.qk_norm_rope import qk_norm_rope as reference

OP = registry["qk_norm_rope"]


def arguments(
    dtype: torch.dtype, B: int, L: int, H: int, S: int, C: int, position: Tensor | None = None
) -> tuple[Any, ...]:
    make = Maker(dtype)
    scales = make.stat(2, H * S, scale=0.3), make.stat(2, H * S, scale=0.3)
    return make.activation(B, L, H * S), *scales, H, C, 10000.0, position, 1e-5, None


@given(
    B=st.integers(0, 3),
    L=st.integers(0, 40),
    H=st.integers(1, 3),
    pairs=st.integers(1, 70),
    C=st.integers(1, 50),
    starts=st.none() | st.lists(st.integers(0, 10**12), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str,
    B: int,
    L: int,
    H: int,
    pairs: int,
    C: int,
    starts: list[int] | None,
    dtype: torch.dtype,
) -> None:
    position = None if starts is None else torch.tensor(starts[:B], dtype=torch.int64)
    args = arguments(dtype, B, L, H, 2 * pairs, C, position)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "S"), [(3, 64), (2, 256), (1, 512), (1, 530), (1, 2056)])
def test_wide_heads(isa: str, H: int, S: int, dtype: torch.dtype) -> None:
    """Parts of a warp of a GPU, a warp, several, more than their registers."""
    args = arguments(dtype, 2, 20, H, S, 7, torch.tensor([3, 12]))
    check_forward(OP, args)
    check_gradients(OP, args)


def test_rows_that_are_not_aligned_are_the_same(isa: str) -> None:
    z, *rest = arguments(torch.bfloat16, 1, 5, 1, 64, 3)
    memory = torch.empty(z.numel() + 1, dtype=z.dtype)
    shifted = memory[1:].view(z.shape).copy_(z)
    for a, b in zip(OP.overload(shifted, *rest), OP.overload(z, *rest), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.bfloat16, 4e-3), (torch.float32, 1e-6), (torch.float64, 1e-13)],
    ids=str,
)
@pytest.mark.parametrize(("L", "S", "C"), [(3000, 64, 2500), (70000, 8, 2500)])
def test_long_row_keeps_its_angles(
    isa: str, dtype: torch.dtype, most: float, L: int, S: int, C: int
) -> None:
    """Many tokens of a chunk: what the recurrence between exact angles adds must not show."""
    args = arguments(dtype, 1, L, 1, S, C, torch.tensor([700]))
    check_forward(OP, args)
    exact = reference(*(a.double() if isinstance(a, Tensor) and a.ndim > 1 else a for a in args))
    error = (OP.overload(*args)[0].double() - exact[0]).norm() / exact[0].norm()
    assert error < most


@pytest.mark.parametrize("C", [2**21, 2**40])
def test_far_position_in_a_huge_chunk(isa: str, C: int) -> None:
    args = arguments(torch.float64, 1, 5, 1, 8, C, torch.tensor([2**21 - 3]))
    q, _, _ = OP.overload(*args)
    torch.testing.assert_close(q, reference(*args)[0], rtol=1e-8, atol=1e-8)


@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_streams(cuts: list[int]) -> None:
    z, *rest = arguments(torch.float64, 2, 30, 2, 6, 7)
    ends = [0, *sorted(cuts), 30]
    whole = OP.overload(z, *rest)
    parts = []
    for begin, end in pairwise(ends):
        position = torch.tensor([begin, begin])
        parts.append(OP.overload(z[:, begin:end], *rest[:5], position, *rest[6:]))
    for streamed, want in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(streamed, 1), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_large_values_stay_finite(dtype: torch.dtype) -> None:
    z, gamma, beta, *_ = arguments(dtype, 1, 3, 2, 8, 4)
    z[:, 0], z[:, 1] = 0, 1e4
    for out in qk_norm_rope(z, gamma, beta, 2, 4):
        assert out.isfinite().all()


def test_nan_and_inf_stay_in_their_token_and_head() -> None:
    z, gamma, beta, *_ = arguments(torch.float32, 1, 4, 2, 8, 4)
    z[0, 1, 3], z[0, 2, 9] = float("nan"), float("inf")
    q, k = qk_norm_rope(z, gamma, beta, 2, 4)
    for out in (q, k):
        assert out[0, 1, 0].isnan().all()
        assert out[0, 2, 1, 0:2].isnan().all()
        assert out[0, [0, 3]].isfinite().all()
        assert out[0, 1, 1].isfinite().all()
        assert out[0, 2, 0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.ones(2, 8)}, ValueError, r"z must be \[B, L, D\]; got \[2, 8\]"),
        (
            {"gamma": torch.ones(3, 8)},
            ValueError,
            r"gamma must be \[2, D\] with D = 8 \(z\.shape\[2\]\); got \[3, 8\]",
        ),
        ({"beta": torch.ones(2, 8).double()}, TypeError, "beta must be float32; got float64"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1; got 0"),
        ({"num_heads": 3}, ValueError, r"z must be \[B, L, H \* S\] .* H = 3 .*; got H \* S = 8"),
        ({"num_heads": 8}, ValueError, r"z must be .* with S even and H = 8"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"rope_base": 0.0}, ValueError, "rope_base must be positive and finite; got 0"),
        ({"eps": float("inf")}, ValueError, "eps must be positive and finite; got inf"),
        ({"eps": 1e-60}, ValueError, "eps must be positive and finite in float32; got 1e-60"),
        (
            {"position": torch.zeros(2, dtype=torch.complex64)},
            TypeError,
            "position must be int64; got complex64",
        ),
        pytest.param(
            {"position": torch.tensor([3, -1])},
            ValueError,
            r"position must be at least 0 everywhere; got -1 at \[1\]",
            marks=values_are_read,
        ),
        (
            {"position": torch.tensor([3])},
            ValueError,
            r"position must be \[B\] with B = 2 .*; got \[1\]",
        ),
        ({"position": torch.ones(2)}, TypeError, "position must be int64; got float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "z": torch.ones(2, 3, 8),
        "gamma": torch.ones(2, 8),
        "beta": torch.ones(2, 8),
        "num_heads": 2,
        "chunk_size": 4,
    }
    with pytest.raises(error, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(**{**arguments, **change})


@given(
    lengths=LENGTHS,
    bounds_dtype=BOUNDS_DTYPES,
    H=st.integers(1, 3),
    pairs=st.integers(1, 70),
    C=st.integers(1, 50),
    starts=st.none() | st.lists(st.integers(0, 10**12), min_size=7, max_size=7),
    dtype=st.sampled_from(DTYPES),
)
def test_packed(
    isa: str,
    lengths: list[int],
    bounds_dtype: torch.dtype,
    H: int,
    pairs: int,
    C: int,
    starts: list[int] | None,
    dtype: torch.dtype,
) -> None:
    position = None if starts is None else torch.tensor(starts[: len(lengths)])
    args = arguments(dtype, 1, sum(lengths), H, 2 * pairs, C, position)
    bounds = Maker(dtype).bounds(*lengths, dtype=bounds_dtype)
    check_forward(OP, (*args[:-1], bounds))
    check_gradients(OP, (*args[:-1], bounds))


def test_many_segments() -> None:
    """Thousands of them, most empty or short, beside the same tokens in rows of one segment."""
    count = 10_000 if BACKEND == "" else 500
    lengths = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(0))
    make = Maker(torch.float32)
    starts = torch.arange(count) % 11
    args = list(arguments(torch.float32, 1, int(lengths.sum()), 1, 8, 5, starts))
    args[-1] = make.bounds(*lengths.tolist())
    q, k, _ = OP.overload(*args)
    tokens = torch.cat([torch.arange(n) for n in lengths.tolist()])
    alone = [args[0].view(-1, 1, 8), *args[1:6], starts.repeat_interleave(lengths) + tokens, 1e-5]
    want_q, want_k, _ = OP.overload(*alone, None)
    torch.testing.assert_close(q[0], want_q[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k[0], want_k[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bounds", "error", "message"), BAD_BOUNDS)
def test_bad_bounds(bounds: Tensor, error: type[Exception], message: str) -> None:
    z, gamma, beta, *_ = arguments(torch.float32, 1, 6, 1, 4, 4)
    with pytest.raises(error, match=f"qk_norm_rope: .*{message}"):
        qk_norm_rope(z, gamma, beta, 1, 4, cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("rows", "position", "message"),
    [
        (2, None, r"z must be one packed row, \[1, T, ...\], .*; got \[2, 3, 4\]"),
        (1, torch.tensor([5]), r"position must be \[segments\] with segments = 2; got \[1\]"),
    ],
)
def test_bad_packed_arguments(rows: int, position: Tensor | None, message: str) -> None:
    z, gamma, beta, *_ = arguments(torch.float32, rows, 3, 1, 4, 4)
    bounds = torch.tensor([0, 2, 3])
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(z, gamma, beta, 1, 4, position=position, cu_seqlens=bounds)
