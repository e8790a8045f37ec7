"""One pool of threads or two: a torch op and one of ours in turn, against each of them alone.

With torch's pool for both, the pair takes what the two take alone. With a pool of our own beside
torch's, threads of the one that spin or sleep are in the way of the other's.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import interleave, lines, ratio

from megalodon_ops import _C
from megalodon_ops._torch import _use_torch_threads


@pytest.fixture(params=["torch's pool", "a pool of our own"])
def pool(request: pytest.FixtureRequest) -> Iterator[str]:
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    if request.param == "a pool of our own":
        _C.set_parallel_for(0)
        _C.set_num_threads(threads)
    yield request.param
    _use_torch_threads()


def _torch_ops() -> dict[str, Callable[[], Any]]:
    a, b, c = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    x = torch.randn(1 << 19)
    y = torch.empty_like(x)
    return {
        "mm": lambda: torch.mm(a, b, out=c),
        "relu": lambda: torch.clamp_min(x, 0, out=y),
    }


@pytest.mark.parametrize("name", ["mm", "relu"])
def test_alternating(benchmark: Any, pool: str, name: str) -> None:
    theirs = _torch_ops()[name]
    x = torch.randn(1024, 512)
    y, rstd = torch.empty_like(x), torch.empty(1024)

    def ours() -> None:
        _C.rms_norm_forward(x, None, 1e-5, (y, rstd))

    def both() -> None:
        theirs()
        ours()

    with torch.no_grad():
        times = interleave({"theirs": theirs, "ours": ours, "both": both}, 15)
        benchmark.pedantic(both, rounds=3, iterations=10)
    alone = [a + b for a, b in zip(times["theirs"], times["ours"], strict=True)]
    factor = ratio(times["both"], alone)
    if not any(line.startswith("threads:") for line in lines):
        lines.append(
            f"threads: a torch op and rms_norm in turn, {torch.get_num_threads()} threads, "
            "microseconds (median)"
        )
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    lines.append(
        f"  {name:6}{pool:20}alone {medians['theirs']:7.0f} + {medians['ours']:7.0f}   in turn "
        f"{medians['both']:7.0f}   in turn / alone {factor:.2f}"
    )
    benchmark.extra_info.update(medians, factor=factor)
