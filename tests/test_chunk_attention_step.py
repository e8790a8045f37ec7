"""chunk_attention_step: decoding equals the whole row; parts; extremes, bad arguments."""

import math
from typing import Any

import pytest
import torch
from backend import BACKEND, values_are_read
from checks import DTYPES, check_forward
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalodon_ops import chunk_attention_step, kernels, registry
from megalodon_ops._library import Maker

OP = registry["chunk_attention_step"]
F64 = torch.float64


def arguments(
    dtype: torch.dtype, H: int, S: int, E: int, C: int, position: list[int], sliding: bool = False
) -> tuple[Any, ...]:
    make, B = Maker(dtype), len(position)
    return (
        make.activation(B, H, S) * max(S, 1) ** -0.5,
        make.activation(B, H, S),
        make.activation(B, H, E),
        make.activation(B, C, H, S),
        make.activation(B, C, H, E),
        torch.tensor(position, dtype=torch.int64),
        C,
        sliding,
    )


@given(
    H=st.integers(0, 3),
    S=st.integers(0, 70),
    E=st.integers(0, 70),
    C=st.integers(1, 150),
    position=st.lists(st.integers(0, 10**12), max_size=3),
    sliding=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str,
    H: int,
    S: int,
    E: int,
    C: int,
    position: list[int],
    sliding: bool,
    dtype: torch.dtype,
) -> None:
    check_forward(OP, arguments(dtype, H, S, E, C, position, sliding))


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("m", [0, 1, 300, 1023, 1024 + 300])
def test_long_caches_are_split_over_parts(isa: str, m: int, sliding: bool) -> None:
    args = arguments(F64, 1, 64, 1024, 1024, [m], sliding)
    check_forward(OP, args)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                outputs.append(OP.overload(*args))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("H", "S", "E", "C", "position"),
    [
        (1, 2, 2, 16384, [16383, 5000]),
        (2, 600, 4096, 40, [20, 39]),
        (1, 8, 300, 70, [69]),
        (3, 64, 64, 200, [0, 15, 16, 130]),
    ],
)
def test_shapes_at_which_a_gpu_divides_otherwise(
    isa: str, H: int, S: int, E: int, C: int, position: list[int], dtype: torch.dtype
) -> None:
    """More slots than all parts' tiles, more columns than a block has, unaligned rows."""
    check_forward(OP, arguments(dtype, H, S, E, C, position))


@pytest.mark.parametrize("dropped_chunks", [0, 3])
def test_steps_equal_the_whole_row(isa: str, dropped_chunks: int) -> None:
    """Slots that were never written hold NaN and must not be read."""
    C, L, H = 8, 20, 2
    make = Maker(F64)
    q, k, v = make.activation(2, L, H, 4), make.activation(2, L, H, 4), make.activation(2, L, H, 3)
    whole, _ = registry["chunk_attention"].overload(q, k, v, C)
    k_cache, v_cache = (torch.full((2, C, H, n), math.nan, dtype=F64) for n in (4, 3))
    for t in range(L):
        position = torch.full((2,), dropped_chunks * C + t)
        o = chunk_attention_step(q[:, t], k[:, t], v[:, t], k_cache, v_cache, position, C)
        torch.testing.assert_close(o, whole[:, t])


def test_sliding_steps_attend_to_the_last_tokens(isa: str) -> None:
    """Of a window of C, from an empty cache on; slots that were never written hold NaN."""
    C, L, H = 5, 17, 2
    make = Maker(F64)
    q, k, v = make.activation(2, L, H, 4), make.activation(2, L, H, 4), make.activation(2, L, H, 3)
    k_cache, v_cache = (torch.full((2, C, H, n), math.nan, dtype=F64) for n in (4, 3))
    for t in range(L):
        position = torch.full((2,), t)
        o = chunk_attention_step(q[:, t], k[:, t], v[:, t], k_cache, v_cache, position, C, True)
        last = slice(max(0, t - C + 1), t + 1)
        weights = torch.einsum("bhs,bjhs->bhj", q[:, t], k[:, last]).softmax(-1)
        torch.testing.assert_close(o, torch.einsum("bhj,bjhe->bhe", weights, v[:, last]))


