"""cema: official numbers, random shapes, long and saturated recurrences, streams, bad arguments."""

import math
from typing import Any

import golden
import pytest
import torch
from backend import BACKEND
from checks import DTYPES, check_forward, check_gradients
from golden import Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packing import BAD_BOUNDS, BOUNDS_DTYPES, LENGTHS
from torch import Tensor

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["cema"]
F32, F64 = torch.float32, torch.float64
cema = OP.overload


def parameters(make: Maker, D: int, N: int) -> tuple[Tensor, ...]:
    return tuple(make.stat(*s) for s in ((D, N), (D, N), (D,), (D, N, 2), (D,)))


def arguments(dtype: torch.dtype, B: int, L: int, D: int, N: int, state: bool) -> tuple[Any, ...]:
    make = Maker(dtype)
    x, p = make.activation(B, L, D), parameters(make, D, N)
    return x, *p, make.stat(B, D, N, 2) if state else None


def run(args: Any, dy: Tensor, dh: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, h and the gradients of <y, dy> + <h, dh> in every tensor argument."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    y, h = cema(*leaves)
    pairs = [(y, dy.to(y))] + ([] if dh is None else [(h, dh.to(h))])
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs])
    return y.detach(), h.detach(), list(grads)


@golden.each("cema", F64, F32)
def test_official_numbers(isa: str, case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_cema(case, cema, dtype), dtype)


@given(
    B=st.sampled_from([0, 1, 3]),
    L=st.integers(0, 70),
    D=st.integers(1, 40),
    N=st.integers(1, 9),
    state=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@example(B=2, L=151, D=9, N=16, state=True, dtype=F32)
@example(B=1, L=129, D=17, N=2, state=False, dtype=F64)
@example(B=1, L=8, D=3, N=67, state=True, dtype=F64)
@example(B=0, L=3, D=5, N=2, state=True, dtype=F32)
@example(B=70, L=2, D=2, N=1, state=True, dtype=F32)
def test_any_shape(
    isa: str, B: int, L: int, D: int, N: int, state: bool, dtype: torch.dtype
) -> None:
    args = arguments(dtype, B, L, D, N, state)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("L", [17, 23, 31, 32, 63, 64, 65, 127, 128, 129, 130, 257, 372, 784])
def test_lengths_around_the_blocks(isa: str, L: int) -> None:
    args = arguments(F32, 2, L, 5, 3, True)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [512, 1003])
def test_one_wavelet(isa: str, L: int, dtype: torch.dtype) -> None:
    """Whose gradients are sums of like terms, where the rounding of a long sum would show."""
    for B, D in ((1, 8), (2, 24)):
        args = arguments(dtype, B, L, D, 1, False)
        check_forward(OP, args)
        check_gradients(OP, args)


@pytest.mark.parametrize(
    ("B", "L", "D", "N", "dtype"),
    [
        (1, 300, 130, 1, F32),  # on a GPU: more than one tile of channels, chunks of time
        (2, 290, 16, 5, F64),  # two lanes share a channel, rows of 16 bytes
        (1, 600, 40, 9, torch.bfloat16),  # four
        (1, 259, 24, 17, torch.float16),  # eight
        (1, 131, 12, 33, F32),  # sixteen
        (2, 270, 9, 70, F32),  # more than one group of wavelets
        (1, 40, 8, 130, torch.bfloat16),
        (2, 5, 3, 40, F32),  # few steps, more wavelets than lanes in a warp
        (1060, 17, 2, 1, F32),  # several rows of the batch in a block
    ],
)
def test_where_the_plan_changes(B: int, L: int, D: int, N: int, dtype: torch.dtype) -> None:
    args = arguments(dtype, B, L, D, N, True)
    check_forward(OP, args)
    check_gradients(OP, args)


