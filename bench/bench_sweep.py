"""Odd sizes: no size of an op takes much longer than a larger one.

Every op along one axis at a time, forward and backward in float32. A cliff is the time of a size
over the least time of any larger size on its axis; the goal is at most 2. With --save the curves
are drawn to bench/results/NAME-sweep.svg.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import _one_call, interleave, lines, relative_error

from megalodon_ops import registry
from megalodon_ops._library import Maker

GOAL = 2.0
ROUNDS = 5
BOUND = 1e-5
# Around the widths of vectors, tiles and blocks, and away from them.
FEW = (1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33)
SIZES = (*FEW, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300)
LONG = (*SIZES, 511, 512, 513, 800, 1023, 1024, 1025, 2000, 4095, 4096, 4097)

make = Maker(torch.float32)


def _rows(op: str) -> Callable[[int, int], tuple[Any, ...]]:
    def arguments(L: int, D: int) -> tuple[Any, ...]:
        x, parameter = make.activation(1, L, D), lambda: make.stat(D, scale=0.3)
        return {
            "rms_norm": lambda: (x, parameter(), 1e-5),
            "layer_norm": lambda: (x, parameter(), parameter(), 1e-5),
            "silu_mul": lambda: (x, make.activation(1, L, D)),
            "timestep_norm": lambda: (x, parameter(), parameter(), D, 1e-5),
        }[op]()

    return arguments


def _cema(B: int, L: int, D: int, N: int) -> tuple[Any, ...]:
    parameters = (make.stat(*s) for s in ((D, N), (D, N), (D,), (D, N, 2), (D,)))
    return make.activation(B, L, D), *parameters


def _rope(L: int, H: int, S: int) -> tuple[Any, ...]:
    z, affine = make.activation(1, L, H * S), make.stat(2, H * S, scale=0.3)
    return z, affine, affine.clone(), H, 64


def _attention(L: int, S: int, E: int, C: int) -> tuple[Any, ...]:
    q = make.activation(1, L, 2, S) * S**-0.5
    return q, make.activation(1, L, 2, S), make.activation(1, L, 2, E), C


def _convolution(L: int, D: int) -> tuple[Any, ...]:
    return make.activation(1, L, D), make.stat(D, L)


Axis = tuple[str, str, Sequence[int], Callable[[int], tuple[Any, ...]]]
AXES: list[Axis] = [
    *(
        axis
        for op in ("rms_norm", "layer_norm", "silu_mul", "timestep_norm")
        for axis in (
            (op, "D", LONG, lambda n, op=op: _rows(op)(256, n)),
            (op, "L", LONG, lambda n, op=op: _rows(op)(n, 64)),
        )
    ),
    ("timestep_norm", "D/G", FEW, lambda n: (*_rows("timestep_norm")(512, 16 * n)[:3], 16)),
    ("cema", "L", LONG, lambda n: _cema(1, n, 64, 16)),
    ("cema", "D", SIZES, lambda n: _cema(1, 512, n, 16)),
    ("cema", "N", (*FEW, 48, 63, 64), lambda n: _cema(1, 512, 64, n)),
    ("cema", "B at L = 1", SIZES[:-8], lambda n: _cema(n, 1, 512, 16)),
    ("qk_norm_rope", "S", [2 * n for n in SIZES], lambda n: _rope(256, 2, n)),
    ("qk_norm_rope", "L", LONG, lambda n: _rope(n, 1, 64)),
    ("chunk_attention", "L", LONG[:-4], lambda n: _attention(n, 32, 32, 512)),
    ("chunk_attention", "C", SIZES, lambda n: _attention(600, 32, 32, n)),
    ("chunk_attention", "S", [2 * n for n in FEW], lambda n: _attention(256, n, 32, 128)),
    ("chunk_attention", "E", SIZES, lambda n: _attention(256, 32, n, 128)),
    ("fft_conv", "L", LONG, lambda n: _convolution(n, 32)),
    ("fft_conv", "D", SIZES, lambda n: _convolution(300, n)),
]

curves: dict[str, dict[int, float]] = {}  # seconds by size


def _cliff(times: dict[int, float]) -> tuple[float, int, int]:
    """The largest ratio of a size's time to a larger size's, and the two sizes."""
    pairs = [(times[a] / times[b], a, b) for a in times for b in times if a <= b]
    return max(pairs)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis[0]}-{axis[1]}")
def test_sweep(benchmark: Any, axis: Axis, backward: bool, request: pytest.FixtureRequest) -> None:
    name, label, sizes, arguments = axis
    if harness.device.type != "cpu":
        pytest.skip("a sweep of the CPU")
    op = registry[name]
    for size in sizes:
        if size < 70:
            error = relative_error(op, arguments(size))
            assert error <= BOUND, f"{name}: {label} = {size}: relative error {error:.2e}"
    calls = {str(n): _one_call(op.overload, arguments(n), backward) for n in sizes}
    medians = {int(n): statistics.median(t) for n, t in interleave(calls, ROUNDS).items()}
    benchmark.pedantic(calls[str(sizes[0])], rounds=1, iterations=1)
    ratio, worst, better = _cliff(medians)
    curves[f"{name}, {label}, {'both' if backward else 'forward'}"] = medians
    benchmark.extra_info.update(medians=medians, cliff=ratio)
    verdict = "" if ratio <= GOAL else f"  above {GOAL:.0f}"
    lines.append(
        f"sweep {name:16}{label:11}{'both' if backward else 'forward':8} worst cliff {ratio:5.2f}"
        f" ({label.split()[0]} = {worst} against {better}){verdict}"
    )
    if request.config.getoption("--save"):
        folder, file = request.config.getoption("--results"), request.config.getoption("--save")
        _draw(Path(folder) / f"{file}-sweep.svg")


def _draw(path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    names = sorted({curve.rsplit(",", 1)[0] for curve in curves})
    figure, plots = plt.subplots(-(-len(names) // 4), 4, figsize=(16, 2.6 * -(-len(names) // 4)))
    for plot in plots.flat[len(names) :]:
        plot.axis("off")
    for plot, name in zip(plots.flat, names, strict=False):
        for direction in ("forward", "both"):
            curve = curves.get(f"{name}, {direction}", {})
            plot.loglog(list(curve), list(curve.values()), ".-", lw=0.8, ms=3, label=direction)
        plot.set_title(name, fontsize=8)
        plot.tick_params(labelsize=7)
    plots.flat[0].legend(fontsize=7)
    figure.supylabel("ms per call", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
