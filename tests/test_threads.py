"""With torch, its thread pool is the only one: set_num_threads holds, and any thread may call."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megalodon_ops import _C, kernels

TASKS = Path("/proc/self/task")


def run(code: str) -> None:
    """In a fresh process, because threads once made stay."""
    head = "import os, torch, megalodon_ops\nfrom megalodon_ops import _C, kernels\n"
    head += "tasks = lambda: len(os.listdir('/proc/self/task'))\n"
    result = subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_set_num_threads_is_obeyed_and_no_thread_is_ours(threads: int) -> None:
    """We start as many threads as torch would, and a torch op afterwards starts no more."""
    run(f"""
torch.set_num_threads({threads})
x = torch.randn(4096, 512)
before = tasks()
for _ in range(5):
    torch.ops.megalodon.rms_norm(x)
    assert tasks() == before + {threads} - 1, (before, tasks())
for _ in range(5):
    x.exp()
    torch.ops.megalodon.rms_norm(x)
    assert tasks() == before + {threads} - 1, (before, tasks())
""")


def test_fork_as_a_data_loader_does() -> None:
    """torch's workers run with one thread: nothing waits for threads that fork left behind."""
    run("""
x = torch.randn(4096, 512)
wanted = torch.ops.megalodon.rms_norm(x)[0]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(torch.ops.megalodon.rms_norm(x)[0], wanted) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")


def test_own_pool_gives_the_same_numbers() -> None:
    run("""
x = torch.randn(1000, 700)
dy, weight = torch.randn(1000, 700), torch.randn(700)
def results():
    y, rstd = kernels.rms_norm(x, weight)
    return y, rstd, *kernels.rms_norm_backward(dy, x, weight, rstd)
wanted = results()
_C.set_parallel_for(0)
for count in (1, 2, 3):
    _C.set_num_threads(count)
    for a, b in zip(results(), wanted, strict=True):
        assert torch.equal(a, b)
""")


def test_calls_from_several_threads() -> None:
    inputs = [torch.randn(300 + i, 257) for i in range(8)]
    wanted = [torch.ops.megalodon.rms_norm(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        got = list(executor.map(lambda x: torch.ops.megalodon.rms_norm(x)[0], inputs * 20))
    for i, y in enumerate(got):
        assert torch.equal(y, wanted[i % 8])


def test_errors_of_several_threads_do_not_mix() -> None:
    """The last error is a thread's own."""

    def call(size: int) -> str:
        with pytest.raises(ValueError, match="rms_norm") as caught:
            kernels.rms_norm(np.ones((2, 5), np.float32), np.ones(size, np.float32))
        return str(caught.value)

    sizes = list(range(6, 26)) * 10
    with ThreadPoolExecutor(4) as executor:
        for size, message in zip(sizes, executor.map(call, sizes), strict=True):
            assert message.endswith(f"got [{size}]")


def test_nested_parallel_loops() -> None:
    """Kernels inside a task of torch_parallel_for, torch's loop, run on that thread alone."""
    import ctypes

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    task_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    inputs = [torch.randn(500, 300) for _ in range(8)]
    wanted = [torch.ops.megalodon.rms_norm(x)[0] for x in inputs]
    got: dict[int, torch.Tensor] = {}

    def task(begin: int, end: int, _context: int | None) -> None:
        for i in range(begin, end):
            got[i] = torch.ops.megalodon.rms_norm(inputs[i])[0]

    # CDLL gives the GIL back during the call, and each task takes it.
    library.torch_parallel_for(
        ctypes.c_int64(0), ctypes.c_int64(8), ctypes.c_int64(1), task_type(task), None
    )
    for i, y in enumerate(wanted):
        assert torch.equal(got[i], y)


def test_numpy_calls_use_the_same_pool() -> None:
    x = np.random.default_rng(0).standard_normal((2000, 512)).astype(np.float32)
    before = len(list(TASKS.iterdir())) if TASKS.exists() else 0
    torch.from_numpy(x).exp()
    after_torch = len(list(TASKS.iterdir())) if TASKS.exists() else 0
    kernels.rms_norm(x)
    after_ours = len(list(TASKS.iterdir())) if TASKS.exists() else 0
    assert after_ours == max(before, after_torch)


def test_bad_counts_are_refused() -> None:
    before = _C.num_threads()
    for count in (0, -3, 4097):
        with pytest.raises(ValueError, match=r"set_num_threads: count must be 1 to 4096; got"):
            _C.set_num_threads(count)
    assert _C.num_threads() == before