def near_one(D: int, N: int, distance: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Parameters with |q| = 1 - distance throughout."""
    _, _, theta, gamma, omega = parameters(Maker(dtype), D, N)
    alpha = torch.zeros(D, N, dtype=dtype)
    delta = torch.full_like(alpha, math.log(2 * distance / (1 - 2 * distance)))
    return alpha, delta, theta, gamma, omega


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
@pytest.mark.parametrize(
    ("B", "L", "D", "distance"),
    [(1, 32768, 3, 1e-3), (1, 32768, 3, 1e-5), (1, 32768, 3, 1e-7), (99, 4096, 1, 1e-5)],
)
def test_error_does_not_grow_with_length(isa: str, B: int, L: int, D: int, distance: float) -> None:
    """On a GPU one sequence is cut into short pieces, so many are none."""
    make = Maker(F32)
    args = (make.activation(B, L, D), *near_one(D, 4, distance, F32), make.stat(B, D, 4, 2))
    cotangents = make.activation(B, L, D), make.stat(B, D, 4, 2)
    y, h, grads = run(args, *cotangents)
    y64, h64, grads64 = run([a.double() for a in args], *cotangents)
    for got, want in zip((y, h, *grads), (y64, h64, *grads64), strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= 2e-5, error


@pytest.mark.skipif(BACKEND in ("simt_asan", "simt_race"), reason="takes minutes there")
def test_a_million_steps_in_pieces() -> None:
    make = Maker(F32)
    x, p = make.activation(1, 1_000_000, 2), near_one(2, 2, 1e-6, F32)
    want, want_h = cema(x.double(), *(t.double() for t in p))
    pieces, h = [], None
    for part in x.split(77_777, dim=1):
        y, h = cema(part, *p, h)
        pieces.append(y)
    for got, exact in ((torch.cat(pieces, 1), want), (h, want_h)):
        assert (got.double() - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_one_token_at_a_time_over_a_long_row() -> None:
    make = Maker(F32)
    x, p = make.activation(1, 4000, 2), near_one(2, 3, 1e-5, F32)
    want, _ = cema(x.double(), *(t.double() for t in p))
    pieces, h = [], None
    for part in x.split(1, dim=1):
        y, h = cema(part, *p, h)
        pieces.append(y)
    assert (torch.cat(pieces, 1).double() - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("cut", [0, 1, 64, 100, 128, 199, 200])
def test_streams_forward_and_backward(isa: str, cut: int) -> None:
    args = arguments(F64, 2, 200, 5, 3, True)
    make = Maker(F64, seed=1)
    dy, dh = make.activation(2, 200, 5), make.stat(2, 5, 3, 2)
    y, h, grads = run(args, dy, dh)
    x, *p, h0 = (a.clone().requires_grad_() for a in args)
    y0, h_cut = cema(x[:, :cut], *p, h0)
    y1, h1 = cema(x[:, cut:], *p, h_cut)
    torch.testing.assert_close(torch.cat((y0, y1), 1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(h1, h, rtol=1e-11, atol=1e-11)
    streamed = torch.autograd.grad(
        (torch.cat((y0, y1), 1) * dy).sum() + (h1 * dh).sum(), (x, *p, h0)
    )
    for got, want in zip(streamed, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_rows_do_not_see_each_other(isa: str) -> None:
    x, *p, h0 = arguments(F32, 5, 150, 19, 4, True)
    y, h = cema(x, *p, h0)
    for b in range(5):
        alone = cema(x[b : b + 1], *p, h0[b : b + 1])
        assert torch.equal(alone[0][0], y[b])
        assert torch.equal(alone[1][0], h[b])


def saturated(alpha: float, delta: float, dtype: torch.dtype) -> tuple[Any, ...]:
    x, a, d, *rest = arguments(dtype, 2, 70, 3, 2, True)
    return x, torch.full_like(a, alpha), torch.full_like(d, delta), *rest


CORNERS = [(a, d) for a in (-40.0, 40.0) for d in (-40.0, 40.0)]


@pytest.mark.parametrize(("alpha", "delta"), CORNERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_sigmoids(isa: str, alpha: float, delta: float, dtype: torch.dtype) -> None:
    args = saturated(alpha, delta, dtype)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize("value", [-1000.0, -100.0, 100.0, 1000.0])
def test_beyond_saturation_all_is_finite(isa: str, value: float) -> None:
    for dtype in (F32, F64):
        for delta in (-value, value):
            args = saturated(value, delta, dtype)
            y, h, grads = run(args, torch.ones(2, 70, 3), torch.ones(2, 3, 2, 2))
            assert all(t.isfinite().all() for t in (y, h, *grads))


def exact_slopes(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """d alpha and d delta of sum(y) without the cancellation in sigmoid's own derivative.

    The leaves are u = exp(-|alpha|) and v = exp(-|delta|), which are differentiated exactly.
    """
    x, alpha, delta, theta, gamma, omega, h0 = args
    u, v = ((-t.abs()).exp().requires_grad_() for t in (alpha, delta))
    small, large = u / (1 + u), 1 / (1 + u)
    a, b = (large, small) if alpha[0, 0] > 0 else (small, large)
    d_small, d_large = v / (1 + v), 1 / (1 + v)
    e = d_small if delta[0, 0] > 0 else d_large
    N = alpha.shape[1]
    phi = torch.arange(1, N + 1, dtype=F64) * (2 * math.pi / N) * theta.sigmoid()[:, None]
    q = torch.polar(b + a * e, phi)
    g = torch.view_as_complex(gamma) / math.sqrt(N)
    h = torch.view_as_complex(h0)
    total = (omega * x).sum()
    for t in range(x.shape[1]):
        h = a * x[:, t, :, None] + q * h
        total = total + (g * h).real.sum()
    du, dv = torch.autograd.grad(total, (u, v))
    return -alpha.sign() * u.detach() * du, -delta.sign() * v.detach() * dv


@pytest.mark.parametrize(("alpha", "delta"), CORNERS)
def test_vanishing_gradients_keep_their_digits(isa: str, alpha: float, delta: float) -> None:
    args = saturated(alpha, delta, F64)
    _, _, grads = run(args, torch.ones(2, 70, 3))
    for got, want in zip(grads[1:3], exact_slopes(args), strict=True):
        assert want.abs().min() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.skipif(bool(BACKEND), reason="a GPU's subnormal numbers are as fast as others")
@pytest.mark.parametrize("algorithm", ["scan", "fft"])
@pytest.mark.parametrize("L", [16, 600])
def test_what_decays_ends_at_zero(isa: str, L: int, algorithm: str) -> None:
    """Not among the subnormal numbers, where every step would be slow; the caller's are left."""
    x, *p = arguments(F32, 1, L, 17, 2, state=False)[:6]
    x[:, 1:] = 0
    x *= 1e-34
    y, h = cema(x, *p, None, None, algorithm)
    tiny = torch.finfo(F32).tiny
    for result in (y, h):
        assert not ((result != 0) & (result.abs() < tiny)).any()
    assert (torch.full((1,), tiny) * 0.5 != 0).all()


def test_nan_and_inf_stay_in_their_channel_and_future(isa: str) -> None:
    x, *rest = arguments(F32, 2, 140, 20, 3, False)
    x[0, 70, 3] = math.nan
    x[1, 70, 18] = math.inf
    y, h = cema(x, *rest)
    bad = torch.zeros(2, 140, 20, dtype=torch.bool)
    bad[0, 70:, 3] = bad[1, 70:, 18] = True
    assert torch.equal(~y.isfinite(), bad)
    assert torch.equal((~h.isfinite()).flatten(2).any(-1), bad[:, -1])


def test_state_alone_and_output_alone_have_gradients() -> None:
    args = [a.requires_grad_() for a in arguments(F64, 2, 5, 3, 2, True)]
    assert torch.autograd.gradcheck(lambda *a: cema(*a)[1], args[:5] + args[5:])
    assert torch.autograd.gradcheck(lambda *a: cema(*a)[0], args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 8)}, ValueError, r"cema: x must be \[B, L, D\]; got \[3, 8\]"),
        (
            {"alpha": torch.ones(7, 4)},
            ValueError,
            r"cema: alpha must be \[D, N\] with D = 8 \(x\.shape\[2\]\); got \[7, 4\]",
        ),
        (
            {"alpha": torch.ones(8, 0)},
            ValueError,
            r"cema: alpha\.shape\[1\] must be at least 1; got 0",
        ),
        (
            {"delta": torch.ones(8, 3)},
            ValueError,
            r"cema: delta must be \[D, N\] with D = 8 \(x\.shape\[2\]\), N = 4 "
            r"\(alpha\.shape\[1\]\); got \[8, 3\]",
        ),
        ({"gamma": torch.ones(8, 4, 1)}, ValueError, r"cema: gamma must be \[D, N, 2\] with"),
        ({"theta": torch.ones(8, 1)}, ValueError, r"cema: theta must be \[D\] with"),
        ({"omega": torch.ones(8).double()}, TypeError, "omega must be float32; got float64"),
        ({"h0": torch.ones(1, 8, 4, 2)}, ValueError, r"cema: h0 must be \[B, D, N, 2\] with B = 2"),
        ({"algorithm": "slow"}, ValueError, "algorithm must be auto, scan or fft; got slow"),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            r"cema: x must be one packed row, \[1, T, ...\], where cu_seqlens .*\[2, 3, 8\]",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("x", "alpha", "delta", "theta", "gamma", "omega", "h0")
    values = dict(zip(names, arguments(F32, 2, 3, 8, 4, True), strict=True))
    with pytest.raises(error, match=message):
        cema(**{**values, **change})


