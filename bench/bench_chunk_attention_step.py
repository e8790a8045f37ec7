"""chunk_attention_step against the same step in torch."""

from functools import partial
from typing import Any

import pytest
import torch
from harness import measure
from torch import Tensor

from megalodon_ops import registry
from megalodon_ops._library import Maker

OP = registry["chunk_attention_step"]


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    C: int,
    m: int,
) -> Tensor:
    """For rows that stand at the same position, m."""
    k_cache[:, m], v_cache[:, m] = k, v
    keys, values = (t[:, : m + 1].transpose(1, 2) for t in (k_cache, v_cache))
    o = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, scale=1.0)
    return o[:, :, 0]


def _arguments(
    dtype: torch.dtype, B: int, H: int, S: int, E: int, C: int, m: int
) -> tuple[Any, ...]:
    make = Maker(dtype)
    return (
        make.activation(B, H, S) * S**-0.5,
        make.activation(B, H, S),
        make.activation(B, H, E),
        make.activation(B, C, H, S),
        make.activation(B, C, H, E),
        make.ints(*[m] * B),
        C,
    )


@pytest.mark.parametrize("m", [15, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "H", "S", "E"), [(1, 1, 256, 2048), (8, 8, 64, 64)], ids=["mega", "S64"]
)
def test_chunk_attention_step(
    benchmark: Any, B: int, H: int, S: int, E: int, dtype: torch.dtype, m: int
) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, B, H, S, E, 2048, m),
        _arguments(dtype, B, H, S, E, 128, m % 128),
        peers={"sdpa": partial(_sdpa, m=m)},
        label=f" {m + 1} slots",
    )
