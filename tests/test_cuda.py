"""The CUDA kernels on CUDA tensors: what the executor and copied CPU tensors cannot show."""

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from backend import CUDA_OPS
from checks import DTYPES, as_tuple, assert_close, copies, cotangents_of, gradients, to_float64
from torch import Tensor

from megalodon_ops import _C, registry
from megalodon_ops._library import Maker, Op, Sample

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.cuda_version(),
    reason="needs a GPU and a build with CUDA kernels",
)

OPS = [op for op in registry if op.name in CUDA_OPS]
REPEATS = 250


def samples(op: Op, dtype: torch.dtype = torch.float32) -> list[Sample]:
    return list(op.samples(Maker(dtype)))


CASES = [
    pytest.param(op, sample.name, id=f"{op.name}-{sample.name.replace(' ', '_')}")
    for op in OPS
    for sample in samples(op)
]


def args_of(op: Op, name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    if str(dtype).removeprefix("torch.") not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    return copies(next(s.args for s in samples(op, dtype) if s.name == name))


def on_gpu(values: Any, device: str = "cuda") -> list[Any]:
    return [v.detach().to(device) if isinstance(v, Tensor) else v for v in values]


def run(op: Op, args: list[Any]) -> list[Tensor]:
    """Outputs, then what was written to, then the gradients."""
    call = copies(args)
    with torch.no_grad():
        result = list(as_tuple(op.overload(*call)))
    inputs = op.schema.split("->")[0].split(",")
    result += [a for a, part in zip(call, inputs, strict=False) if "!" in part]
    if op.backward_schema is not None:
        cotangents = [
            None if c is None else c.to(next(a for a in args if isinstance(a, Tensor)).device)
            for c in cotangents_of(op, [a.cpu() if isinstance(a, Tensor) else a for a in args])
        ]
        result += [g for g in gradients(op.overload, args, cotangents) if g is not None]
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_through_torch(op: Op, sample: str, dtype: torch.dtype) -> None:
    """Dispatch, autograd and the CPU kernel as the other opinion; results stay on the device."""
    args = args_of(op, sample, dtype)
    got, plain, exact = run(op, on_gpu(args)), run(op, args), run(op, to_float64(args))
    # Twice: the bound is meant for the plain reference, and the CPU kernel is better than that.
    for i, (a, b, c) in enumerate(zip(got, exact, plain, strict=True)):
        assert a.device.type == "cuda"
        assert_close(f"{op.name}: result {i}", a.cpu(), b, c, 2 * op.tolerance)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_repeats_are_bit_equal(op: Op, sample: str) -> None:
    args = on_gpu(args_of(op, sample))
    first = run(op, args)
    for _ in range(REPEATS):
        for a, b in zip(run(op, args), first, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_graph_capture_and_replay_with_new_inputs(op: Op, sample: str) -> None:
    args, others = on_gpu(args_of(op, sample)), on_gpu(op_samples_of_another_seed(op, sample))
    call = copies(args)
    with torch.no_grad():
        op.overload(*call)  # modules are loaded before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = as_tuple(op.overload(*call))
        for mine, new in zip(call, others, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        graph.replay()
        wanted = as_tuple(op.overload(*copies(others)))
    for a, b in zip(outputs, wanted, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def op_samples_of_another_seed(op: Op, name: str) -> list[Any]:
    return list(next(s.args for s in op.samples(Maker(torch.float32, seed=1)) if s.name == name))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_current_stream_is_used(op: Op) -> None:
    """A long copy before it on the same stream: a kernel on another stream would read old data."""
    args = on_gpu(samples(op)[0].args)
    wanted = run(op, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.full_like(a, 7) if isinstance(a, Tensor) else a for a in args]
        torch.cuda._sleep(20_000_000)
        for mine, value in zip(late, args, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(value)
        with torch.no_grad():
            got = as_tuple(op.overload(*late))
    stream.synchronize()
    for a, b in zip(got, wanted, strict=False):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_mixed_devices_are_refused(op: Op, sample: str) -> None:
    args = args_of(op, sample)
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    for moved in places[1:]:
        mixed = on_gpu(args)
        mixed[moved] = args[moved]
        with pytest.raises((ValueError, RuntimeError), match="device"):
            op.overload(*mixed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_second_device(op: Op) -> None:
    args = samples(op)[0].args
    wanted = run(op, on_gpu(args))
    torch.cuda.set_device(0)
    got = run(op, on_gpu(args, "cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, wanted, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num())


@pytest.mark.parametrize("name", sorted({"rms_norm", "silu_mul", "layer_norm"} & set(CUDA_OPS)))
def test_more_than_two_to_the_31_elements(name: str) -> None:
    rows, width = 2**20 + 3, 2048
    if torch.cuda.mem_get_info()[0] < 3 * rows * width * 2:
        pytest.skip("needs 13 GB of GPU memory")
    op = registry[name]
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    rest = [None] * (len(op.arguments) - 1) if name != "silu_mul" else [None]
    if name != "silu_mul":
        rest[-1] = 1e-5  # eps
    with torch.no_grad():
        y = as_tuple(op.overload(x, *rest))[0]
        for part in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)):
            assert torch.equal(y[part], as_tuple(op.overload(x[part].clone(), *rest))[0])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_out_of_memory_is_torchs_error_and_leaks_nothing(op: Op) -> None:
    args = on_gpu(samples(op)[0].args)
    gc.collect()
    before = torch.cuda.memory_allocated()
    huge = torch.zeros((), device="cuda").expand(1, 2**43, 8)
    place = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
    if op.name == "cema_kernel":
        args[-1] = 2**43
    else:
        args[place] = huge
    with pytest.raises(torch.OutOfMemoryError):
        op.overload(*args)
    del args, huge
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


CUPY = """
import sys
import cupy as cp
import numpy as np
from megalodon_ops import kernels
rng = np.random.default_rng(0)
x, w = rng.standard_normal((37, 75), np.float32), rng.standard_normal(75, np.float32)
stream = cp.cuda.Stream(non_blocking=True)
with stream:
    y, rstd = kernels.rms_norm(cp.asarray(x), cp.asarray(w), 1e-5)
    out = cp.empty_like(y), cp.empty_like(rstd)
    kernels.rms_norm(cp.asarray(x), cp.asarray(w), 1e-5, out=out)
stream.synchronize()
wanted, _ = kernels.rms_norm(x, w, 1e-5)
np.testing.assert_allclose(cp.asnumpy(y), wanted, rtol=1e-5, atol=1e-6)
np.testing.assert_array_equal(cp.asnumpy(out[0]), cp.asnumpy(y))
assert "torch" not in sys.modules
"""


def test_cupy_without_torch() -> None:
    pytest.importorskip("cupy")
    result = subprocess.run(
        [sys.executable, "-c", CUPY],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "MEGALODON_TORCH": "0"},
    )
    assert result.returncode == 0, result.stderr