# ---- packed rows -------------------------------------------------------------------------------


def packed(
    dtype: torch.dtype,
    lengths: list[int],
    D: int,
    N: int,
    state: bool,
    bounds: torch.dtype = torch.int64,
    algorithm: str = "auto",
) -> tuple[Any, ...]:
    make = Maker(dtype)
    x, p = make.activation(1, sum(lengths), D), parameters(make, D, N)
    h0 = make.stat(len(lengths), D, N, 2) if state else None
    return x, *p, h0, make.bounds(*lengths, dtype=bounds), algorithm


@given(
    lengths=LENGTHS,
    D=st.integers(1, 40),
    N=st.integers(1, 9),
    state=st.booleans(),
    bounds=BOUNDS_DTYPES,
    dtype=st.sampled_from(DTYPES),
    algorithm=st.sampled_from(["auto", "scan", "fft"]),
)
@example([0], 3, 2, True, torch.int64, F32, "auto")
@example([0, 3, 1, 0], 5, 2, True, torch.int32, F32, "auto")
def test_any_segments(
    isa: str,
    lengths: list[int],
    D: int,
    N: int,
    state: bool,
    bounds: torch.dtype,
    dtype: torch.dtype,
    algorithm: str,
) -> None:
    args = packed(dtype, lengths, D, N, state, bounds, algorithm)
    check_forward(OP, args)
    check_gradients(OP, args)


