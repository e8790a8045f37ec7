"""How the benches measure: verify first, then interleave, and compare with what the machine can do
now.

Absolute times lie on a shared machine. Each row therefore times ours, the floor (a clone of as many
bytes as the op has to move, or as many FMAs as it has to do) and the peers in turn, round by round,
and reports the median of the per-round ratios, beside that of ours against itself (the noise band).
"""

from __future__ import annotations

import itertools
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
    device_type: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


rows: list[Row] = []
lines: list[str] = []  # of benches that are no op's, printed before the table
device = torch.device("cpu")  # where ops are timed; --device


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def interleave(
    candidates: dict[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Milliseconds per call, one entry per round; every round runs all candidates in turn."""
    timer = _time_on_gpu if device.type == "cuda" else _time
    repeats = {}
    for name, call in candidates.items():
        for _ in range(WARM_UP[device.type]):
            call()
        once = timer(call, 1)
        repeats[name] = max(1, min(1000, int(5.0 / max(once, 1e-4))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(timer(call, repeats[name]))
    return times


# ---- on a GPU: not yet run on one --------------------------------------------------------------

WARM_UP = {"cpu": 1, "cuda": 10}
ROTATED_BYTES = 256 << 20  # at least, and three sets of inputs: several times the L2 cache


def _time_on_gpu(call: Callable[[], Any], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def _moved(args: Sequence[Any]) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def _copies(args: Sequence[Any]) -> list[list[Any]]:
    """Sets of inputs to rotate through, so that none is in the cache when its turn comes."""
    size = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    count = max(3, -(-ROTATED_BYTES // max(size, 1)))
    return [_clones(args) for _ in range(min(count, 64))]


def _rotating(make: Callable[[Sequence[Any]], Callable[[], Any]], args: Sequence[Any]) -> Any:
    """A call that replays a graph of one set of inputs after the other; where a peer cannot be
    captured, the calls themselves.
    """
    calls = [make(copy) for copy in _copies(args)]
    try:
        replays = [_captured(call) for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        replays = calls
    turns = itertools.cycle(replays)
    return lambda: next(turns)()


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- floors ------------------------------------------------------------------------------------


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def clone_floor(nbytes: int) -> Callable[[], Any]:
    """A copy that reads and writes ``nbytes`` in all."""
    source = torch.randn(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def fma_floor(flops: int) -> Callable[[], Any]:
    """A multiplication of square matrices that stay in cache, with about ``flops`` FLOPs in all (at
    least one multiplication: on a GPU, ratios of small ops are to be read with that in mind).
    """
    n = 256 if device.type == "cpu" else 4096
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    count = max(1, round(flops / (2 * n**3)))

    def call() -> None:
        for _ in range(count):
            torch.mm(a, b, out=c)

    return call


def relative_error(op: Op, args: Sequence[Any]) -> float:
    """Of the first output against the float64 reference: ||e|| / ||ref||."""
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with torch.no_grad():  # an op may write to its inputs
        got, wanted = op.overload(*_clones(args)), op.reference(*exact)
    got, wanted = (o[0] if isinstance(o, tuple) else o for o in (got, wanted))
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def _clones(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


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
    args, small_args = _moved(args), _moved(small_args)
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
        device_type=device.type,
    )
    benchmark.extra_info.update(row.as_dict())
    rows.append(row)
    return row


def _runner(function: Callable[..., Any], args: Sequence[Any], backward: bool) -> Callable[[], Any]:
    if device.type == "cuda":
        return _rotating(lambda copy: _one_call(function, copy, backward), args)
    return _one_call(function, args, backward)


def _one_call(
    function: Callable[..., Any], args: Sequence[Any], backward: bool
) -> Callable[[], Any]:
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
