"""chunk_attention against torch's scaled_dot_product_attention on whole chunks; packed segments
against the same tokens as one row.
"""

from itertools import accumulate, cycle, takewhile
from typing import Any

import harness
import pytest
import torch
from harness import maker, measure, sizes
from torch import Tensor

from megalodon_ops import registry

OP = registry["chunk_attention"]

# H, S, E, C: on a GPU those of Megalodon 7B, and heads that flash attention has, too.
if harness.device.type == "cpu":
    SHAPES = {"mega": (1, 256, 2048, 2048), "S64": (8, 64, 64, 2048)}
else:
    SHAPES = {
        "7B": (4, 256, 2048, 2048),
        "7B-C4096": (4, 256, 2048, 4096),
        "S256": (8, 256, 256, 2048),
        "S128": (16, 128, 128, 2048),
        "S64": (32, 64, 64, 2048),
    }


def shapes(*names: str) -> pytest.MarkDecorator:
    """These, or all that there are."""
    some = [name for name in SHAPES if name in names or not names]
    return pytest.mark.parametrize(("H", "S", "E", "C"), [SHAPES[n] for n in some], ids=some)


def _label(E: int, C: int) -> str:
    """What the shape of q does not say."""
    return "" if harness.device.type == "cpu" else f" E={E} C={C}"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, C: int, *_: Any) -> Tensor:
    q, k, v = (t.unflatten(1, (-1, C)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


def _arguments(
    dtype: torch.dtype, B: int, L: int, H: int, S: int, E: int, C: int
) -> tuple[Any, ...]:
    make = maker(dtype)
    q = make.activation(B, L, H, S) * S**-0.5
    return q, make.activation(B, L, H, S), make.activation(B, L, H, E), C


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shapes()
@pytest.mark.parametrize("size", sizes((1, 4096, 0)), ids=str)
def test_chunk_attention(
    benchmark: Any,
    size: tuple[int, int, int],
    H: int,
    S: int,
    E: int,
    C: int,
    dtype: torch.dtype,
    backward: bool,
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, *size[:2], H, S, E, C),
        _arguments(dtype, 1, 200, 1, S, E, 128),
        backward=backward,
        floor="fma",
        label=_label(E, C),
        peers={"sdpa": _sdpa},
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, C: int, *_: Any) -> Tensor:
    o: Tensor = OP.overload(q, k, v, C)[0]
    return o


def _with_caches(
    dtype: torch.dtype, B: int, L: int, H: int, S: int, E: int, C: int
) -> tuple[Any, ...]:
    caches = (torch.zeros(B, C, H, n, dtype=dtype) for n in (S, E))
    position = torch.zeros(B, dtype=torch.int64)
    return *_arguments(dtype, B, L, H, S, E, C), 0.0, 0, None, *caches, position


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@shapes("mega", "7B", "S256", "S128", "S64")
@pytest.mark.parametrize("size", sizes((1, 4096, 0)), ids=str)
def test_empty_caches(
    benchmark: Any, size: tuple[int, int, int], H: int, S: int, E: int, C: int, backward: bool
) -> None:
    """The same work, on Hopper another way (chunk_attention_wgmma.cu): in rounds whose slabs all
    threads copy, where without caches slabs of wide heads come by tensor copies, to pairs of
    blocks, and narrow heads take one pass.
    """
    if harness.device.type == "cpu":
        pytest.skip("the same code there")
    measure(
        benchmark,
        OP,
        _with_caches(torch.bfloat16, *size[:2], H, S, E, C),
        _with_caches(torch.bfloat16, 1, 200, 1, S, E, 128),
        backward=backward,
        floor="fma",
        label=_label(E, C),
        peers={"without caches": _plain},
    )


LENGTHS = (1024, 96, 513, 17, 2048, 256, 1, 141)  # of segments, again and again: 512 on average


def _packed(dtype: torch.dtype, L: int, H: int, S: int, E: int, C: int) -> tuple[Any, ...]:
    ends = takewhile(lambda end: end < L, accumulate(cycle(LENGTHS)))
    bounds = torch.tensor([0, *ends, L])
    return *_arguments(dtype, 1, L, H, S, E, C), 0.0, 0, bounds


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shapes("mega", "S64", "7B")
@pytest.mark.parametrize("size", sizes((1, 4096, 0)), ids=str)
def test_packed(
    benchmark: Any,
    size: tuple[int, int, int],
    H: int,
    S: int,
    E: int,
    C: int,
    dtype: torch.dtype,
    backward: bool,
) -> None:
    measure(
        benchmark,
        OP,
        _packed(dtype, size[0] * size[1], H, S, E, C),
        _packed(dtype, 200, 1, S, E, 128),
        backward=backward,
        floor="fma",
        label=_label(E, C),
        peers={"unpacked": _plain},
    )