LONG_SEGMENTS = [
    ([600], 40, 9, F32),
    ([300, 0, 257, 1, 128], 24, 17, F32),  # on a GPU: pieces of segments, the states between them
    ([129, 512, 3], 9, 33, F64),
    ([700, 1, 900, 0, 513], 17, 16, torch.bfloat16),  # by matrix instructions
    ([256, 1024, 512], 8, 3, torch.float16),
    ([2100, 5, 2049], 9, 2, torch.bfloat16),  # in pieces
]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("lengths", "D", "N", "dtype"), LONG_SEGMENTS)
def test_long_segments(
    isa: str, lengths: list[int], D: int, N: int, dtype: torch.dtype, state: bool
) -> None:
    args = packed(dtype, lengths, D, N, state)
    check_forward(OP, args)
    check_gradients(OP, args)


SHORT = st.integers(0, 20) | st.sampled_from([63, 64, 65, 95, 96, 97, 103, 104, 105, 112, 113])


@settings(max_examples=6)
@given(
    lengths=st.lists(SHORT, min_size=16, max_size=24),
    long=st.lists(st.sampled_from([127, 128, 129, 161, 191, 192, 193]), max_size=2),
    data=st.data(),
    D=st.integers(1, 20),
    N=st.sampled_from([1, 3, 9, 16, 17]),
    dtype=st.sampled_from(DTYPES),
)
def test_many_short_segments(
    isa: str,
    lengths: list[int],
    long: list[int],
    data: st.DataObject,
    D: int,
    N: int,
    dtype: torch.dtype,
) -> None:
    """From zeros they are convolved; long ones between them are not."""
    args = packed(dtype, data.draw(st.permutations(lengths + long)), D, N, False)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.skipif(bool(BACKEND), reason="of the CPU alone")
def test_short_segments_do_not_see_each_other(isa: str) -> None:
    """Bit by bit, whatever they are packed with; nor do NaN leave their segment and channel."""
    lengths = [5, 64, 1, 17, 33, 0, 96, 8] * 3
    x, *p, h0, bounds, algorithm = packed(F32, lengths, 19, 16, False)
    y, h = cema(x, *p, h0, bounds, algorithm)
    order = list(range(len(lengths)))[::-1]
    pieces = x.split(lengths, 1)
    other = torch.cat([pieces[i] for i in order], 1)
    turned, last = cema(other, *p, None, Maker(F32).bounds(*lengths[::-1]), algorithm)
    assert torch.equal(torch.cat(turned.split(lengths[::-1], 1)[::-1], 1), y)
    assert torch.equal(last.flip(0), h)
    x[0, 10, 3] = math.nan  # of the second segment
    bad, bad_h = cema(x, *p, h0, bounds, algorithm)
    wrong, wrong_h = bad != y, (bad_h != h).flatten(2).any(-1)
    assert wrong[0, 10:69, 3].all()
    assert wrong.sum() == 59
    assert wrong_h.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("lengths", [[150] * 5, [40] * 5])
def test_segments_are_rows(isa: str, lengths: list[int]) -> None:
    """Of the same length, bit by bit."""
    x, *p, h0, cu_seqlens, algorithm = packed(F32, lengths, 19, 4, True)
    y, h = cema(x, *p, h0, cu_seqlens, algorithm)
    rows, last = cema(x.reshape(5, -1, 19), *p, h0, None, "scan")
    assert torch.equal(y.reshape(rows.shape), rows)
    assert torch.equal(h, last)


def test_ten_thousand_segments(isa: str) -> None:
    """Most of them of one token; the longest comes last."""
    count = 100 if BACKEND else 10_000
    lengths = [i % 3 for i in range(count - 1)] + [200]
    args = packed(F32, lengths, 3, 2, True)
    check_forward(OP, args)
    check_gradients(OP, args)


@pytest.mark.parametrize(("bounds", "error", "message"), BAD_BOUNDS)
def test_bad_bounds(bounds: Tensor, error: type[Exception], message: str) -> None:
    x, *p = arguments(F32, 1, 6, 8, 4, False)[:6]
    with pytest.raises(error, match=f"cema: .*{message}"):
        cema(x, *p, None, bounds)
