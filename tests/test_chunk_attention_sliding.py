"""chunk_attention by a sliding window: random shapes, tiles, chunk sizes, threads.

What differs from chunks is which keys a query sees, so DropKey, packed rows and caches are met
here, and all else in test_chunk_attention.py.
"""

import math

import packing
import pytest
import torch
from backend import BACKEND
from checks import DTYPES, as_tuple, check_forward, check_gradients, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalodon_ops import chunk_attention, registry
from megalodon_ops._library import Maker

OP = registry["chunk_attention"]
F64 = torch.float64
Caches = tuple[Tensor | None, ...]
# Tiles are smaller on a GPU, and its kernels slow in the executor.
SEVERAL_TILES = [(200, 70), (70, 200), (130, 8), (257, 129)]
if not BACKEND:
    SEVERAL_TILES = [(700, 300), (300, 700), (1300, 256), (520, 8), (300, 257)]


def qkv(make: Maker, B: int, L: int, H: int, S: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    q = make.activation(B, L, H, S) * max(S, 1) ** -0.5
    return q, make.activation(B, L, H, S), make.activation(B, L, H, E)


def caches_of(make: Maker, starts: list[int] | None, C: int, H: int, S: int, E: int) -> Caches:
    if starts is None:
        return None, None, None
    B = len(starts)
    return make.activation(B, C, H, S), make.activation(B, C, H, E), make.ints(*starts)


@given(
    lengths=packing.LENGTHS,
    rows=st.integers(0, 2),
    packed=st.booleans(),
    H=st.integers(1, 3),
    S=st.integers(0, 40),
    E=st.integers(0, 70),
    C=st.sampled_from([1, 2, 3, 16, 63, 64, 65, 100]),
    starts=st.none() | st.lists(st.integers(0, 10**6) | st.integers(0, 99), min_size=7, max_size=7),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    mode=st.sampled_from(["key", "weight"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    isa: str,
    lengths: list[int],
    rows: int,
    packed: bool,
    H: int,
    S: int,
    E: int,
    C: int,
    starts: list[int] | None,
    dropout_p: float,
    mode: str,
    dtype: torch.dtype,
) -> None:
    make, total = Maker(dtype), sum(lengths)
    bounds = make.bounds(*lengths) if packed else None
    B, states = (1, len(lengths)) if packed else (rows, rows)
    caches = caches_of(make, None if starts is None else starts[:states], C, H, S, E)
    args = (*qkv(make, B, total, H, S, E), C, dropout_p, 5, bounds, *caches, True, mode)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("start", [None, 0, 150, 5000])
@pytest.mark.parametrize(("L", "C"), SEVERAL_TILES)
def test_several_tiles(L: int, C: int, start: int | None, dtype: torch.dtype) -> None:
    """Windows over several tiles and key blocks, and several windows in a tile."""
    make = Maker(dtype)
    caches = caches_of(make, None if start is None else [start], C, 1, 16, 24)
    args = (*qkv(make, 1, L, 1, 16, 24), C, 0.0, 0, None, *caches, True)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["key", "weight"])
@pytest.mark.parametrize("cached", [False, True])
def test_packed_tiles(cached: bool, mode: str, dtype: torch.dtype) -> None:
    """Segments of several tiles, whose windows begin in the cache, in the middle of a tile."""
    make, lengths = Maker(dtype), (150, 0, 1, 200)
    caches = caches_of(make, [0, 3, 90, 500] if cached else None, 90, 2, 8, 16)
    x = qkv(make, 1, sum(lengths), 2, 8, 16)
    args = (*x, 90, 0.3, 5, make.bounds(*lengths), *caches, True, mode)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_a_window_beyond_all_tokens_is_causal_attention() -> None:
    q, k, v = qkv(Maker(F64), 2, 50, 2, 8, 6)
    got = chunk_attention(q, k, v, 10**6, sliding=True)
    torch.testing.assert_close(got, chunk_attention(q, k, v, 50))


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("L", [1, 20])
@pytest.mark.parametrize("C", [2**40 + 1, 2**62, 2**63 - 1])
def test_the_largest_chunk_sizes(C: int, L: int, sliding: bool) -> None:
    args = (*qkv(Maker(F64), 2, L, 2, 3, 4), C, 0.0, 0, None, None, None, None, sliding)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_caches_have_no_more_slots_than_memory() -> None:
    empty = torch.empty(1, 2**41, 1, 0)
    args = (*qkv(Maker(torch.float32), 1, 2, 1, 0, 0), 2**41, 0.0, 0, None, empty, empty)
    with pytest.raises(ValueError, match=r"chunk_size must be at most 2\^40 with caches; got 2199"):
        OP.overload(*args, torch.tensor([0]))


def test_a_gradient_of_inf_reaches_the_keys_of_its_window_alone() -> None:
    q, k, v = qkv(Maker(torch.float32), 1, 20, 1, 4, 4)
    k.requires_grad_()
    o = OP.overload(q, k, v, 4, 0.3, 1, sliding=True, dropout_mode="weight")[0]
    do = torch.ones_like(o)
    do[0, 6] = math.inf
    (dk,) = torch.autograd.grad(o, k, do)
    assert torch.cat([dk[:, :3], dk[:, 7:]], 1).isfinite().all()


@pytest.mark.skipif(bool(BACKEND), reason="the threads are the CPU kernels'")
def test_threads_change_no_bit() -> None:
    make = Maker(torch.float32)
    args = (*qkv(make, 1, 900, 2, 16, 24), 128, 0.2, 3, None, None, None, None, True)
    cotangents: list[Tensor | None] = [torch.ones(1, 900, 2, 24), None]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                outputs = as_tuple(OP.overload(*args))
            results.append([*outputs, *gradients(OP.overload, args, cotangents)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
