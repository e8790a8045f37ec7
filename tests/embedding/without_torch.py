"""Checks of the kernels in a process without torch: ``python without_torch.py CHECK``.

``MEGALODON_TORCH=0`` leaves an installed torch alone; with ``BLOCK_TORCH=1`` torch cannot be
imported at all, as where it is not installed. tests/test_embedding.py runs every check both ways.
"""

import os
import sys
from collections.abc import Callable
from typing import Any


class _NoTorch:
    """One of Python's finders, in a world where torch is not installed."""

    def __init__(self, finder: Any):
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torch" or name.startswith("torch."):
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


if os.environ.get("BLOCK_TORCH"):
    sys.meta_path[:] = [_NoTorch(finder) for finder in sys.meta_path]

import numpy as np  # noqa: E402

import megalodon_ops  # noqa: E402
from megalodon_ops import _C, kernels  # noqa: E402


class OnlyDLPack:
    """An array that offers DLPack and nothing else."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __dlpack__(self, **keywords: Any) -> Any:
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def rms_norm(x: np.ndarray, weight: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What is wanted, in float64."""
    x = x.astype(np.float64)
    rstd = 1 / np.sqrt((x * x).mean(-1) + 1e-5)
    y = x * rstd[..., None]
    return (y if weight is None else y * (weight.astype(np.float64) + 1)), rstd


