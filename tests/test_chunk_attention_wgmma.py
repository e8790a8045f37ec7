"""chunk_attention of 16-bit numbers and more than 64 queries: on Hopper by its own instructions, on
other GPUs by those of sm_80. In the executor both run, elsewhere what the machine has; on Hopper
with room for one strip of weights and for many, which go in pairs.
"""

import math

import pytest
import torch
from backend import BACKEND
from checks import check_forward, check_gradients
from test_chunk_attention_sliding import OP, caches_of, qkv
from torch import Tensor

from megalodon_ops._library import Maker

BF16, F16 = torch.bfloat16, torch.float16
# Under the sanitizers one of them: the kernels differ in an instruction's name.
DTYPES = (BF16,) if BACKEND in ("simt_asan", "simt_race") else (BF16, F16)
# Architecture, bytes of scratch.
MACHINES = ("80 131072", "90 131072", "90 4194304") if BACKEND.startswith("simt") else ("",)


@pytest.fixture(params=MACHINES, autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        architecture, scratch = request.param.split()
        monkeypatch.setenv("MEGALODON_SIMT_ARCHITECTURE", architecture)
        monkeypatch.setenv("MEGALODON_SIMT_SCRATCH", scratch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("L", "C", "S", "E"),
    [
        (65, 65, 8, 8),  # one query beyond the small tiles
        (128, 128, 64, 128),  # whole tiles and slabs
        (129, 300, 72, 136),  # a row, a pack of depths and one of columns beyond them
        (150, 70, 8, 264),  # chunks that end inside a tile; two tiles of columns
        (270, 270, 16, 24),  # three tiles of keys, several rounds
        (130, 130, 136, 8),  # keys wider than values
        (390, 256, 8, 264),  # pairs of strips of two chunks, the second's of different lengths
        (640, 640, 8, 264),  # pairs that share more slabs than there is room for at a time
        (400, 100, 8, 136),  # chunks of a tile each, two slabs; more than there are multiprocessors
        (400, 100, 8, 264),
        (800, 300, 128, 8),  # strips of one to three tiles of keys, in turns
        (241, 241, 24, 136),  # a key beyond three of its tiles
        (66, 66, 0, 16),
    ],
)
def test_edges(L: int, C: int, S: int, E: int, dtype: torch.dtype) -> None:
    args = (*qkv(Maker(dtype), 1, L, 1, S, E), C)
    check_forward(OP, args)
    check_gradients(OP, args)


def test_strips_of_two_heads_are_no_partners() -> None:
    """Of one chunk each, with the same tokens."""
    args = (*qkv(Maker(BF16), 1, 66, 2, 8, 264), 66)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="many blocks that do the same")
def test_more_strips_than_blocks_take_at_a_time() -> None:
    args = (*qkv(Maker(BF16), 1, 66, 200, 8, 8), 66)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.skipif(BACKEND != "simt", reason="orders of the executor, many")
