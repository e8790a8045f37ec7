"""The CUDA kernels on CUDA tensors: what the executor and copied CPU tensors cannot show. Not yet
run on a GPU.
"""

import gc
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from backend import CUDA_OPS, ONLY
from checks import DTYPES, as_tuple, assert_close, copies, cotangents_of, gradients, to_float64
from small_model import random_tokens, small_model
from torch import Tensor

from megalodon_ops import _C, registry
from megalodon_ops._library import Maker, Op, Sample

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.cuda_version(),
    reason="needs a GPU and a build with CUDA kernels",
)

OPS = [op for op in registry if op.name in CUDA_OPS and (not ONLY or op.name in ONLY)]
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


def cotangents_for(op: Op, args: list[Any], device: str) -> list[Tensor | None]:
    if op.backward_schema is None:
        return []
    on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    return [None if c is None else c.to(device) for c in cotangents_of(op, on_cpu)]


def run(op: Op, args: list[Any], cotangents: list[Tensor | None] | None = None) -> list[Tensor]:
    """Outputs, then what was written to, then the gradients."""
    if cotangents is None:
        device = next(a for a in args if isinstance(a, Tensor)).device
        cotangents = cotangents_for(op, args, str(device))
    call = copies(args)
    with torch.no_grad():
        result = list(as_tuple(op.overload(*call)))
    inputs = op.schema.split("->")[0].split(",")
    result += [a for a, part in zip(call, inputs, strict=False) if "!" in part]
    if op.backward_schema is not None:
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
    cotangents = cotangents_for(op, args, "cuda")
    first = run(op, args, cotangents)
    different = torch.zeros((), dtype=torch.bool, device="cuda")  # read once: no waiting between
    for _ in range(REPEATS):
        for a, b in zip(run(op, args, cotangents), first, strict=True):
            different |= ((a != b) & ~((a != a) & (b != b))).any()
    assert not different


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
    for moved in places[1:]:  # a state on the CPU is one of them
        mixed = on_gpu(args)
        mixed[moved] = args[moved]
        what = rf"^{op.name}: {op.arguments[moved].name} must be on cuda:0 like \w+; got cpu$"
        with pytest.raises(ValueError, match=what):
            op.overload(*mixed)


def complaint(op: Op, args: list[Any]) -> tuple[type[Exception], str] | None:
    try:
        with torch.no_grad():
            op.overload(*args)
    except Exception as error:
        return type(error), str(error)
    return None


