"""The whole model at the demo's shape: a training step by length, a decoding step by position.

All cores. The floor of training is the linear layers alone, forward and backward, in the same
dtype; that of decoding a copy of as many bytes as the weights have. Lengths and positions should
not matter: cost per token is flat, and memory linear in the length.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import ModelRow, clone_floor, interleave, lines, model_rows, ratio
from torch import Tensor, nn

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.nn.linear import linear
from megalodon_ops.training.data import Batch
from megalodon_ops.training.loop import make_optimizer, training_step
from megalodon_ops.training.options import DEMO_SHAPE, TrainOptions

LENGTHS = (512, 2048, 8192, 65536)
POSITIONS = (500, 10_000, 1_000_000)
STEPS = 16  # of decoding in one call: the chunk's fill, which costs, is the same in all
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the loss against float64


@pytest.fixture(autouse=True)
def _all_cores(_threads: None) -> None:
    if harness.device.type != "cpu":
        pytest.skip("the model is timed on the CPU")
    torch.set_num_threads(os.cpu_count() or 1)


def _model() -> Megalodon:
    torch.manual_seed(0)
    return Megalodon(MegalodonConfig(**DEMO_SHAPE, vocab_size=256, output_size=256))


def _batch(length: int) -> Batch:
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def _packed(batch: Batch) -> Batch:
    """The same tokens as documents of 64 to 1023 tokens, the last one shorter."""
    lengths = torch.randint(64, 1024, (batch.tokens.shape[1] // 64,))
    bounds = lengths.cumsum(0)
    inside = bounds[bounds < batch.tokens.shape[1]]
    return batch._replace(
        cu_seqlens=torch.cat([torch.zeros(1), inside, torch.tensor([batch.tokens.numel()])]).long()
    )


def _verify(model: Megalodon, dtype: str) -> float:
    """The relative error of a short loss against float64."""
    tokens, targets, _ = _batch(700)

    def loss(model: nn.Module, enabled: bool) -> float:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(tokens).double().flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, targets.flatten()))

    want = loss(_model().double(), False)
    error = abs(loss(model, dtype == "bfloat16") - want) / want
    assert error <= TOLERANCE[dtype], f"wrong before it is fast: relative error {error:.2e}"
    return error


def _linear_layers(model: Megalodon, length: int, dtype: torch.dtype) -> Callable[[], Any]:
    """The products of a training step and nothing else."""
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    layers = []
    for out, into in shapes:
        tensors = (torch.randn(length, into), torch.randn(out, into), torch.randn(length, out))
        layers.append(tuple(t.to(dtype) for t in tensors))

    def call() -> None:
        for x, weight, dy in layers:
            linear(x, weight)
            linear(dy, weight.t())
            dy.t() @ x

    return call


def _kept_bytes(model: Megalodon, batch: Batch, dtype: str) -> int:
    """What autograd keeps from forward to backward, each storage once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(batch.tokens).sum()  # alive: no storage is freed and counted twice
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
def test_training(benchmark: Any, dtype: str, length: int) -> None:
    model = _model()
    error = _verify(model, dtype)
    optimizer, batch = make_optimizer(model, TrainOptions()), _batch(length)
    kept = _kept_bytes(model, batch, dtype) / length / len(model.layers)
    narrow = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    calls = {
        "ours": lambda: training_step(model, optimizer, batch, dtype, 1.0),
        "floor": _linear_layers(model, length, narrow),
    }
    _report(benchmark, "training", dtype, length, length, calls, error, kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_training(benchmark: Any, dtype: str) -> None:
    """Documents packed into one row, beside the same tokens as one document."""
    model, length = _model(), 8192
    error = _verify(model, dtype)
    optimizer, batch = make_optimizer(model, TrainOptions()), _batch(length)
    packed = _packed(batch)
    calls = {
        "ours": lambda: training_step(model, optimizer, packed, dtype, 1.0),
        "floor": lambda: training_step(model, optimizer, batch, dtype, 1.0),
    }
    _report(benchmark, "packed training", dtype, length, length, calls, error, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", POSITIONS)
def test_decoding(benchmark: Any, dtype: str, position: int) -> None:
    model = _model().eval()
    error = _verify(model, "float32")
    model = model.to(getattr(torch, dtype))
    state = model.init_state(1)
    with torch.inference_mode():
        model(_batch(600).tokens, state, inplace_state=True)
    chunk = model.config.chunk_size
    start = position // chunk * chunk + chunk // 2  # a chunk is on average half full
    decoder, tokens = model.decoder(state), torch.full((1, 1), 65)

    def steps() -> None:
        state.position.fill_(start)
        for _ in range(STEPS):
            decoder(tokens)

    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    read = clone_floor(nbytes)
    calls = {"ours": steps, "floor": lambda: [read() for _ in range(STEPS)]}
    _report(benchmark, "decoding", dtype, position, STEPS, calls, error, None)


def _report(
    benchmark: Any,
    what: str,
    dtype: str,
    at: int,
    tokens: int,
    calls: dict[str, Callable[[], Any]],
    error: float,
    kept: float | None,
) -> None:
    times = interleave(calls, rounds=9 if tokens <= 8192 else 3)
    benchmark.pedantic(calls["ours"], rounds=1, iterations=1)
    row = ModelRow(
        what=what,
        dtype=dtype,
        threads=torch.get_num_threads(),
        at=at,
        us_per_token=1e3 * statistics.median(times["ours"]) / tokens,
        floor_ratio=ratio(times["floor"], times["ours"]),
        error=error,
        kept_bytes=kept,
    )
    benchmark.extra_info.update(row.as_dict())
    model_rows.append(row)
    memory = "" if kept is None else f", {kept:.0f} bytes a token and layer kept for backward"
    lines.append(
        f"{what} {dtype:9}at {at:<8}{row.us_per_token:8.1f} us/token ({1e6 / row.us_per_token:6.0f}"
        f" tokens/s), {100 * row.floor_ratio:3.0f}% of floor{memory}"
    )
