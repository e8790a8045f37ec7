"""cross_entropy equals torch's, values and gradients, and never holds the logits of all tokens."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import VOCAB, random_tokens, small_model
from torch import Tensor
from torch.nn import functional as F

from megalodon_ops.loss import cross_entropy

IGNORED = -100


def inputs(
    n: int, d: int, v: int, dtype: torch.dtype, ignored: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[torch.randperm(n, generator=generator)[:ignored]] = IGNORED
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, **kw: Any) -> Tensor:
    """torch's own, in hidden's dtype (the logits of all tokens), plus the z loss."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets, **kw)
    valid = targets != kw.get("ignore_index", IGNORED)
    z = torch.logsumexp(logits, -1).square() * valid
    how = kw.get("reduction", "mean")
    return loss + z_loss * (
        z if how == "none" else z.sum() if how == "sum" else z.sum() / valid.sum()
    )


@settings(max_examples=60)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 5),
    v=st.integers(1, 7),
    ignored=st.integers(0, 9),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    chunk=st.none() | st.integers(1, 10),
)
def test_equals_torch(
    n: int,
    d: int,
    v: int,
    ignored: int,
    smoothing: float,
    z_loss: float,
    reduction: str,
    chunk: int | None,
) -> None:
    hidden, weight, targets = inputs(n, d, v, torch.float64, ignored)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    want = reference(hidden, weight, targets, z_loss, **options)
    got = cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk=chunk, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    if ignored >= n:  # nothing counts: torch's gradient of the mean is NaN or 0 by its version
        return
    grad = torch.randn(want.shape, dtype=want.dtype)
    ours = torch.autograd.grad(got, (hidden, weight), grad)
    theirs = torch.autograd.grad(want, (hidden, weight), grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.1)])
def test_gradcheck(reduction: str, smoothing: float, z_loss: float) -> None:
    hidden, weight, targets = inputs(7, 3, 5, torch.float64, 2)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(
            hidden, weight, targets, IGNORED, smoothing, z_loss, reduction=reduction, chunk=3
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight), nondet_tol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_torch(dtype: torch.dtype, reduction: str) -> None:
    """Against float64: at most twice the error of torch in the same dtype."""
    hidden, weight, targets = inputs(200, 40, 60, dtype, 30)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    losses = [
        cross_entropy(hidden, weight, targets, reduction=reduction, chunk=37),
        reference(hidden, weight, targets, 0.0, reduction=reduction),
        reference(*wide, targets, 0.0, reduction=reduction),
    ]
    assert losses[0].dtype == torch.float32
    results = []
    for loss, leaves in zip(losses, ((hidden, weight), (hidden, weight), wide), strict=True):
        grads = torch.autograd.grad(loss.sum(), leaves)
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
        results.append([loss.detach().double(), *(g.double() for g in grads)])
    for mine, other, exact in zip(*results, strict=True):
        floor = torch.finfo(torch.float32).eps * exact.norm()
        assert (mine - exact).norm() <= 2 * (other - exact).norm() + floor


def test_autocast_is_a_linear_layers() -> None:
    hidden, weight, targets = inputs(50, 8, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cross_entropy(hidden, weight, targets, chunk=20)
        want = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(got, (hidden, weight))
    assert all(grad.dtype == torch.float32 for grad in ours)
    for mine, other in zip(ours, torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=1e-3)


def test_extremes() -> None:
    hidden, weight, targets = inputs(6, 4, 5, torch.float32, 2)
    with torch.no_grad():
        hidden[targets == IGNORED] = torch.inf
        hidden[(targets != IGNORED).nonzero()[0, 0]] *= 1e4
    loss = cross_entropy(hidden, weight, targets)
    want = F.cross_entropy(F.linear(hidden, weight), targets)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad[targets == IGNORED] == 0).all()
    assert hidden.grad.isfinite().all()
    nothing = torch.full((6,), IGNORED)
    assert cross_entropy(hidden, weight, nothing).isnan()
    assert cross_entropy(hidden, weight, nothing, reduction="sum") == 0