def example(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    got: Exception | None = None
    try:
        call()
    except kind as error:
        got = error
    assert message in str(got), f"got {got!r}, wanted {kind.__name__} with {message!r}"


def check_import() -> None:
    assert not megalodon_ops.HAS_TORCH
    assert megalodon_ops.MegalodonConfig is not None
    raises(AttributeError, "torch is not in use", lambda: megalodon_ops.Megalodon)
    for op in megalodon_ops.registry:
        assert callable(getattr(kernels, op.name))


def check_numbers() -> None:
    x, weight = example(3, 5, 33), example(33)
    y, rstd = kernels.rms_norm(x, weight)
    assert type(y) is np.ndarray
    assert (y.dtype, y.shape, rstd.dtype, rstd.shape) == (
        np.float32,
        (3, 5, 33),
        np.float32,
        (3, 5),
    )
    np.testing.assert_allclose(y, rms_norm(x, weight)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rstd, rms_norm(x)[1], rtol=1e-5)
    dx, dweight = kernels.rms_norm_backward(dy=y, x=x, weight=weight, rstd=rstd)
    assert (dx.shape, dweight.shape) == (x.shape, weight.shape)


def check_dtypes() -> None:
    dtypes = [(np.float16, 2e-3), (np.float32, 1e-5), (np.float64, 1e-12)]
    try:
        import ml_dtypes

        dtypes.append((ml_dtypes.bfloat16, 2e-2))
    except ImportError:
        pass
    for dtype, tolerance in dtypes:
        x = example(4, 19, dtype=dtype)
        y, rstd = kernels.rms_norm(x)
        assert y.dtype == x.dtype
        assert rstd.dtype == (np.float64 if dtype is np.float64 else np.float32)
        wanted = rms_norm(x)[0]
        np.testing.assert_allclose(y.astype(np.float64), wanted, rtol=tolerance, atol=tolerance)


def check_out() -> None:
    x = example(4, 19)
    y, rstd = np.full_like(x, np.nan), np.full(4, np.nan, np.float32)
    result = kernels.rms_norm(x, out=(y, rstd))
    assert result[0] is y
    assert result[1] is rstd
    np.testing.assert_allclose(y, rms_norm(x)[0], rtol=1e-5, atol=1e-6)
    raises(TypeError, "rms_norm_forward: out must be", lambda: kernels.rms_norm(x, out=(y,)))
    raises(TypeError, "rms_norm_forward: out must be", lambda: kernels.rms_norm(x, out=y))
    raises(
        ValueError,
        "rms_norm: y must be",
        lambda: kernels.rms_norm(x, out=(np.empty((4, 18), np.float32), rstd)),
    )
    raises(
        TypeError,
        "rms_norm: y must be",
        lambda: kernels.rms_norm(x, out=(np.empty((4, 19), np.float64), rstd)),
    )
    raises(ValueError, "rms_norm: y must be", lambda: kernels.rms_norm(x, out=(y.T.copy().T, rstd)))
    y.flags.writeable = False
    raises(ValueError, "writeable", lambda: kernels.rms_norm(x, out=(y, rstd)))
    raises(ValueError, "writeable", lambda: kernels.rms_norm(x, out=(OnlyDLPack(y), rstd)))


def check_layouts() -> None:
    x = example(6, 38)
    views = [x[:, ::2], x[::2], x[::-1], x.T, np.broadcast_to(x[0], (5, 38)), x[:0], x[:, :0]]
    for view in views:
        before = view.copy()
        np.testing.assert_array_equal(kernels.rms_norm(view)[0], kernels.rms_norm(before)[0])
        np.testing.assert_array_equal(view, before)
    readonly = x.copy()
    readonly.flags.writeable = False
    np.testing.assert_array_equal(kernels.rms_norm(readonly)[0], kernels.rms_norm(x)[0])


def check_dlpack() -> None:
    x, weight = example(6, 38), example(38)
    y, rstd = kernels.rms_norm(OnlyDLPack(x), OnlyDLPack(weight))
    np.testing.assert_array_equal(y, kernels.rms_norm(x, weight)[0])
    out = np.empty_like(x)
    kernels.rms_norm(OnlyDLPack(x), OnlyDLPack(weight), out=(OnlyDLPack(out), rstd))
    np.testing.assert_array_equal(out, y)
    raises(ValueError, "contiguous", lambda: kernels.rms_norm(OnlyDLPack(x[:, ::2])))


def check_errors() -> None:
    x = example(4, 19)
    raises(
        ValueError,
        "rms_norm: weight must be [D] with D = 19 (x.shape[1]); got [18]",
        lambda: kernels.rms_norm(x, example(18)),
    )
    raises(TypeError, "rms_norm: x must be", lambda: kernels.rms_norm(x.astype(np.int32)))
    raises(TypeError, "rms_norm: x must be", lambda: kernels.rms_norm(x.astype(np.complex64)))
    raises(TypeError, "native byte order", lambda: kernels.rms_norm(x.astype(">f4")))
    raises(ValueError, "rms_norm: eps must be", lambda: kernels.rms_norm(x, eps=-1.0))
    raises(TypeError, "got list", lambda: kernels.rms_norm([1.0, 2.0]))
    raises(TypeError, "rms_norm: missing a required argument", lambda: kernels.rms_norm())
    raises(TypeError, "rms_norm: got an unexpected", lambda: kernels.rms_norm(x, epsilon=1.0))


def check_threads() -> None:
    """The pool is ours: as many threads as asked for, and the same numbers with any number."""

    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    x = example(512, 1024)
    assert _C.num_threads() >= 1
    _C.set_num_threads(1)
    before = tasks()
    wanted = kernels.rms_norm(x)[0]
    assert tasks() == before
    for count in (3, 2, 1):
        _C.set_num_threads(count)
        assert _C.num_threads() == count
        for _ in range(20):
            np.testing.assert_array_equal(kernels.rms_norm(x)[0], wanted)
        assert tasks() == before + count - 1
    for bad in (0, -1, 5000):
        raises(ValueError, "set_num_threads: count must be", lambda n=bad: _C.set_num_threads(n))
    assert _C.num_threads() == 1


def check_concurrent_calls() -> None:
    """Several threads call while another changes the size of the pool."""
    from concurrent.futures import ThreadPoolExecutor

    x = example(256, 1024)
    wanted = kernels.rms_norm(x)[0]
    with ThreadPoolExecutor(5) as executor:
        calls = [executor.submit(kernels.rms_norm, x) for _ in range(100)]
        for count in (1, 2, 3, 4) * 5:
            executor.submit(_C.set_num_threads, count).result()
    for call in calls:
        np.testing.assert_array_equal(call.result()[0], wanted)


def check_fork() -> None:
    """A child made after the pool was used has no workers; it must make its own, not wait."""
    x = example(512, 1024)
    _C.set_num_threads(3)
    wanted = kernels.rms_norm(x)[0]
    child = os.fork()
    if child == 0:
        same = np.array_equal(kernels.rms_norm(x)[0], wanted)
        workers = len(os.listdir("/proc/self/task"))
        os._exit(0 if same and workers == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    np.testing.assert_array_equal(kernels.rms_norm(x)[0], wanted)


CHECKS = [name.removeprefix("check_") for name in globals() if name.startswith("check_")]

if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
    assert not any(name == "torch" or name.startswith("torch.") for name in sys.modules)
