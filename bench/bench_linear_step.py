"""linear_step against torch's linear."""

from typing import Any

import pytest
import torch
from harness import maker, measure

from megalodon_ops import registry

OP = registry["linear_step"]


def _arguments(dtype: torch.dtype, B: int, into: int, out: int) -> tuple[Any, ...]:
    make = maker(dtype)
    return make.activation(B, into), make.activation(out, into) * into**-0.5


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("into", "out"), [(256, 256), (1024, 32000)], ids=["bytes", "words"])
def test_linear_step(benchmark: Any, into: int, out: int, dtype: torch.dtype, rows: int) -> None:
    measure(
        benchmark,
        OP,
        _arguments(dtype, rows, into, out),
        _arguments(dtype, rows, into, 64),
        peers={"torch": torch.nn.functional.linear},
        label=f" to {out}",
    )
