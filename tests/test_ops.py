"""What holds for every op of the registry: values, gradients, registration, layout, determinism."""

from typing import Any

import numpy as np
import pytest
import torch
from backend import BACKEND, CUDA_OPS, ONLY
from checks import (
    DTYPES,
    as_tuple,
    check_forward,
    check_gradients,
    copies,
    cotangents_of,
    gradients,
    is_float,
)
from torch import Tensor

from megalodon_ops import _C, kernels, registry
from megalodon_ops._library import Maker, Op, Sample

OPS = [op for op in registry if not ONLY or op.name in ONLY]


def samples(op: Op, dtype: torch.dtype) -> list[Sample]:
    return list(op.samples(Maker(dtype)))


CASES = [
    pytest.param(op, sample.name, id=f"{op.name}-{sample.name.replace(' ', '_')}")
    for op in OPS
    for sample in samples(op, torch.float32)
]


def args_of(op: Op, name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    if str(dtype).removeprefix("torch.") not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    return next(sample.args for sample in samples(op, dtype) if sample.name == name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_forward_matches_reference(isa: str, op: Op, sample: str, dtype: torch.dtype) -> None:
    check_forward(op, args_of(op, sample, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_gradients_match_reference(isa: str, op: Op, sample: str, dtype: torch.dtype) -> None:
    if op.backward_schema is None:
        pytest.skip(f"{op.name} is for inference")
    check_gradients(op, args_of(op, sample, dtype))


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_gradcheck(op: Op, sample: str) -> None:
    if op.backward_schema is None:
        pytest.skip(f"{op.name} is for inference")
    args = copies(args_of(op, sample, torch.float64), requires_grad=True)
    assert torch.autograd.gradcheck(
        op.overload, args, nondet_tol=0.0, fast_mode=True, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_opcheck(op: Op, sample: str) -> None:
    """Schema, autograd registration, fake and AOT dispatch; forward and backward op."""
    args = args_of(op, sample, torch.float32)
    needs_grad = op.backward_schema is not None
    torch.library.opcheck(op.overload, tuple(copies(args, requires_grad=needs_grad)))
    for call in backward_calls(op, args):
        backward = getattr(torch.ops.megalodon, f"{op.name}_backward").default
        torch.library.opcheck(backward, tuple(copies(call)))


def backward_calls(op: Op, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments with which the op's gradient formula calls its backward op."""
    if op.backward_schema is None:
        return []
    calls = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.name() == f"megalodon::{op.name}_backward":
                calls.append(tuple(args))
            return func(*args, **(kwargs or {}))

    cotangents = cotangents_of(op, args)
    with Recorder():
        gradients(op.overload, args, cotangents)
    return calls


def strided(value: Any) -> Any:
    """The same numbers in a tensor that is not contiguous."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    doubled = torch.stack([value, value], dim=-1)
    return doubled[..., 0]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_layout_changes_nothing(op: Op, sample: str) -> None:
    args = args_of(op, sample, torch.float32)
    if op.mutates:
        pytest.skip(f"{op.name} writes to its inputs, which must be contiguous")
    with torch.no_grad():
        wanted = as_tuple(op.overload(*args))
        got = as_tuple(op.overload(*[strided(a) for a in args]))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if not op.backward_schema:
        return
    cotangents = cotangents_of(op, args)
    expanded = [
        None if c is None else torch.ones((), dtype=c.dtype).expand(c.shape) for c in cotangents
    ]
    full = [None if c is None else torch.ones_like(c) for c in cotangents]
    for a, b in zip(
        gradients(op.overload, args, expanded), gradients(op.overload, args, full), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_runs_are_bit_equal(op: Op, sample: str) -> None:
    args = args_of(op, sample, torch.float32)
    cotangents = cotangents_of(op, args) if op.backward_schema else []
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                result = list(as_tuple(op.overload(*copies(args))))
            if op.backward_schema:
                result += gradients(op.overload, args, cotangents)
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


GUARD = 64


def guarded(like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An array full of NaN (or of the largest number) between two guard zones, and its whole
    memory.
    """
    memory = np.zeros(like.size + 2 * GUARD, dtype=like.dtype)
    memory[:] = np.nan if like.dtype.kind == "f" else np.iinfo(like.dtype).max
    return memory[GUARD : GUARD + like.size].reshape(like.shape), memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_numpy_kernels_equal_torch_and_write_every_output(
    isa: str, op: Op, sample: str, dtype: torch.dtype
) -> None:
    """Outputs start as NaN between guard zones: every element is written, and nothing beyond."""
    args = args_of(op, sample, dtype)
    calls = [
        (op.name, tuple(args)),
        *((f"{op.name}_backward", c) for c in backward_calls(op, args)),
    ]
    for name, call in calls:
        with torch.no_grad():
            wanted = as_tuple(getattr(torch.ops.megalodon, name).default(*copies(call)))
        arrays = [a.detach().numpy().copy() if isinstance(a, Tensor) else a for a in call]
        out, memory = zip(*[guarded(w.numpy()) for w in wanted], strict=True)
        getattr(kernels, name)(*arrays, out=out)
        for got, whole, want in zip(out, memory, wanted, strict=True):
            np.testing.assert_array_equal(got, want.numpy())
            untouched = np.concatenate([whole[:GUARD], whole[GUARD + want.numel() :]])
            assert np.isnan(untouched).all() if whole.dtype.kind == "f" else untouched.min() > 2**30
        arrays = [a.detach().numpy().copy() if isinstance(a, Tensor) else a for a in call]
        for got, want in zip(as_tuple(getattr(kernels, name)(*arrays)), wanted, strict=True):
            np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_dtype_and_missing_arguments_are_type_errors(op: Op) -> None:
    first = next(
        i
        for i, a in enumerate(args_of(op, samples(op, torch.float32)[0].name, torch.float32))
        if is_float(a)
    )
    args = list(samples(op, torch.float32)[0].args)
    args[first] = args[first].to(torch.int16)
    with pytest.raises(
        TypeError, match=rf"{op.name}: {op.arguments[first].name} must be .*; got int16"
    ):
        op.overload(*args)
    with pytest.raises(TypeError, match=f"{op.name}: .*{op.arguments[0].name}"):
        getattr(kernels, op.name)()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_more_than_there_is_memory_for_is_an_error(op: Op) -> None:
    """2^46 elements: an expanded tensor costs nothing until it, or its output, is allocated."""
    args = list(samples(op, torch.float32)[0].args)
    huge = torch.zeros(()).expand(1, 2**43, 8)
    if op.name == "cema_kernel":
        args[-1] = 2**43
    else:
        args[next(i for i, a in enumerate(args) if is_float(a))] = huge
    with pytest.raises(RuntimeError, match="allocate"):
        op.overload(*args)


@pytest.mark.skipif(not BACKEND, reason="needs CUDA kernels on CPU tensors")
@pytest.mark.parametrize("op", [o for o in OPS if o.name not in CUDA_OPS], ids=lambda op: op.name)
def test_an_op_without_a_cuda_kernel_says_so(op: Op) -> None:
    args = samples(op, torch.float32)[0].args
    with pytest.raises(NotImplementedError, match=f"^{op.name}: a CUDA kernel is not implemented"):
        op.overload(*args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_meta_tensors_give_shapes(op: Op) -> None:
    for sample in samples(op, torch.bfloat16):
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in sample.args]
        with torch.no_grad():
            wanted = as_tuple(op.overload(*copies(sample.args)))
            got = as_tuple(op.overload(*meta))
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in wanted]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_one_tensor_on_meta_is_an_error(op: Op) -> None:
    """The dispatcher would take the fake, which computes nothing."""
    args = samples(op, torch.float32)[-1].args
    calls = [(op.name, args), *((f"{op.name}_backward", c) for c in backward_calls(op, args))]
    for name, call in calls:
        overload = getattr(torch.ops.megalodon, name).default
        names = [argument.name for argument in overload._schema.arguments]
        first, *places = [i for i, a in enumerate(call) if isinstance(a, Tensor)]
        for i, other, device in [(first, places[0], "meta"), *((i, i, "cpu") for i in places)]:
            mixed = copies(call)
            mixed[i] = mixed[i].to("meta")
            wanted = f"{name}: {names[other]} must be on {device} like {names[first]}; got "
            with torch.no_grad(), pytest.raises(ValueError, match=f"^{wanted}"):
                overload(*mixed)


def test_isa_can_be_forced_and_is_validated() -> None:
    before = _C.isa()
    try:
        _C.set_isa("portable")
        assert _C.isa() == "portable"
        with pytest.raises(ValueError, match=r"set_isa: name must be .*; got sse9"):
            _C.set_isa("sse9")
    finally:
        _C.set_isa(before)
