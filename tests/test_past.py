"""Outputs that go past the caches, which only large ones do, are to the bit those of pieces."""

from collections.abc import Callable, Sequence

import backend
import pytest
import torch
from torch import Tensor

from megalodon_ops._library import Maker

pytestmark = pytest.mark.skipif(bool(backend.BACKEND), reason="of the CPU's kernels alone")

OPS = torch.ops.megalodon
BYTES = 16 << 20  # cpp/core/past.h
DTYPES = [torch.float32, torch.bfloat16]


def check(call: Callable[..., Sequence[Tensor]], *args: Tensor, largest: int = 0) -> None:
    """call(*args) gives outputs with the rows of args, the `largest` one of BYTES or more."""
    whole = call(*args)
    assert whole[largest].numel() * whole[largest].element_size() >= BYTES
    pieces = [call(*piece) for piece in zip(*(a.chunk(4) for a in args), strict=True)]
    for got, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [512, 100])  # rows of 100 are no whole lines
def test_norms(isa: str, D: int, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    rows = BYTES // (D * dtype.itemsize) + 3
    x, dy, weight, bias = (
        make.activation(rows, D),
        make.activation(rows, D),
        make.stat(D),
        make.stat(D),
    )
    check(lambda x: OPS.rms_norm(x, weight), x)
    check(lambda x: OPS.layer_norm(x, weight, bias), x)
    rstd = OPS.rms_norm(x, weight)[1]
    check(lambda dy, x, rstd: OPS.rms_norm_backward(dy, x, weight, rstd)[:1], dy, x, rstd)
    _, mean, rstd = OPS.layer_norm(x, weight, bias)
    check(
        lambda *args: OPS.layer_norm_backward(*args[:2], weight, *args[2:])[:1], dy, x, mean, rstd
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(isa: str, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    a, b, dy = (make.activation(BYTES // dtype.itemsize + 77) for _ in range(3))
    check(lambda a: (OPS.silu_mul(a, None),), a)
    check(lambda a, b: (OPS.silu_mul(a, b),), a, b)
    check(OPS.silu_mul_backward, dy, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope(isa: str, dtype: torch.dtype) -> None:
    make = Maker(dtype)
    B, L, H, S = BYTES // (64 * 1024 * dtype.itemsize), 64, 4, 256
    scales = make.stat(2, H * S), make.stat(2, H * S)
    z, dq, dk = (
        make.activation(B, L, H * S),
        make.activation(B, L, H, S),
        make.activation(B, L, H, S),
    )
    check(lambda z: OPS.qk_norm_rope(z, *scales, H, 50), z)
    rstd = OPS.qk_norm_rope(z, *scales, H, 50)[2]
    rest = H, 50, 10000.0, None, 1e-5, None
    check(
        lambda *args: OPS.qk_norm_rope_backward(*args[:3], *scales, args[3], *rest)[:1],
        dq,
        dk,
        z,
        rstd,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("D", "G"), [(512, 32), (512, 128), (1024, 32), (512, 8), (480, 20), (500, 20)]
)
def test_timestep_norm(isa: str, D: int, G: int, dtype: torch.dtype) -> None:
    """Rows of 19 steps, of which some are padded."""
    make, L = Maker(dtype), 19
    B = BYTES // (L * D * dtype.itemsize) + 3
    x, dy = make.activation(B, L, D), make.activation(B, L, D)
    weight, bias, mask = make.stat(D), make.stat(D), torch.rand(B, L) < 0.1

    def forward(x: Tensor, mask: Tensor) -> Sequence[Tensor]:
        y: Sequence[Tensor] = OPS.timestep_norm(x, weight, bias, G, 1e-5, None, None, None, mask)
        return y

    def backward(dy: Tensor, x: Tensor, mask: Tensor, *statistics: Tensor) -> Sequence[Tensor]:
        no_state = None, None, None
        arguments = dy, None, None, x, weight, *no_state, mask, None, *statistics, G, 1e-5
        dx: Sequence[Tensor] = OPS.timestep_norm_backward(*arguments)[:1]
        return dx

    check(forward, x, mask)
    check(backward, dy, x, mask, *forward(x, mask)[4:])
