"""GPU arrays in a process without a GPU: a clear error, never a crash. The arrays are NumPy's whose
DLPack capsule says that they lie on a GPU; with a stand-in for CuPy.
"""

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend import BACKEND

from megalodon_ops import _C, kernels

pytestmark = pytest.mark.skipif(
    bool(BACKEND) or torch.cuda.is_available(), reason="a real GPU would be given host memory"
)

CUDA, ROCM = 2, 10
NO_GPU = r"^rms_norm: CUDA: " if _C.cuda_version() else "this build has no CUDA kernels"

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
DEVICE = 32 + 8  # of a DLManagedTensorVersioned: 32 bytes, then DLTensor's data and device


class Claims:
    """An array that claims to lie on this device."""

    def __init__(self, array: np.ndarray, index: int = 0, kind: int = CUDA):
        self.array, self.device = array, (kind, index)
        self.dtype = array.dtype
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        capsule = self.array.__dlpack__(max_version=(1, 0))
        address = _pointer(capsule, b"dltensor_versioned")
        (ctypes.c_int32 * 2).from_address(address + DEVICE)[:] = self.device
        return capsule


def claims(*shape: int, index: int = 0, kind: int = CUDA) -> Claims:
    return Claims(np.zeros(shape, np.float32), index, kind)


def test_outputs_need_cupy() -> None:
    if "cupy" in sys.modules:
        pytest.skip("CuPy is here")
    with pytest.raises(ValueError, match="a Claims on a GPU needs CuPy, to allocate outputs"):
        kernels.rms_norm(claims(2, 8))


def test_given_outputs_the_missing_gpu_is_named() -> None:
    x = claims(2, 8)
    with pytest.raises(RuntimeError, match=NO_GPU):
        kernels.rms_norm(x, out=(claims(2, 8), claims(2)))
    assert x.streams == [1]  # its work is done before what comes on the default stream


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (claims(2, 8), np.zeros(8, np.float32), "weight must be on cuda:0 like x; got cpu"),
        (np.zeros((2, 8), np.float32), claims(8), "weight must be on cpu like x; got cuda:0"),
        (claims(2, 8), claims(8, index=1), "weight must be on cuda:0 like x; got cuda:1"),
        (
            claims(2, 8, kind=ROCM),
            None,
            "x must be on the CPU or a CUDA device; got device type 10",
        ),
    ],
    ids=["cpu_weight", "gpu_weight", "two_gpus", "another_maker"],
)
def test_mixed_devices(x: Any, weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rms_norm: {message}"):
        kernels.rms_norm(x, weight)


def test_outputs_on_another_device() -> None:
    out = np.zeros((2, 8), np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="y must be on cuda:0 like x; got cpu"):
        kernels.rms_norm(claims(2, 8), out=out)
    with pytest.raises(ValueError, match="y must be on cpu like x; got cuda:0"):
        kernels.rms_norm(np.zeros((2, 8), np.float32), out=(claims(2, 8), claims(2)))


def test_a_state_on_the_cpu_and_wrong_shapes() -> None:
    parameters = [claims(8, 4), claims(8, 4), claims(8), claims(8, 4, 2), claims(8)]
    with pytest.raises(ValueError, match="h0 must be on cuda:0 like x; got cpu"):
        kernels.cema(claims(1, 3, 8), *parameters, np.zeros((1, 8, 4, 2), np.float32))
    with pytest.raises(ValueError, match=r"weight must be \[D\] with D = 8 .*; got \[7\]"):
        kernels.rms_norm(claims(2, 8), claims(7))


def test_not_contiguous() -> None:
    with pytest.raises(ValueError, match="a Claims must be contiguous"):
        kernels.rms_norm(Claims(np.zeros((4, 8), np.float32)[:, ::2]))


class FakeArray(Claims):
    """In CuPy's place."""

    __module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the binding asks CuPy for, in order."""
    asked: list[Any] = []
    current = [0]

    class Device:
        def __init__(self, index: int):
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: Any) -> None:
            current[0] = self.before

    def empty(shape: tuple[int, ...], dtype: Any) -> FakeArray:
        if shape == (99,):
            raise MemoryError("out of memory")
        asked.append((shape, np.dtype(dtype).name, current[0]))
        return FakeArray(np.empty(shape, dtype), current[0])

    def stream(index: int) -> Any:
        asked.append(f"stream of {index}")
        return SimpleNamespace(ptr=0)

    module, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    module.cuda, module.empty, cuda.Device, cuda.get_current_stream = cuda, empty, Device, stream
    module.float32, module.uint8 = np.float32, np.uint8
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    asked.append(current)
    return asked


def test_cupy_allocates_on_the_arrays_device_and_gives_its_stream(cupy: list[Any]) -> None:
    x = FakeArray(np.zeros((2, 8), np.float32), 1)
    with pytest.raises(RuntimeError, match=NO_GPU):
        kernels.rms_norm(x)
    assert cupy[1:] == [((2, 8), "float32", 1), ((2,), "float32", 1), "stream of 1"]
    assert x.streams == [-1]  # no waiting: the kernel goes onto that stream


def test_cupys_device_is_given_back_after_an_error(cupy: list[Any]) -> None:
    with pytest.raises(MemoryError, match="out of memory"):
        kernels.rms_norm(FakeArray(np.zeros((99,), np.float32), 1))
    assert cupy[0] == [0]