def test_sliding_rows_fill_their_windows_by_themselves(isa: str) -> None:
    """Some windows are full, of others the last slots were never written."""
    C, position = 8, [3, 13, 0, 7, 8]
    args = arguments(F64, 2, 4, 3, C, position, sliding=True)
    for b, p in enumerate(position):
        for cache in args[3:5]:
            cache[b, p + 1 :] = math.nan
    got = chunk_attention_step(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    for b, p in enumerate(position):
        rows = (a[b : b + 1].clone() for a in args[:6])
        want = chunk_attention_step(*rows, C, p >= C)
        torch.testing.assert_close(got[b : b + 1], want)


@pytest.mark.parametrize("hidden", [slice(0, 64), slice(64, 128), slice(0, 130)])
def test_scores_of_minus_infinity_have_no_weight(hidden: slice) -> None:
    """Nor has a tile or a part that has no other ones."""
    for B in (1, 300):  # on a GPU many parts of a row, and one
        q, k, v, k_cache, v_cache, position, C, _ = arguments(
            torch.float32, 1, 4, 3, 150, [140] * B
        )
        q[..., 0] = 1
        k_cache[:, hidden, :, 0] = -math.inf
        seen = [j for j in range(140) if not hidden.start <= j < hidden.stop]
        keys = torch.cat([k_cache[:, seen], k[:, None]], 1)
        values = torch.cat([v_cache[:, seen], v[:, None]], 1)
        weights = torch.einsum("bhs,bjhs->bhj", q, keys).softmax(-1)
        got = chunk_attention_step(q, k, v, k_cache, v_cache, position, C)
        torch.testing.assert_close(got, torch.einsum("bhj,bjhe->bhe", weights, values))


def test_caches_change_in_one_slot_only() -> None:
    args = arguments(torch.float32, 2, 4, 3, 5, [1, 9], sliding=True)
    _, k, v, k_cache, v_cache, *_ = args
    before = k_cache.clone(), v_cache.clone()
    with torch.no_grad():
        OP.overload(*args)
    for cache, old, new in ((k_cache, before[0], k), (v_cache, before[1], v)):
        for b, m in enumerate((1, 4)):
            assert torch.equal(cache[b, m], new[b])
            old[b, m] = new[b]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_huge_scores_stay_finite(dtype: torch.dtype) -> None:
    q, *rest = arguments(dtype, 1, 16, 5, 100, [99])
    assert chunk_attention_step(q * 1e4, *rest).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_stay_in_their_row(which: int, bad: float) -> None:
    args, clean = (arguments(torch.float32, 1, 4, 3, 5, [2, 3]) for _ in range(2))
    args[which][0] = bad
    got, want = chunk_attention_step(*args), chunk_attention_step(*clean)
    assert not got[0].isfinite().all()
    torch.testing.assert_close(got[1], want[1])


def test_gradients_are_refused() -> None:
    q, *rest = arguments(torch.float32, 1, 4, 3, 5, [2])
    with pytest.raises(NotImplementedError, match="chunk_attention_step: has no gradient"):
        OP.overload(q.requires_grad_(), *rest)


NAMES = [argument.name for argument in OP.arguments]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4)}, ValueError, r"q must be \[B, H, S\]; got \[2, 4\]"),
        ({"k": torch.ones(2, 2, 4)}, ValueError, r"k must be \[2, 1, 4\] like q; got \[2, 2, 4\]"),
        ({"v": torch.ones(1, 1, 3)}, ValueError, r"v must be \[B, H, E\] with B = 2 .*; got"),
        (
            {"k_cache": torch.ones(2, 6, 1, 4)},
            ValueError,
            r"k_cache must be \[B, C, H, S\] with .*C = 5.*; got \[2, 6, 1, 4\]",
        ),
        ({"v_cache": torch.ones(2, 5, 1, 3).half()}, TypeError, "v_cache must be float32; got fl"),
        (
            {"v_cache": torch.ones(2, 5, 1, 6)[..., ::2]},
            ValueError,
            r"v_cache must be contiguous \(row-major\); got",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        pytest.param(
            {"position": torch.tensor([0, -2])},
            ValueError,
            r"position must be at least 0 everywhere; got -2 at \[1\]",
            marks=values_are_read,
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = dict(zip(NAMES, arguments(torch.float32, 1, 4, 3, 5, [2, 3]), strict=True))
    caches: list[Tensor] = [args["k_cache"], args["v_cache"]]
    before = [cache.clone() for cache in caches]
    with pytest.raises(error, match=f"chunk_attention_step: {message}"):
        chunk_attention_step(**{**args, **change})
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old)


@pytest.mark.skipif(BACKEND == "cuda", reason="copies on the GPU share nothing")
def test_caches_that_share_memory_are_refused() -> None:
    q, k, v, k_cache, _, *rest = arguments(torch.float32, 1, 4, 4, 5, [2])
    before = k_cache.clone()
    message = "chunk_attention_step: {} must be apart in memory from k_cache, which is written to"
    for call in (chunk_attention_step, kernels.chunk_attention_step):
        with pytest.raises(ValueError, match=message.format("v_cache")):
            call(q, k, v, k_cache, k_cache, *rest)
        with pytest.raises(ValueError, match=message.format("q")):
            call(k_cache[:, 2], k, v, k_cache, k_cache.clone(), *rest)
    assert torch.equal(k_cache, before)


@pytest.mark.skipif(BACKEND == "cuda", reason="copies on the GPU are writeable")
def test_numpy_caches_must_be_writeable() -> None:
    args = [
        a.numpy() if isinstance(a, Tensor) else a for a in arguments(torch.float32, 1, 4, 3, 5, [2])
    ]
    args[3].flags.writeable = False
    with pytest.raises(ValueError, match="must be writeable"):
        kernels.chunk_attention_step(*args)
