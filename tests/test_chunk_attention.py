"""chunk_attention: golden data, random shapes, streaming, DropKey, extremes, bad arguments."""

import math
from itertools import pairwise
from typing import Any

import golden
import packing
import pytest
import torch
from backend import BACKEND, values_are_read
from checks import DTYPES, check_forward, check_gradients, gradients
from golden import Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalodon_ops import chunk_attention, kernels, qk_norm_rope, registry
from megalodon_ops._library import Maker
from megalodon_ops.reference.chunk_attention import dropkey_mask

OP = registry["chunk_attention"]
F64 = torch.float64


def qkv(
    dtype: torch.dtype, B: int, L: int, H: int, S: int, E: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    make = Maker(dtype, seed=seed)
    q = make.activation(B, L, H, S) * max(S, 1) ** -0.5
    return q, make.activation(B, L, H, S), make.activation(B, L, H, E)


@golden.each("attention", F64, torch.float32)
def test_golden(isa: str, case: Case, dtype: torch.dtype) -> None:
    got = golden.run_attention(case, qk_norm_rope, chunk_attention, dtype)
    golden.assert_golden(case, got, dtype)


@given(
    B=st.integers(0, 2),
    L=st.integers(0, 200),
    H=st.integers(1, 3),
    S=st.integers(0, 40),
    E=st.integers(0, 70),
    C=st.sampled_from([1, 2, 3, 16, 63, 64, 65, 100, 128, 129, 300]),
    starts=st.none() | st.lists(st.integers(0, 10**6), min_size=2, max_size=2),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    mode=st.sampled_from(["key", "weight"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str,
    B: int,
    L: int,
    H: int,
    S: int,
    E: int,
    C: int,
    starts: list[int] | None,
    dropout_p: float,
    mode: str,
    dtype: torch.dtype,
) -> None:
    make = Maker(dtype, seed=1)
    caches: tuple[Tensor | None, ...] = (None, None, None)
    if starts is not None:
        position = torch.tensor(starts[:B], dtype=torch.int64)
        caches = make.activation(B, C, H, S), make.activation(B, C, H, E), position
    args = (*qkv(dtype, B, L, H, S, E), C, dropout_p, 5, None, *caches, False, mode)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("start", [None, 100, 256, 511])
@pytest.mark.parametrize("C", [300, 512])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_around_a_chunk(isa: str, C: int, extra: int, start: int | None) -> None:
    """Chunks of several tiles and key blocks, which the caches shift against each other."""
    make = Maker(F64, seed=1)
    caches: tuple[Tensor | None, ...] = (None, None, None)
    if start is not None:
        caches = make.activation(1, C, 1, 8), make.activation(1, C, 1, 12), torch.tensor([start])
    args = (*qkv(F64, 1, C + extra, 1, 8, 12), C, 0.0, 0, None, *caches)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["key", "weight"])
@pytest.mark.parametrize(
    ("L", "C", "starts", "S", "E", "dropout_p"),
    [
        (64, 64, None, 8, 64, 0.0),
        (65, 65, None, 16, 72, 0.3),
        (128, 128, None, 40, 136, 0.0),
        (130, 131, None, 72, 8, 0.0),
        (270, 270, (0, 7), 8, 16, 0.2),
        (150, 200, (77, 199), 24, 40, 0.3),
        (5, 300, (290, 130), 16, 24, 0.3),
        (129, 300, None, 7, 130, 0.0),
    ],
)
def test_tile_edges(
    L: int,
    C: int,
    starts: tuple[int, int] | None,
    S: int,
    E: int,
    dropout_p: float,
    mode: str,
    dtype: torch.dtype,
) -> None:
    """Around the GPU's tile sizes, with S and E that allow 16-byte accesses, but for one."""
    if mode == "weight" and dropout_p == 0:
        pytest.skip("drops nothing")
    make = Maker(dtype, seed=1)
    caches: tuple[Tensor | None, ...] = (None, None, None)
    if starts is not None:
        position = torch.tensor(starts)
        caches = make.activation(2, C, 1, S), make.activation(2, C, 1, E), position
    B = 1 if starts is None else 2
    args = (*qkv(dtype, B, L, 1, S, E), C, dropout_p, 5, None, *caches, False, mode)
    check_forward(OP, args)
    check_gradients(OP, args)


@given(
    lengths=packing.LENGTHS,
    H=st.integers(1, 3),
    S=st.integers(0, 12),
    E=st.integers(0, 20),
    C=st.sampled_from([1, 3, 16, 32, 64, 100]),
    starts=st.none() | st.lists(st.integers(0, 200), min_size=7, max_size=7),
    dropout_p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    bounds_dtype=packing.BOUNDS_DTYPES,
)
def test_packed_rows(
    isa: str,
    lengths: list[int],
    H: int,
    S: int,
    E: int,
    C: int,
    starts: list[int] | None,
    dropout_p: float,
    dtype: torch.dtype,
    bounds_dtype: torch.dtype,
) -> None:
    make = Maker(dtype, seed=1)
    n = len(lengths)
    caches: tuple[Tensor | None, ...] = (None, None, None)
    if starts is not None:
        caches = make.activation(n, C, H, S), make.activation(n, C, H, E), make.ints(*starts[:n])
    bounds = make.bounds(*lengths, dtype=bounds_dtype)
    args = (*qkv(dtype, 1, sum(lengths), H, S, E), C, dropout_p, 5, bounds, *caches)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("lengths", "C"),
    [((300,), 128), ((1, 299, 0, 5), 300), ((130, 70, 257, 3), 200), ((64, 65, 128, 129), 512)],
    ids=str,
)
def test_long_segments(lengths: tuple[int, ...], C: int, cached: bool, dtype: torch.dtype) -> None:
    """Of several tiles and chunks, which begin where no tile of the whole row does."""
    make = Maker(dtype, seed=1)
    n, H, S, E = len(lengths), 2, 8, 16
    caches: tuple[Tensor | None, ...] = (None, None, None)
    if cached:
        starts = make.ints(*(C - 1, 70, 3, 2 * C + 64)[:n])
        caches = make.activation(n, C, H, S), make.activation(n, C, H, E), starts
    args = (*qkv(dtype, 1, sum(lengths), H, S, E), C, 0.2, 5, make.bounds(*lengths), *caches)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("C", [8, 2048])
def test_many_segments(C: int) -> None:
    """Equal to rows of a batch, as which they would be too many for the reference."""
    n, size = (300 if BACKEND else 10_000), 3
    leaves = [t.requires_grad_() for t in qkv(F64, n, size, 1, 2, 3)]
    rows, row_lse = OP.overload(*leaves, C)
    packed = [t.flatten(0, 1)[None] for t in leaves]
    o, lse = OP.overload(*packed, C, 0.0, 0, torch.arange(0, n * size + 1, size))
    assert torch.equal(o.view_as(rows), rows)
    assert torch.equal(lse[0].view(1, n, size).transpose(0, 1), row_lse)
    weight = torch.arange(rows.numel(), dtype=F64).sin().view_as(rows)
    want = torch.autograd.grad((rows * weight).sum(), leaves)
    got = torch.autograd.grad((o.view_as(rows) * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@given(
    cuts=st.lists(st.integers(0, 90), max_size=5),
    C=st.sampled_from([1, 4, 7, 32, 70, 90, 200]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    sliding=st.booleans(),
)
def test_streams(cuts: list[int], C: int, dropout_p: float, sliding: bool) -> None:
    """f(a || b) = f(a) || f(b | state(a)), and the gradients; unwritten slots are never read."""
    leaves = [t.requires_grad_() for t in qkv(F64, 2, 90, 2, 4, 3)]
    whole, whole_lse = OP.overload(*leaves, C, dropout_p, 3, sliding=sliding)
    ends = [0, *sorted(cuts), 90]
    outputs, lses = [], []
    for begin, end in pairwise(ends):
        first = max(0, begin - C) if sliding else begin - begin % C
        caches = [t.new_full((2, C, *t.shape[2:]), math.nan) for t in leaves[1:]]
        for cache, t in zip(caches, leaves[1:], strict=True):
            cache[:, torch.arange(first, begin) % C] = t[:, first:begin]
        part = [t[:, begin:end] for t in leaves]
        position = torch.tensor([begin, begin])
        o, lse = OP.overload(*part, C, dropout_p, 3, None, *caches, position, sliding)
        outputs.append(o)
        lses.append(lse)
    streamed = torch.cat(outputs, 1)
    torch.testing.assert_close(streamed, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat(lses, 2), whole_lse, rtol=1e-11, atol=1e-11)
    weight = torch.arange(streamed.numel(), dtype=F64).sin().view_as(streamed)
    got = torch.autograd.grad((streamed * weight).sum(), leaves)
    want = torch.autograd.grad((whole * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_cache_gradients_of_empty_keys_or_rows_are_written() -> None:
    """Of uninitialised memory: what the kernel leaves out shows as NaN."""
    make = Maker(F64)
    for L, S in ((0, 4), (0, 0), (3, 0)):
        q, k, v = qkv(F64, 1, L, 1, S, 3)
        caches = make.activation(1, 8, 1, S), make.activation(1, 8, 1, 3), torch.tensor([2])
        o, lse = OP.overload(q, k, v, 8, 0.0, 0, None, *caches)
        out = tuple(torch.full_like(t, math.nan) for t in (q, k, v, *caches[:2]))
        kernels.chunk_attention_backward(
            torch.ones_like(o), q, k, v, o, lse, 8, 0.0, 0, None, *caches, False, "key", out=out
        )
        assert all(t.isfinite().all() for t in out)


def test_cache_gradients_are_zero_beyond_the_filled_slots() -> None:
    make = Maker(F64)
    caches = make.activation(2, 8, 1, 4), make.activation(2, 8, 1, 3)
    args = (*qkv(F64, 2, 20, 1, 4, 3), 8, 0.0, 0, None, *caches, torch.tensor([3, 13]))
    *_, dk_cache, dv_cache = gradients(OP.overload, args, [torch.ones(2, 20, 1, 3), None])
    for grad in (dk_cache, dv_cache):
        assert grad is not None
        assert grad[0, :3].any(-1).all()
        assert not grad[0, 3:].any()
        assert grad[1, :5].any(-1).all()
        assert not grad[1, 5:].any()


@pytest.mark.parametrize("start", [0, 5, 2**32 - 20, 2**40 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_dropped_keys_are_those_of_the_reference(isa: str, dtype: torch.dtype, start: int) -> None:
    """With equal scores and one-hot values, o shows every weight."""
    B, L, H, C, p, seed = 2, 48, 2, 48, 0.35, -(2**40) - 17
    q = torch.zeros(B, L, H, 2, dtype=dtype)
    v = torch.eye(L, dtype=dtype)[None, :, None].expand(B, L, H, L)
    position = torch.full((B,), start)
    k_cache, v_cache = q.new_zeros(B, C, H, 2), q.new_zeros(B, C, H, L)
    o, _ = OP.overload(q, q, v, C, p, seed, None, k_cache, v_cache, position)
    i = position[:, None] + torch.arange(L)
    dropped = dropkey_mask(seed, p, H, i, i).permute(0, 2, 1, 3)  # (B, i, H, j)
    same = i[:, None, :] // C == i[:, :, None] // C
    visible = (same & torch.ones(L, L, dtype=torch.bool).tril())[:, :, None] & ~dropped
    assert torch.equal(o > 0, visible)


def test_dropout_rate_and_seed() -> None:
    n = 256
    q = torch.zeros(1, n, 2, 2)
    v = torch.eye(n)[None, :, None].expand(1, n, 2, n)
    pairs = 2 * n * (n + 1) // 2
    masks = []
    for seed in (0, 0, 1):
        mask = chunk_attention(q, q, v, n, 0.25, seed) > 0
        kept = mask.sum().item() / pairs
        assert abs(kept - 0.75) < 4 * math.sqrt(0.25 * 0.75 / pairs)
        masks.append(mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][:, :, 0], masks[0][:, :, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_key_dropped(isa: str, dtype: torch.dtype) -> None:
    args = (*qkv(dtype, 1, 70, 1, 4, 3), 35, 1 - 2**-33, 0)
    o, lse = OP.overload(*args)
    assert not o.any()
    assert (lse == -math.inf).all()
    for grad in gradients(OP.overload, args, [torch.ones(1, 70, 1, 3), None]):
        assert grad is not None
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_huge_scores_stay_finite(isa: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype, 1, 80, 1, 16, 5)
    args = (q * 1e4, k, v, 64)
    o, lse = OP.overload(*args)
    assert o.isfinite().all()
    assert lse.isfinite().all()
    assert o.abs().max() <= v.abs().max()
    for grad in gradients(OP.overload, args, [torch.ones(1, 80, 1, 5), None]):
        assert grad is not None
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_weights_beside_a_large_one(isa: str, dtype: torch.dtype) -> None:
    """511 equal weights of 2.6 units in the last place of the large one: each rounded to 3 of them
    when they are added to it one by one.
    """
    q, k = torch.ones(1, 512, 1, 8, dtype=dtype), torch.full((1, 512, 1, 8), -2.2129, dtype=dtype)
    k[:, 0] = -0.3374
    check_forward(OP, (q, k, Maker(dtype).activation(1, 512, 1, 16), 512))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_inf_do_not_leave_the_chunk(isa: str, which: int, bad: float) -> None:
    inputs = qkv(torch.float32, 2, 40, 1, 6, 5)
    inputs[which][0, 13] = bad
    o, _ = OP.overload(*inputs, 10)
    clean, _ = OP.overload(*qkv(torch.float32, 2, 40, 1, 6, 5), 10)
    torch.testing.assert_close(o[1], clean[1])
    torch.testing.assert_close(o[0, :10], clean[0, :10])
    torch.testing.assert_close(o[0, 20:], clean[0, 20:])
    if math.isnan(bad):
        assert o[0, 13].isnan().all()
    gradients(OP.overload, (*inputs, 10), [torch.ones(2, 40, 1, 5), None])


ARGUMENTS: dict[str, Any] = {
    "q": torch.ones(2, 3, 2, 4),
    "k": torch.ones(2, 3, 2, 4),
    "v": torch.ones(2, 3, 2, 5),
    "chunk_size": 4,
}
CACHES = {
    "k_cache": torch.ones(2, 4, 2, 4),
    "v_cache": torch.ones(2, 4, 2, 5),
    "position": torch.tensor([0, 7]),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(3, 2, 4)}, ValueError, r"q must be \[B, L, H, S\]; got \[3, 2, 4\]"),
        ({"k": torch.ones(2, 3, 2, 5)}, ValueError, r"k must be \[2, 3, 2, 4\] like q; got"),
        ({"k": torch.ones(2, 3, 2, 4).bfloat16()}, TypeError, "k must be float32 like q; got bf"),
        (
            {"v": torch.ones(2, 3, 1, 5)},
            ValueError,
            r"v must be \[B, L, H, E\] with .* H = 2 \(q\.shape\[2\]\); got \[2, 3, 1, 5\]",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1; got 1"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must be at least 0 and below 1; got nan"),
        (
            {"k_cache": CACHES["k_cache"]},
            ValueError,
            "k_cache, v_cache, position must be given all three or none; got k_cache only",
        ),
        (
            {**CACHES, "v_cache": None},
            ValueError,
            "must be given all three or none; got k_cache and position only",
        ),
        (
            {**CACHES, "k_cache": torch.ones(2, 3, 2, 4)},
            ValueError,
            r"k_cache must be \[B, C, H, S\] with .*C = 4.*; got \[2, 3, 2, 4\]",
        ),
        (
            {**CACHES, "v_cache": torch.ones(2, 4, 2, 4)},
            ValueError,
            r"v_cache must be \[B, C, H, E\] .*; got \[2, 4, 2, 4\]",
        ),
        pytest.param(
            {**CACHES, "position": torch.tensor([-5, 0])},
            ValueError,
            r"position must be at least 0 everywhere; got -5 at \[0\]",
            marks=values_are_read,
        ),
        ({**CACHES, "position": torch.zeros(2)}, TypeError, "position must be int64; got float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"chunk_attention: .*{message}"):
        chunk_attention(**{**ARGUMENTS, **change})


@values_are_read
@pytest.mark.parametrize(("bounds", "error", "message"), packing.BAD_BOUNDS)
def test_bad_bounds(bounds: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"chunk_attention: .*{message}"):
        chunk_attention(*qkv(torch.float32, 1, 6, 2, 4, 5), 4, cu_seqlens=bounds)


def test_states_of_packed_rows_belong_to_segments() -> None:
    args = qkv(torch.float32, 1, 6, 2, 4, 5)
    bounds = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"chunk_attention: k_cache must be \[segments, C, H, S\]"):
        chunk_attention(*args, 4, **CACHES | {"k_cache": torch.ones(1, 4, 2, 4)}, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"chunk_attention: q must be one packed row"):
        chunk_attention(**ARGUMENTS, cu_seqlens=torch.tensor([0, 3]))


def test_position_without_caches_is_refused() -> None:
    with pytest.raises(ValueError, match="all three or none; got position only"):
        chunk_attention(**ARGUMENTS, position=torch.tensor([0, 1]))
