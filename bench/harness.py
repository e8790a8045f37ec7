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

import gpu
import torch
from torch import Tensor

from megalodon_ops._library import Cost, Maker, Op

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
    ours_p10_ms: float | None = None
    ours_p90_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ModelRow:
    """One measurement of the whole model, at the demo's shape.

    at: L of a training step, or the position of a decoding step. kept_bytes: per token and layer,
    from forward to backward.
    """

    what: str
    dtype: str
    threads: int
    at: int
    us_per_token: float
    floor_ratio: float
    error: float
    kept_bytes: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


rows: list[Row] = []
model_rows: list[ModelRow] = []
lines: list[str] = []  # of benches that are no op's, printed before the table
device = torch.device("cpu")  # where ops are timed; --device
long_set = False  # more sizes, types and peers; --long
BEYOND_CACHES = (2, 65536, 512)  # B, L, D: 268 MB in float32


def sizes(*on_cpu: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """B, L, D to time: these on the CPU (--long: and one beyond its caches), on a GPU the public
    ones.
    """
    if device.type == "cpu":
        return (*on_cpu, BEYOND_CACHES) if long_set else on_cpu
    return gpu.LONG if long_set else gpu.SHORT


def sizes_of_long_gpu(*more: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """B, L, D to time on a GPU with --long alone."""
    return more if device.type != "cpu" and long_set else ()


class _OnDevice(Maker):
    """Makes numbers where they are needed: billions of them take minutes on a CPU."""

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device=self.device).to(dtype)


def maker(dtype: torch.dtype) -> Maker:
    """Of random inputs on the device."""
    return Maker(dtype) if device.type == "cpu" else _OnDevice(dtype, device)


def _time(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def interleave(
    candidates: dict[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Milliseconds per call, one entry per round; every round runs all candidates in turn."""
    on_gpu = device.type != "cpu"
    timer, rounds = (gpu.time_ms, max(rounds, gpu.ROUNDS)) if on_gpu else (_time, rounds)
    repeats = {}
    for name, call in candidates.items():
        for _ in range(gpu.WARM_UP if on_gpu else 1):
            call()
        once = timer(call, 1)
        repeats[name] = max(1, min(1000, int((gpu.ROUND_MS if on_gpu else 5.0) / max(once, 1e-4))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(timer(call, repeats[name]))
    return times


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
    # A GPU's matrix units, for which 16-bit numbers are made.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
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


def _moved(args: Sequence[Any]) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


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
    label: str = "",
) -> Row:
    """Times one op and adds its row to the table.

    ``small_args`` are like ``args`` but small enough for the reference, for the verification.
    ``floor`` is "clone" (bytes) or "fma" (FLOPs) of the op's cost model; with the backward pass
    that of forward plus twice the forward. ``peers`` take the same arguments as the op.
    ``label`` says of the shape what that of the first tensor does not.
    """
    cost = op.cost(*args)  # of some ops of the values
    args, small_args = _moved(args), _moved(small_args)
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    error = relative_error(op, small_args)
    assert error <= BOUNDS[dtype], f"{op.name}: wrong before it is fast: relative error {error:.2e}"

    floor_call = _floor(cost, floor, backward)
    if device.type != "cpu":
        gpu.verify_at_size(op.name, _one_call(op.overload, _clones(args), backward))
    candidates = {
        "ours": _runner(op.overload, args, backward),
        "floor": floor_call,
        "again": _runner(op.overload, args, backward),
    }
    others = _peers(op.name, peers or {}, args, backward)
    times = interleave(candidates | others)
    benchmark.pedantic(candidates["ours"], rounds=3, iterations=1)

    best = min(others, key=lambda name: statistics.median(times[name]), default=None)
    tenths = statistics.quantiles(times["ours"], n=10)
    row = Row(
        op=op.name,
        shape=_shape(op, args) + label,
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
        ours_p10_ms=tenths[0],
        ours_p90_ms=tenths[-1],
    )
    benchmark.extra_info.update(row.as_dict())
    rows.append(row)
    return row


def _floor(cost: Cost, floor: str, backward: bool) -> Callable[[], Any]:
    if floor == "clone":
        return clone_floor(int(cost.bytes * (2.5 if backward else 1)))
    return fma_floor(int(cost.flops * (3 if backward else 1)))


def _shape(op: Op, args: Sequence[Any]) -> str:
    """That of the first tensor, and whether the call is of packed rows or of caches."""
    shape = next(tuple(a.shape) for a in args if isinstance(a, Tensor))
    named = {argument.name: value for argument, value in zip(op.arguments, args, strict=False)}
    kinds = {"cu_seqlens": " packed", "k_cache": " cached"}
    kind = "".join(text for name, text in kinds.items() if named.get(name) is not None)
    return "x".join(map(str, shape)) + kind


def _peers(
    op: str, peers: dict[str, Callable[..., Any]], args: Sequence[Any], backward: bool
) -> dict[str, Callable[[], Any]]:
    """What is timed beside ours, on the CPU with --long compiled too. On a GPU one that fails, say
    for a size it does not have, or that takes too long to compile, is left out, and the table says
    so.
    """
    if device.type == "cpu":
        if long_set:
            torch._dynamo.reset()
            compiled = {f"{n}, compiled": torch.compile(p, dynamic=False) for n, p in peers.items()}
            peers = peers | compiled
        return {name: _runner(peer, args, backward) for name, peer in peers.items()}
    runners = {}
    for name, peer in gpu.at_their_best(peers).items():
        try:
            with gpu.time_limit(gpu.COMPILE_SECONDS):
                runners[name] = _runner(peer, args, backward)
        except (RuntimeError, NotImplementedError, TimeoutError, AssertionError) as error:
            torch.cuda.synchronize()
            reason = str(error).split("\n", 1)[0][:150]
            lines.append(f"{op}: {name} is left out: {reason}")
    return runners


def _runner(function: Callable[..., Any], args: Sequence[Any], backward: bool) -> Callable[[], Any]:
    if device.type != "cpu":
        return gpu.rotating(lambda copy: _one_call(function, copy, backward), args)
    return _one_call(function, args, backward)


def _one_call(
    function: Callable[..., Any], args: Sequence[Any], backward: bool
) -> Callable[[], Any]:
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(*args)

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

    def both() -> Any:
        result = function(*leaves)
        y = result[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(y, wanted, cotangent, allow_unused=True)

    return both
