"""How the benches time on a GPU: graph replays between events, over inputs that are not cached.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM_UP = 10  # replays
ROUNDS, ROUND_MS = 11, 20.0  # 220 ms of each candidate
SETS, MOST_SETS = 3, 64  # of inputs to rotate through
COMPILE_SECONDS = 25  # for one peer

# B, L of the public shapes (D = 1024, 2048 and 4096), the short set first.
SHORT = ((1, 32768, 4096),)
LONG = tuple(
    (B, L, D)
    for B, L in ((1, 32768), (8, 4096), (2, 16384), (1, 131072))
    for D in (1024, 2048, 4096)
)
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def time_ms(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds per call, of calls one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def sets_of(args: Sequence[Any]) -> list[list[Any]]:
    """As many copies of the inputs as are together larger than four times the L2 cache, at least
    three, so that none is in the cache when its turn comes; small ones, at most 64, may be.
    """
    size = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    cache = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(max(SETS, -(-cache // max(size, 1))), MOST_SETS)
    return [[a.clone() if isinstance(a, Tensor) else a for a in args] for _ in range(count)]


def rotating(make: Callable[[Sequence[Any]], Callable[[], Any]], args: Sequence[Any]) -> Any:
    """A call that replays the graph of one set of inputs after the other."""
    replays = [captured(make(copy)) for copy in sets_of(args)]
    turns = itertools.cycle(replays)
    return lambda: next(turns)()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a graph of the call, which may compile itself in the first of three calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], Any] = graph.replay
    return replay


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread, as soon as it runs Python again."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def at_their_best(peers: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Each peer as it is and compiled; attention by each of torch's backends. Our own graphs stand
    in for those of mode "max-autotune".
    """
    best: dict[str, Callable[..., Any]] = {}
    for name, peer in peers.items():
        if name == "sdpa":
            best |= {key: _with_backend(peer, backend) for key, backend in SDPA.items()}
            continue
        best[name] = peer
        torch.compiler.reset()
        best[f"{name} compiled"] = torch.compile(
            peer, mode="max-autotune-no-cudagraphs", dynamic=False
        )
    return best


def _with_backend(peer: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with sdpa_kernel(backend):
            return peer(*args)

    return call


def verify_at_size(what: str, call: Callable[[], Any]) -> None:
    """Two runs at the size that is timed, the second into memory full of NaN: every element is
    written, with the same bits.
    """
    first = _tensors(call())
    shapes = [(t.shape, t.dtype) for t in first if t.is_floating_point()]
    poison = [torch.full(s, float("nan"), dtype=d, device=first[0].device) for s, d in shapes]
    del poison  # its memory is what the next outputs get
    for a, b in zip(first, _tensors(call()), strict=True):
        assert torch.equal(a, b), f"{what}: two runs differ, or an output was not written"
        assert bool(torch.isfinite(a).all()), f"{what}: NaN or inf at the timed size"


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [t for t in results if isinstance(t, Tensor)]
