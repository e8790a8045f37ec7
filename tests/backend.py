"""The kernels under test: those of the installed package, or the CUDA kernels on CPU tensors: with
MEGALODON_TEST_BACKEND=simt, simt_asan or simt_race run by the host executor (docs/executor.md),
with cuda on copies on the GPU.

Importing this module before ``megalodon_ops`` puts the extension module in place.
"""

import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BACKEND = os.environ.get("MEGALODON_TEST_BACKEND", "")
SIMT_BUILD = Path(os.environ.get("MEGALODON_SIMT_BUILD", ROOT / "build-simt"))
# Without a room's further files, such as cema_mma.cu.
CUDA_OPS = sorted(
    path.stem
    for path in ROOT.glob("cuda/ops/*.cu")
    if (ROOT / "python/megalodon_ops/ops" / f"{path.stem}.py").exists()
)
# The ops whose tests run, where not all: gpu_check.py has a process per op.
ONLY = os.environ.get("MEGALODON_TEST_OPS", "").split()
# For tests of the elements of a tensor: a call does not wait for the GPU to read them.
values_are_read = pytest.mark.skipif(BACKEND == "cuda", reason="values on a GPU are not read")


def without_cuda_kernel(error: BaseException) -> str | None:
    """What to say of a test that failed because an op has no cuda/ops/{op}.cu yet."""
    cause: BaseException | None = error
    while cause is not None:
        said = re.search(r"(\w+?)(_backward)?: a CUDA kernel is not implemented yet", str(cause))
        if said and said[1] not in CUDA_OPS:
            return said[0]
        cause = cause.__cause__ or cause.__context__
    return None


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("megalodon_ops._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _only(paths: Iterable[Path], what: str) -> Path:
    found = [*paths]
    if len(found) != 1:
        raise ImportError(f"{what}; found {[str(path) for path in found]}")
    return found[0]


def _to_gpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_gpu, value))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    if value.is_contiguous():
        return value.cuda()
    once = value  # an expanded tensor's memory, and the strides of any other
    for axis in range(value.ndim):
        if value.stride(axis) == 0 and value.shape[axis] > 1:
            once = once.narrow(axis, 0, 1)
    moved = torch.empty_strided(once.shape, once.stride(), dtype=value.dtype, device="cuda")
    return moved.copy_(once.detach()).expand(value.shape)


def _from_gpu(result: Any, like: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_from_gpu(r, like) for r in result)
    cpu = result.cpu()
    return cpu.numpy() if isinstance(like, np.ndarray) else cpu


def _on_gpu(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, run on copies on the GPU; what it has written is copied back."""

    def call(*args: Any) -> Any:
        from megalodon_ops import registry

        moved = tuple(map(_to_gpu, args))
        result = kernel(*moved)
        first = next((a for a in args if isinstance(a, Tensor | np.ndarray)), None)
        op = name.removesuffix("_forward").removesuffix("_backward")
        inputs = registry[op].schema.split("->")[0].split(",")
        written = [(a, m) for a, m, part in zip(args, moved, inputs) if "!" in part]  # noqa: B905
        if len(args) > 1 and isinstance(args[-1], tuple):  # out
            written += zip(args[-1], moved[-1], strict=True)
        for mine, gpu in written:
            (torch.from_numpy(mine) if isinstance(mine, np.ndarray) else mine).copy_(gpu)
        if written and isinstance(args[-1], tuple):
            return args[-1] if len(args[-1]) > 1 else args[-1][0]
        on_cpu = first is None or isinstance(first, np.ndarray) or first.device.type == "cpu"
        return _from_gpu(result, first) if on_cpu else result

    return call


def _gpu_module() -> ModuleType:
    package = importlib.util.find_spec("megalodon_ops")
    assert package is not None
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    # Of this Python: another one's may lie beside it.
    files = (
        f / f"_C{suffix}" for f in folders for suffix in importlib.machinery.EXTENSION_SUFFIXES
    )
    real = _load(_only((f for f in files if f.exists()), "wanted one extension"))
    module = ModuleType("megalodon_ops._C")
    for name in dir(real):
        function = getattr(real, name)
        is_kernel = name.endswith(("_forward", "_backward"))
        setattr(module, name, _on_gpu(name, function) if is_kernel else function)
    return module


if BACKEND == "cuda":
    sys.modules["megalodon_ops._C"] = _gpu_module()
elif BACKEND:
    what = f"wanted one {BACKEND} extension in {SIMT_BUILD} (cmake --build --preset simt)"
    sys.modules["megalodon_ops._C"] = _load(_only((SIMT_BUILD / BACKEND).glob("_C.*"), what))
