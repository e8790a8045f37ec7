"""What kernels on arrays make of layouts and lazy views that a kernel cannot read as they are."""

import numpy as np
import pytest
import torch
from backend import BACKEND
from numpy.typing import NDArray

from megalodon_ops import kernels

on_arrays_themselves = pytest.mark.skipif(BACKEND == "cuda", reason="copies are on the GPU")
Array = NDArray[np.float32]


def column(values: Array) -> Array:
    """The values as a column of a structured array: 5 bytes lie between two of them."""
    records = np.zeros(values.shape, dtype=[("value", "f4"), ("flag", "u1")])
    records["value"] = values
    return records["value"]


def askew(values: Array) -> Array:
    """The values one byte behind where numbers of their size may lie."""
    memory = np.zeros(values.nbytes + 1, np.uint8)
    view = memory[1:].view(np.float32).reshape(values.shape)
    view[:] = values
    return view


@pytest.mark.parametrize("layout", [column, askew])
def test_inputs_that_are_not_aligned_to_their_elements_are_copied(layout: type) -> None:
    x, weight = np.random.default_rng(0).standard_normal((2, 3, 8), dtype=np.float32)
    wanted = kernels.rms_norm(x, weight[0])
    for got in (
        kernels.rms_norm(x, layout(weight[0])),
        kernels.rms_norm(layout(x), weight[0]),
        kernels.rms_norm(layout(x[:1]), weight[0]),
    ):
        np.testing.assert_array_equal(got[0], wanted[0][: len(got[0])])


@on_arrays_themselves
@pytest.mark.parametrize("layout", [column, askew])
def test_outputs_that_are_not_aligned_to_their_elements_are_refused(layout: type) -> None:
    x = np.ones((2, 8), np.float32)
    y = layout(np.zeros_like(x))
    with pytest.raises(ValueError, match=r"^rms_norm.*: an array that is written to must be align"):
        kernels.rms_norm(x, out=(y, np.zeros(2, np.float32)))
    assert not y.any()


def test_lazily_negated_inputs_are_resolved() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    got = kernels.rms_norm(torch._neg_view(x), torch._neg_view(weight))
    assert torch.equal(got[0], kernels.rms_norm(-x, -weight)[0])


def test_lazily_negated_outputs_are_refused() -> None:
    x, y = torch.ones(2, 8), torch.zeros(2, 8)
    message = "rms_norm: y must not be lazily negated, since it is written to; got such a view"
    with pytest.raises(ValueError, match=message):
        kernels.rms_norm(x, out=(torch._neg_view(y), torch.zeros(2)))
    assert not y.any()


@pytest.mark.parametrize("call", [kernels, torch.ops.megalodon], ids=["kernels", "torch"])
@pytest.mark.parametrize("grad", [False, True])
def test_lazily_negated_caches_are_refused(call: object, grad: bool) -> None:
    caches = torch.zeros(2, 1, 4, 1, 8)
    args = *torch.ones(3, 1, 1, 8), torch._neg_view(caches[0]), caches[1], torch.tensor([0]), 4
    message = "chunk_attention_step: k_cache must not be lazily negated, since it is written to"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        call.chunk_attention_step(*args)  # type: ignore[attr-defined]
    assert not caches.any()


@on_arrays_themselves
def test_tensors_without_memory_are_refused() -> None:
    """torch has zeros that are none until someone looks."""
    with pytest.raises(ValueError, match=r"^rms_norm.*: a Tensor must have memory; got"):
        kernels.rms_norm(torch._efficientzerotensor((2, 8)))
    assert kernels.rms_norm(torch.empty(0, 8))[0].shape == (0, 8)


@on_arrays_themselves
def test_outputs_that_share_memory_are_refused() -> None:
    x, memory = np.ones((4, 8), np.float32), np.zeros(34, np.float32)
    with pytest.raises(ValueError, match=r"^rms_norm: rstd must be apart in memory from y, which"):
        kernels.rms_norm(x, out=(memory[:32].reshape(4, 8), memory[30:]))
    kernels.rms_norm(x[:, :7], out=(memory[:28].reshape(4, 7), memory[28:32]))