def bad_inputs(args: list[Any]) -> list[list[Any]]:
    """One argument wrong in each: its type, its dimensions, one size; a number that is none."""
    bad = []
    for i, value in enumerate(args):
        wrong: list[Any] = []
        if isinstance(value, Tensor):
            wrong = [
                value.to(torch.int16),
                value[None],
                torch.cat([value.flatten(), value.flatten()]),
            ]
            if value.ndim > 0 and value.shape[-1] > 0:
                wrong += [value[..., :-1].contiguous(), torch.cat([value, value], -1)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            wrong = [-1, 0]
        bad += [[*args[:i], w, *args[i + 1 :]] for w in wrong]
    return bad


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_bad_input_says_what_it_says_on_the_cpu(op: Op, sample: str) -> None:
    """Also what is no mistake on the CPU is none here."""
    for args in bad_inputs(args_of(op, sample)):
        said = complaint(op, copies(args))
        got = complaint(op, on_gpu(args))
        if got is not None:
            got = got[0], got[1].replace("cuda:0", "cpu")
        assert got == said


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_strides_change_nothing(op: Op, sample: str) -> None:
    if op.mutates:
        pytest.skip(f"{op.name} writes to its inputs, which must be contiguous")
    args = on_gpu(args_of(op, sample))
    strided = [
        torch.stack([a, a], dim=-1)[..., 0] if isinstance(a, Tensor) and a.ndim else a for a in args
    ]
    cotangents = cotangents_for(op, args, "cuda")
    for a, b in zip(run(op, strided, cotangents), run(op, args, cotangents), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


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


ROWWISE = ("layer_norm", "rms_norm", "silu_mul")


@pytest.mark.parametrize("name", [op.name for op in OPS if op.name in ROWWISE])
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


def _batch(op: Op, B: int, L: int, D: int) -> list[Any]:
    """Random bfloat16 inputs of B rows with B * L * D elements."""

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_()

    f32 = torch.float32
    if op.name == "cema":
        parameters = [normal(*s, dtype=f32) for s in ((D, 4), (D, 4), (D,), (D, 4, 2), (D,))]
        return [normal(B, L, D), *parameters]
    if op.name == "qk_norm_rope":
        scales = normal(2, D, dtype=f32), normal(2, D, dtype=f32)
        return [normal(B, L, D), *scales, D // 256, 512, 10000.0, None, 1e-5, None]
    q, k = normal(B, L, 1, 64) * 0.125, normal(B, L, 1, 64)
    return [q, k, normal(B, L, 1, D), 64]


LARGE_ROWS = ("cema", "chunk_attention", "qk_norm_rope")


@pytest.mark.parametrize("name", [op.name for op in OPS if op.name in LARGE_ROWS])
def test_more_than_two_to_the_31_elements_in_rows_of_a_batch(name: str) -> None:
    """The first, a middle and the last row are what they are alone, to rounding: a plan may differ
    with the size of the batch."""
    B, L, D = 1025, 1024, 2048
    if torch.cuda.mem_get_info()[0] < 8 * B * L * D * 2:
        pytest.skip("needs 35 GB of GPU memory")
    op = registry[name]
    args = _batch(op, B, L, D)
    with torch.no_grad():
        whole = as_tuple(op.overload(*args))[0]
        for row in (0, B // 2, B - 1):
            alone = [
                a[row : row + 1] if isinstance(a, Tensor) and a.shape[:2] == (B, L) else a
                for a in args
            ]
            wanted = as_tuple(op.overload(*alone))[0]
            torch.testing.assert_close(whole[row : row + 1], wanted, rtol=2e-2, atol=2e-2)


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
    assert type(y) is cp.ndarray and y.device == cp.asarray(x).device
    dx, dw = kernels.rms_norm_backward(y, cp.asarray(x), cp.asarray(w), rstd)  # with a workspace
    out = cp.empty_like(y), cp.empty_like(rstd)
    kernels.rms_norm(cp.asarray(x), cp.asarray(w), 1e-5, out=out)
stream.synchronize()
wanted, _ = kernels.rms_norm(x, w, 1e-5)
np.testing.assert_allclose(cp.asnumpy(y), wanted, rtol=1e-5, atol=1e-6)
np.testing.assert_array_equal(cp.asnumpy(out[0]), cp.asnumpy(y))
rest = kernels.rms_norm_backward(cp.asnumpy(y), x, w, cp.asnumpy(rstd))
for got, want in zip((dx, dw), rest):
    np.testing.assert_allclose(cp.asnumpy(got), want, rtol=1e-4, atol=1e-5)
for bad in (w, cp.asarray(w[:-1])):
    try:
        kernels.rms_norm(cp.asarray(x), bad)
    except ValueError as error:
        assert "rms_norm: weight must be" in str(error), error
    else:
        raise AssertionError("no error")
assert "torch" not in sys.modules
"""


def test_cupy_without_torch() -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("needs CuPy")
    result = subprocess.run(
        [sys.executable, "-c", CUPY],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "MEGALODON_TORCH": "0"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(bool(ONLY) and "block_step" not in ONLY, reason="a test of the whole model")
def test_decoder_replays_a_graph(dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype).cuda()
    tokens = random_tokens(2, 25).cuda()
    with torch.no_grad():
        _, state = model(tokens[:, :5], return_state=True)
        other = state.clone()
        decoder = model.decoder(state)
        assert decoder.prepared == "graph"
        for step in tokens[:, 5:].split(1, dim=1):
            torch.testing.assert_close(decoder(step), model(step, other, inplace_state=True))
    for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True):
        torch.testing.assert_close(a, b)
