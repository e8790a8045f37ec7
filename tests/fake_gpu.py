"""A pytest plugin (``-p fake_gpu``) that runs the benches as if on a GPU where none is: tensors on
"meta", which have no numbers, and streams, events and graphs that only count.

What it finds: tensors made on the wrong device, arguments that do not fit, an order of calls that
the harness does not mean. What it does not: numbers, speed, whether a call can be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import gpu
import harness
import pytest
import torch

counts = {"captures": 0, "replays": 0, "compiled": 0, "in capture": 0}


class Event:
    recorded: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, end: Event) -> float:
        assert self.done
        assert end.done
        return 1.0


def synchronize() -> None:
    for event in Event.recorded:
        event.done = True
    Event.recorded.clear()


class Graph:
    captured = False

    def replay(self) -> None:
        assert self.captured
        assert not counts["in capture"]
        counts["replays"] += 1


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@contextlib.contextmanager
def graph(made: Graph) -> Iterator[None]:
    counts["in capture"] += 1
    yield
    counts["in capture"] -= 1
    counts["captures"] += 1
    made.captured = True


@contextlib.contextmanager
def stream(_: Stream) -> Iterator[None]:
    yield


def compiled(function: Any, *, mode: str, dynamic: bool) -> Any:
    assert mode == "max-autotune-no-cudagraphs"
    counts["compiled"] += 1
    return function


FAKES = {
    "Event": Event,
    "CUDAGraph": Graph,
    "Stream": Stream,
    "graph": graph,
    "stream": stream,
    "current_stream": Stream,
    "current_device": lambda: 0,
    "synchronize": synchronize,
    "empty_cache": lambda: None,
    "get_device_name": lambda: "NVIDIA Nothing",
    "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1 << 20),
}


def pytest_configure(config: pytest.Config) -> None:
    for name, fake in FAKES.items():
        setattr(torch.cuda, name, fake)
    torch.compile = compiled
    harness.relative_error = lambda *_: 0.0
    # The order of calls; there are no numbers to look at.
    gpu.verify_at_size = lambda what, call: [gpu._tensors(call()) for _ in range(2)]
    gpu.ROUNDS = 2


def pytest_unconfigure(config: pytest.Config) -> None:
    print(f"\nfake gpu: {counts}")
