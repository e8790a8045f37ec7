"""How the benches measure: verify first, then interleave, and compare with what the machine can do
now.

Absolute times lie on a shared machine. Each row therefore times ours, the floor (a clone of as many
bytes as the op has to move, or as many FMAs as it has to do) and the peers in turn, round by round,
and reports the median of the per-round ratios, beside that of ours against itself (the noise band).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megalodon_ops._library import Op

ROUNDS = 9


@dataclass
class Row:
    """One line of the table: times in ms, ratios as (peer or floor time) / (our time)."""

    op: str
    shape: str
    dtype: str
    threads: int
    direction: str
    ours_ms: float
    floor: str
    floor_ms: float
    floor_ratio: float
    peer: str
    peer_ms: float | None
    peer_ratio: float | None
    noise: float
    error: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


rows: list[Row] = []
lines: list[str] = []  # of benches that are no op's, printed before the table


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def interleave(
    candidates: dict[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Milliseconds per call, one entry per round; every round runs all candidates in turn."""
    repeats = {}
    for name, call in candidates.items():
        call()
        once = _time(call, 1)
        repeats[name] = max(1, min(1000, int(5.0 / max(once, 1e-4))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(_time(call, repeats[name]))
    return times


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def clone_floor(nbytes: int) -> Callable[[], Any]:
    """A copy that reads and writes ``nbytes`` in all."""
    source = torch.randn(max(1, nbytes // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def fma_floor(flops: int) -> Callable[[], Any]:
    """A multiplication of square matrices that stay in cache, with about ``flops`` FLOPs in all."""
    n = 256
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    count = max(1, round(flops / (2 * n**3)))

    def call() -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)

    return call


def relative_error(op: Op, args: Sequence[Any]) -> float:
    """Of the first output against the float64 reference: ||e|| / ||ref||."""
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    ours = [a.clone() if isinstance(a, Tensor) else a for a in args]  # an op may write to them
    with torch.no_grad():
        got, wanted = op.overload(*ours), op.reference(*exact)
    got, wanted = (o[0] if isinstance(o, tuple) else o for o in (got, wanted))
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def measure(
    benchmark: Any,
    op: Op,
    args: Sequence[Any],
    small_args: Sequence[Any],
    *,
    backward: bool = False,
    floor: str = "clone",
    peers: dict[str, Callable[..., Any]] | None = None,
) -> Row:
    """Times one op and adds its row to the table.

    ``small_args`` are like ``args`` but small enough for the reference, for the verification.
    ``floor`` is "clone" (bytes) or "fma" (FLOPs) of the op's cost model; with the backward pass
    that of forward plus twice the forward. ``peers`` take the same arguments as the op.
    """
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    error = relative_error(op, small_args)
    assert error <= BOUNDS[dtype], f"{op.name}: wrong before it is fast: relative error {error:.2e}"

    cost = op.cost(*args)
    factor = 2.5 if backward and floor == "clone" else 3 if backward else 1
    floor_call = (
        clone_floor(int(cost.bytes * factor))
        if floor == "clone"
        else fma_floor(int(cost.flops * factor))
    )
    candidates = {
        "ours": _runner(op.overload, args, backward),
        "floor": floor_call,
        "again": _runner(op.overload, args, backward),
    }
    for name, peer in (peers or {}).items():
        candidates[name] = _runner(peer, args, backward)
    times = interleave(candidates)
    benchmark.pedantic(candidates["ours"], rounds=3, iterations=1)

    best = min(peers or {}, key=lambda name: statistics.median(times[name]), default=None)
    shapes = next(tuple(a.shape) for a in args if isinstance(a, Tensor))
    row = Row(
        op=op.name,
        shape="x".join(map(str, shapes)),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        direction="forward+backward" if backward else "forward",
        ours_ms=statistics.median(times["ours"]),
        floor=floor,
        floor_ms=statistics.median(times["floor"]),
        floor_ratio=ratio(times["floor"], times["ours"]),
        peer=best or "",
        peer_ms=statistics.median(times[best]) if best else None,
        peer_ratio=ratio(times[best], times["ours"]) if best else None,
        noise=ratio(times["again"], times["ours"]),
        error=error,
    )
    benchmark.extra_info.update(row.as_dict())
    rows.append(row)
    return row


def _runner(function: Callable[..., Any], args: Sequence[Any], backward: bool) -> Callable[[], Any]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(*args)

        return forward
    leaves = [
        a.detach().clone().requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    output = function(*leaves)
    first = output[0] if isinstance(output, tuple) else output
    cotangent = torch.randn_like(first)

    def both() -> None:
        result = function(*leaves)
        y = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(y, wanted, cotangent, allow_unused=True)

    return both
