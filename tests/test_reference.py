"""The references against the official code's numbers, and against the laws that need no data."""

import math
from itertools import pairwise

import golden
import pytest
import torch
from golden import Case
from torch import Tensor

from megalodon_ops import reference
from megalodon_ops.reference.cema import cema_coefficients
from megalodon_ops.reference.chunk_attention import dropkey_mask, philox4x32_10

F32, F64 = torch.float32, torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cema_parameters(D: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (D, N), (D, N), (D,), (D, N, 2), (D,)
    alpha, delta, theta, gamma, omega = (randn(*s, seed=i) for i, s in enumerate(shapes))
    return alpha, delta, theta, gamma, omega


@golden.each("cema", F64, F32)
def test_cema(case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_cema(case, reference.cema, dtype), dtype)


@golden.each("cema", F64, F32, having="out/kernel")
def test_cema_kernel(case: Case, dtype: torch.dtype) -> None:
    golden.assert_golden(case, golden.run_cema_kernel(case, reference.cema_kernel, dtype), dtype)


@golden.each("cema", F64, F32, having="out/kernel", lacking="in/hx")
def test_cema_convolution(case: Case, dtype: torch.dtype) -> None:
    ops = reference.cema_kernel, reference.fft_conv
    golden.assert_golden(case, golden.run_cema_convolution(case, *ops, dtype), dtype)


@golden.each("cema", F64, having="out/q")
def test_cema_coefficients(case: Case, dtype: torch.dtype) -> None:
    p = golden.leaves(case, dtype)
    alpha, delta = p["alpha"].squeeze(-1), p["delta"].squeeze(-1)
    _, rho, phi, _ = cema_coefficients(alpha, delta, p["theta"].flatten(), p["gamma"])
    q = torch.view_as_real(torch.polar(rho, phi)).detach()
    golden.assert_golden64(case, {"out/q": q})


@golden.each("timestep_norm", F64, F32)
def test_timestep_norm(case: Case, dtype: torch.dtype) -> None:
    got = golden.run_timestep_norm(case, reference.timestep_norm, dtype)
    golden.assert_golden(case, got, dtype)


@golden.each("timestep_norm_stream", F64, F32)
def test_timestep_norm_stream(case: Case, dtype: torch.dtype) -> None:
    got = golden.run_timestep_norm(case, reference.timestep_norm, dtype)
    golden.assert_golden(case, got, dtype)


@golden.each("attention", F64, F32)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    ops = reference.qk_norm_rope, reference.chunk_attention
    golden.assert_golden(case, golden.run_attention(case, *ops, dtype), dtype)


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_cema_streams(cut: int) -> None:
    x, p = randn(2, 9, 3), cema_parameters(3, 2)
    y, h = reference.cema(x, *p)
    y0, h0 = reference.cema(x[:, :cut], *p)
    y1, h1 = reference.cema(x[:, cut:], *p, h0)
    torch.testing.assert_close(torch.cat((y0, y1), 1), y)
    torch.testing.assert_close(h1, h)


@pytest.mark.parametrize("delta", [-40.0, 40.0])
@pytest.mark.parametrize("alpha", [-40.0, 40.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_cema_saturated(alpha: float, delta: float, dtype: torch.dtype) -> None:
    _, _, theta, gamma, omega = cema_parameters(3, 2)
    raw = (torch.full((3, 2), alpha), torch.full((3, 2), delta), theta, gamma)
    p = [t.to(dtype).requires_grad_() for t in (*raw, omega)]
    x, h0 = randn(2, 6, 3, dtype=dtype), randn(2, 3, 2, 2, dtype=dtype)
    results = *reference.cema(x, *p, h0), reference.cema_kernel(*p[:4], 6)
    grads = torch.autograd.grad(sum(r.sum() for r in results), p)
    assert all(t.isfinite().all() for t in (*results, *grads))


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_timestep_norm_streams(cut: int) -> None:
    x, weight, bias = randn(2, 9, 6), randn(6, seed=1), randn(6, seed=2)
    mask = randn(2, 9, seed=3) > 0.5
    y, *state, _, _ = reference.timestep_norm(x, weight, bias, 3, padding_mask=mask)
    y0, *state0, _, _ = reference.timestep_norm(
        x[:, :cut], weight, bias, 3, padding_mask=mask[:, :cut]
    )
    y1, *state1, _, _ = reference.timestep_norm(
        x[:, cut:], weight, bias, 3, 1e-5, *state0, mask[:, cut:]
    )
    torch.testing.assert_close(torch.cat((y0, y1), 1), y)
    for whole, streamed in zip(state, state1, strict=True):
        torch.testing.assert_close(streamed, whole)


def test_timestep_norm_pools_all_steps() -> None:
    x, zero = randn(2, 7, 6), torch.zeros(6, dtype=F64)
    y, count, mean, var, step_mean, step_rstd = reference.timestep_norm(x, zero, zero, 2)
    pool = x.view(2, 7, 2, 3).transpose(1, 2).flatten(2)
    assert count.tolist() == [7, 7]
    torch.testing.assert_close(mean, pool.mean(-1))
    torch.testing.assert_close(var, pool.var(-1, correction=0))
    torch.testing.assert_close(step_mean[:, -1], mean)
    torch.testing.assert_close(step_rstd[:, -1], (var + 1e-5).rsqrt())
    last = (x[:, -1].view(2, 2, 3) - mean[..., None]) / (var[..., None] + 1e-5).sqrt()
    torch.testing.assert_close(y[:, -1], last.flatten(1))


def test_norms_agree_with_torch() -> None:
    x, weight, bias = randn(2, 3, 5), randn(5, seed=1), randn(5, seed=2)
    y, rstd = reference.rms_norm(x, weight)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), weight + 1, 1e-5))
    assert rstd.shape == (2, 3)
    y, mean, rstd = reference.layer_norm(x, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (5,), weight + 1, bias, 1e-5))
    assert mean.shape == rstd.shape == (2, 3)