@pytest.mark.parametrize("machine", MACHINES[1:2], indirect=True)
@pytest.mark.parametrize(("L", "orders", "backward"), [(1280, 16, False), (640, 6, True)])
def test_any_order_of_warps(
    L: int, orders: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many slabs: one that is released before it has been read is wrong in few orders."""
    leaves = [t.requires_grad_(backward) for t in qkv(Maker(BF16), 1, L, 1, 8, 8)]

    def results() -> list[Tensor]:
        o = OP.overload(*leaves, L)[0]
        return [o, *(torch.autograd.grad(o.sum(), leaves) if backward else ())]

    monkeypatch.setenv("MEGALODON_SIMT_SCHEDULE", "forward")
    wanted = results()
    for seed in range(orders):
        monkeypatch.setenv("MEGALODON_SIMT_SCHEDULE", f"random:{seed}")
        for want, got in zip(wanted, results(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("mode", ["key", "weight"])
@pytest.mark.parametrize(
    ("starts", "E"), [(None, 264), (None, 136), ([0, 77, 500], 136), ([0, 77, 500], 72)]
)
def test_packed_rows_with_caches_and_dropout(
    starts: list[int] | None, E: int, mode: str, sliding: bool
) -> None:
    make, lengths, C = Maker(BF16), (140, 1, 90), 100
    caches = caches_of(make, starts, C, 2, 8, E)
    x = qkv(make, 1, sum(lengths), 2, 8, E)
    args = (*x, C, 0.3, 5, make.bounds(*lengths), *caches, sliding, mode)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [16, 136, 264])
@pytest.mark.parametrize("scale", [0.0, 4.0, 15.0, 1e3, 3e4])
def test_scores_of_any_size(scale: float, E: int, dtype: torch.dtype) -> None:
    """Parts of a row whose weights are relative to the same power of two, and to others: scores up
    to about 25, 90, 6000 and 200000, which rise from tile to tile.
    """
    q, k, v = qkv(Maker(dtype), 1, 270, 1, 8, E)
    k = k * torch.linspace(0.1, 1, 270, dtype=dtype)[None, :, None, None]
    check_forward(OP, (q * scale, k, v, 270))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_beyond_any_power_of_two(dtype: torch.dtype) -> None:
    make = Maker(dtype)
    q, k = (make.activation(1, 130, 1, 64) * 1e4 for _ in range(2))
    o, lse = OP.overload(q, k, make.activation(1, 130, 1, 16), 130)
    assert o.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_values_of_any_size(size: float) -> None:
    q, k, v = qkv(Maker(BF16), 1, 130, 1, 64, 16)
    for scale in (1.0, 20.0):
        want = OP.overload(q * scale, k, v, 130)[0].double()
        got = OP.overload(q * scale, k, v * size, 130)[0].double() / size
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


def test_small_weights_of_f16() -> None:
    """The others' weights are 3e-7 of the first one's, whose value is 0."""
    L, q, v = 512, torch.ones(1, 512, 1, 8, dtype=F16), torch.ones(1, 512, 1, 8, dtype=F16)
    k = torch.full((1, L, 1, 8), -17.7 / 8, dtype=F16)
    k[:, 0], v[:, 0] = -2.7 / 8, 0
    want = OP.overload(q.double(), k.double(), v.double(), L)[0]
    torch.testing.assert_close(OP.overload(q, k, v, L)[0].double(), want, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("E", "C"), [(8, 130), (136, 80), (264, 80)])
def test_nan_and_inf_do_not_leave_the_chunk(E: int, C: int, which: int, bad: float) -> None:
    """Chunks that share slabs, before and behind; of 130 the second strip's last slab, too."""
    clean = list(qkv(Maker(BF16), 1, 3 * C, 1, 8, E))
    dout = Maker(BF16).activation(1, 3 * C, 1, E)

    def results(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        o = OP.overload(*leaves, C)[0]
        return [o, *torch.autograd.grad(o, leaves, dout)]

    spoilt = [t.clone() for t in clean]
    spoilt[which][:, C : 2 * C] = bad
    for want, got in zip(results(*clean), results(*spoilt), strict=True):
        for part in (slice(0, C), slice(2 * C, 3 * C)):
            torch.testing.assert_close(got[:, part], want[:, part], rtol=0, atol=0)


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="slow; nothing but numbers")
def test_nan_stays_behind_a_chunk_whose_weights_are_rescaled() -> None:
    q, k, v = qkv(Maker(BF16), 1, 260, 1, 8, 264)
    v[:, 130:] = math.nan
    assert OP.overload(q * 300, k, v, 130)[0][:, :130].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("E", [8, 136])
def test_gradients_of_nan_and_inf_do_not_leave_the_chunk(E: int, bad: float) -> None:
    leaves = [t.requires_grad_() for t in qkv(Maker(BF16), 1, 160, 1, 8, E)]
    dout = Maker(BF16).activation(1, 160, 1, E)
    o = OP.overload(*leaves, 80)[0]
    clean = torch.autograd.grad(o, leaves, dout, retain_graph=True)
    dout[:, 80:] = bad
    for want, got in zip(clean, torch.autograd.grad(o, leaves, dout), strict=True):
        torch.testing.assert_close(got[:, :80], want[:, :80], rtol=0, atol=0)


@pytest.mark.parametrize("E", [8, 136])
def test_a_gradient_of_inf_reaches_no_later_key(E: int) -> None:
    q, k, v = qkv(Maker(BF16), 1, 66, 1, 8, E)
    k.requires_grad_()
    o = OP.overload(q, k, v, 66)[0]
    dout = torch.ones_like(o)
    dout[0, 6] = math.inf
    (dk,) = torch.autograd.grad(o, k, dout)
    assert dk[:, 7:].isfinite().all()