def test_layouts_other_index_and_one_gradient() -> None:
    hidden, weight, targets = inputs(12, 4, 5, torch.float64)
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=3)
    turned = hidden.view(3, 4, 4).transpose(0, 1)
    strided = torch.empty(5, 8, dtype=torch.float64)[:, ::2].copy_(weight)
    got = cross_entropy(turned, strided, targets.view(3, 4).T, ignore_index=3)
    torch.testing.assert_close(got, want)
    (only,) = torch.autograd.grad(got, hidden, retain_graph=True)
    torch.testing.assert_close(only, torch.autograd.grad(want, hidden, retain_graph=True)[0])
    torch.testing.assert_close(torch.autograd.grad(2 * got, hidden)[0], 2 * only)
    loss = cross_entropy(hidden.detach(), weight, targets)
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight)[0],
        torch.autograd.grad(F.cross_entropy(hidden.detach() @ weight.T, targets), weight)[0],
    )


def test_of_a_model() -> None:
    model, tokens, targets = (
        small_model(share_emb=True),
        random_tokens(2, 9),
        random_tokens(2, 9, 1),
    )
    parameters = list(model.parameters())
    want = F.cross_entropy(model(tokens).view(-1, VOCAB), targets.view(-1))
    got = cross_entropy(model(tokens, outputs="hidden"), model.output.output.weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(got, parameters)
    for mine, other in zip(ours, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def test_bad_arguments() -> None:
    hidden, weight, targets = inputs(6, 4, 5, torch.float32)
    given = (hidden, weight, targets)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((hidden, weight[:, :3], targets), ValueError, r"weight: wanted \[V, 4\] .*; got \[5, 3\]"),
        ((hidden, weight, targets[:5]), ValueError, r"targets: wanted \[6\]; got \[5\]"),
        ((hidden, weight, targets.int()), TypeError, r"targets: wanted int64; got torch\.int32"),
        ((hidden, weight.double(), targets), TypeError, r"weight: wanted torch\.float32"),
        ((targets, weight, targets), TypeError, "hidden: wanted a floating dtype"),
        ((hidden, weight, targets + 5), IndexError, r"targets: wanted \[0, 5\) or ignore_index"),
        ((*given, -100, 1.5), ValueError, "label_smoothing: wanted a number from 0 to 1; got 1.5"),
        ((*given, -100, 0.0, -1.0), ValueError, "z_loss: wanted a finite number >= 0; got -1.0"),
    ]
    for arguments, kind, wanted in bad:
        with pytest.raises(kind, match=f"cross_entropy: {wanted}"):
            cross_entropy(*arguments)
    with pytest.raises(ValueError, match="reduction: wanted one of mean, sum, none; got 'max'"):
        cross_entropy(*given, reduction="max")
    with pytest.raises(ValueError, match="chunk: wanted None or an int >= 1; got 0"):
        cross_entropy(*given, chunk=0)


PEAK = """
import re, sys, torch
from pathlib import Path
from torch.nn import functional as F
from megalodon_ops.loss import cross_entropy
def peak():  # in KiB; that of getrusage begins with the parent process's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
n, d, v = 8192, 16, 8192
hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
targets = torch.randint(v, (n,))
def run(n):
    if sys.argv[1] == "ours":
        return cross_entropy(hidden[:n], weight, targets[:n], chunk=256).backward()
    return F.cross_entropy(hidden[:n] @ weight.T, targets[:n]).backward()
run(8)
before = peak()
run(n)
print((peak() - before) / 1024)
"""


def test_memory_is_that_of_a_piece() -> None:
    """8192 tokens of 8192 logits: 256 MB in float32, of which a piece of 256 tokens is 8 MB."""

    def megabytes(which: str) -> float:
        command = [sys.executable, "-c", PEAK, which]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert megabytes("ours") < 40
    assert megabytes("torch") > 200