def test_silu_mul() -> None:
    a, b = randn(2, 5), randn(2, 5, seed=1)
    torch.testing.assert_close(reference.silu_mul(a, b), torch.nn.functional.silu(a) * b)
    torch.testing.assert_close(reference.silu_mul(a), torch.nn.functional.silu(a))


def test_rope_sees_only_distance_and_restarts_per_chunk() -> None:
    z = randn(1, 1, 8).expand(2, 7, 8)
    zero = torch.zeros(2, 8, dtype=F64)
    position = torch.tensor([0, 3])
    q, k, _ = reference.qk_norm_rope(z, zero, zero, 1, 4, position=position)
    torch.testing.assert_close(q[1, 1], q[0, 0])
    torch.testing.assert_close(q[0, 4:], q[0, :3])
    scores = torch.einsum("iS,jS->ij", q[0, :4, 0], k[0, :4, 0])
    torch.testing.assert_close(scores[1, 0], scores[3, 2])


# Random123's known answers (kat_vectors, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(counter: list[int], key: list[int], answer: list[int]) -> None:
    words = philox4x32_10(tuple(map(torch.tensor, counter)), tuple(key))
    assert [word.item() for word in words] == answer


def test_dropkey_mask_word_by_word() -> None:
    seed, p = -12345678901234567, 0.3
    i, j = torch.tensor([[4, 5], [9, 10]]), torch.tensor([[2, 3, 4], [6, 7, 9]])
    mask = dropkey_mask(seed, p, 2, i, j)
    key = seed % 2**32, seed // 2**32 % 2**32
    for b, h, r, c in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        row, column = i[b, r].item(), j[b, c].item()
        counter = tuple(map(torch.tensor, (column // 4, row, h, b)))
        word = philox4x32_10(counter, key)[column % 4].item()
        assert mask[b, h, r, c].item() == (word < math.floor(p * 2**32))


def test_dropkey_rate() -> None:
    i = torch.arange(128)[None]
    rate = dropkey_mask(7, 0.25, 2, i, i).double().mean().item()
    assert abs(rate - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (2 * 128 * 128))


def attention_inputs(B: int, L: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(B, L, H, 4), randn(B, L, H, 4, seed=1), randn(B, L, H, 3, seed=2)


def empty_caches(B: int, C: int, H: int) -> tuple[Tensor, Tensor]:
    """Caches whose unwritten slots must never be read."""
    return tuple(torch.full((B, C, H, n), math.nan, dtype=F64) for n in (4, 3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("cut", [0, 1, 5, 8, 10, 11])
def test_chunk_attention_streams(cut: int, dropout_p: float) -> None:
    C = 4
    qkv = [t.requires_grad_() for t in attention_inputs(2, 11, 2)]
    o, lse = reference.chunk_attention(*qkv, C, dropout_p, 3)
    _, k, v = qkv
    k_cache, v_cache = empty_caches(2, C, 2)
    m = cut % C
    k_cache[:, :m], v_cache[:, :m] = k[:, cut - m : cut], v[:, cut - m : cut]
    position = torch.tensor([cut, cut])
    o0, lse0 = reference.chunk_attention(*(t[:, :cut] for t in qkv), C, dropout_p, 3)
    o1, lse1 = reference.chunk_attention(
        *(t[:, cut:] for t in qkv), C, dropout_p, 3, None, k_cache, v_cache, position
    )
    streamed = torch.cat((o0, o1), 1)
    torch.testing.assert_close(streamed, o)
    torch.testing.assert_close(torch.cat((lse0, lse1), 2), lse)
    cot = randn(*o.shape, seed=4)
    for got, want in zip(
        torch.autograd.grad((cot * streamed).sum(), qkv),
        torch.autograd.grad((cot * o).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_chunk_attention_step_is_chunk_attention() -> None:
    C, start = 4, torch.tensor([0, 2])
    q, k, v = attention_inputs(2, 9, 2)
    k_cache, v_cache = empty_caches(2, C, 2)
    k_cache[1, :2], v_cache[1, :2] = randn(2, 2, 4, seed=5), randn(2, 2, 3, seed=6)
    o, _ = reference.chunk_attention(q, k, v, C, k_cache=k_cache, v_cache=v_cache, position=start)
    for t in range(9):
        step = reference.chunk_attention_step(
            q[:, t], k[:, t], v[:, t], k_cache, v_cache, start + t, C
        )
        torch.testing.assert_close(step, o[:, t])


def test_chunk_attention_with_every_key_dropped() -> None:
    qkv = [t.requires_grad_() for t in attention_inputs(1, 6, 1)]
    o, lse = reference.chunk_attention(*qkv, 3, 0.999999)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), qkv))


@pytest.mark.parametrize(("B", "L"), [(0, 3), (2, 0)])
def test_empty(B: int, L: int) -> None:
    x, p, zero = randn(B, L, 4), cema_parameters(4, 2), torch.zeros(4, dtype=F64)
    y, h = reference.cema(x, *p)
    assert (y.shape, h.shape) == (x.shape, (B, 4, 2, 2))
    assert reference.fft_conv(x, reference.cema_kernel(*p[:4], L)).shape == x.shape
    y, *_, step_mean, _ = reference.timestep_norm(x, zero, zero, 2)
    assert (y.shape, step_mean.shape) == (x.shape, (B, L, 2))
    q, k, _ = reference.qk_norm_rope(x, zero.expand(2, 4), zero.expand(2, 4), 1, 3)
    o, lse = reference.chunk_attention(q, k, k, 3)
    assert (o.shape, lse.shape) == (k.shape, (B, 1, L))
    assert reference.rms_norm(x)[1].shape == reference.layer_norm(x)[1].shape == (B, L)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, p = randn(2, 5, 4, dtype=dtype), [t.float() for t in cema_parameters(4, 2)]
    zero = torch.zeros(4)
    for op, *args in (
        (reference.cema, *p),
        (reference.timestep_norm, zero, zero, 2),
        (reference.rms_norm,),
        (reference.layer_norm,),
        (reference.qk_norm_rope, zero.expand(2, 4), zero.expand(2, 4), 1, 3),
    ):
        half, full = op(x, *args), op(x.float(), *args)
        assert half[0].dtype == dtype
        assert torch.equal(half[0], full[0].to(dtype))
        assert half[-1].dtype == F32
        assert torch.equal(half[-1], full[-1])


def test_packed_rows_are_segments_alone() -> None:
    """With states, positions and DropKey, which knows a segment by its number."""
    x, p, g, bounds = randn(1, 7, 4), cema_parameters(4, 2), randn(2, 4), torch.tensor([0, 3, 3, 7])
    heads = x.unflatten(2, (2, 2))
    h0, caches, start = randn(3, 4, 2, 2), randn(2, 3, 3, 2, 2), torch.tensor([2, 0, 4])
    norm = start, randn(3, 2), randn(3, 2).square()
    mask = torch.tensor([[False, True, False, False, False, True, False]])
    y, h = reference.cema(x, *p, h0, bounds)
    normed = reference.timestep_norm(x, g[0], g[1], 2, 1e-5, *norm, mask, bounds)
    q = reference.qk_norm_rope(x, g, g, 2, 3, 10000.0, start, 1e-5, bounds)
    drop = 3, 0.5, 7
    o, lse = reference.chunk_attention(heads, heads, heads, *drop, bounds, *caches, start)
    for i, (a, b) in enumerate(pairwise(bounds.tolist())):
        one, t = slice(i, i + 1), slice(a, b)
        alone = reference.cema(x[:, t], *p, h0[one])
        assert torch.equal(y[:, t], alone[0])
        assert torch.equal(h[one], alone[1])
        state = (part[one] for part in norm)
        single = reference.timestep_norm(x[:, t], g[0], g[1], 2, 1e-5, *state, mask[:, t])
        for got, want, where in zip(normed, single, (t, one, one, one, t, t), strict=True):
            assert torch.equal(got[:, where] if where is t else got[where], want)
        turned = reference.qk_norm_rope(x[:, t], g, g, 2, 3, position=start[one])
        for got, want in zip(q, turned, strict=True):
            assert torch.equal(got[:, t], want)
        rows = heads[:, t].expand(i + 1, -1, -1, -1)
        kept = (c[one].expand(i + 1, -1, -1, -1) for c in caches)
        batch = reference.chunk_attention(
            rows, rows, rows, *drop, None, *kept, start[one].expand(i + 1)
        )
        torch.testing.assert_close(o[0, t], batch[0][i], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[0, :, t], batch[1][i], rtol=0, atol=1e-12)


def test_a_sliding_window_is_masked_attention() -> None:
    """Of the last C tokens; in any split into calls, the caches being rings."""
    C, L, q, k, v = (
        4,
        13,
        randn(2, 13, 2, 4),
        randn(2, 13, 2, 4, seed=1),
        randn(2, 13, 2, 3, seed=2),
    )
    i, j = torch.arange(L)[:, None], torch.arange(L)
    hidden = (j > i) | (j <= i - C)
    scores = torch.einsum("bihs,bjhs->bhij", q, k).masked_fill(hidden, -math.inf)
    want = torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), v)
    o, lse = reference.chunk_attention(q, k, v, C, sliding=True)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    for at in range(L):
        k_cache, v_cache = randn(2, C, 2, 4), randn(2, C, 2, 3)
        for t in range(at):
            k_cache[:, t % C], v_cache[:, t % C] = k[:, t], v[:, t]
        rest = (u[:, at:] for u in (q, k, v))
        position = torch.full((2,), at)
        o, _ = reference.chunk_attention(
            *rest, C, 0.0, 0, None, k_cache, v_cache, position, sliding=True
        )
        torch.testing.assert_close(o, want[:, at:])


def test_dropped_weights_are_made_up_for() -> None:
    """After the softmax: lse is that of all keys, and the weights' mean over seeds is the same."""
    q, k, v = randn(1, 6, 1, 4), randn(1, 6, 1, 4, seed=1), torch.eye(6, dtype=F64)[None, :, None]
    want, lse = reference.chunk_attention(q, k, v, 6)
    seeds = range(400)
    drawn = [reference.chunk_attention(q, k, v, 6, 0.25, s, dropout_mode="weight") for s in seeds]
    assert all(torch.equal(other, lse) for _, other in drawn)
    weights = torch.stack([o for o, _ in drawn])
    assert torch.all((weights == 0) | torch.isclose(weights, want / 0.75))
    torch.testing.assert_close(weights.mean(0), want, rtol=0, atol=0.1)
