"""What this GPU can do: ``python bench/ceilings.py`` prints copy bandwidth and the rate of a
bfloat16 GEMM, on random data, as json. Not yet run on a GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

COPIED = 1 << 30  # elements of 2 bytes
GEMM = 8192
WARM_UP, REPEATS = 10, 50


def median_ms(call: Callable[[], Any]) -> float:
    """Of single calls, each between two events; they are queued without waiting."""
    for _ in range(WARM_UP):
        call()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(REPEATS)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()


def _copy_ms(device: torch.device) -> float:
    source = _normal(device, COPIED)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def _gemm_ms(device: torch.device) -> float:
    a, b = (_normal(device, GEMM, GEMM) for _ in range(2))
    product = torch.empty_like(a)
    return median_ms(lambda: torch.mm(a, b, out=product))


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured now; frees what it took."""
    copy, gemm = _copy_ms(device), _gemm_ms(device)
    torch.cuda.empty_cache()
    nbytes = 2 * 2 * COPIED  # read and written
    return {
        "copy_gb_per_s": round(nbytes / copy / 1e6, 1),
        "bf16_gemm_tflop_per_s": round(2 * GEMM**3 / gemm / 1e9, 1),
    }


if __name__ == "__main__":
    print(json.dumps(ceilings(torch.device("cuda"))))
