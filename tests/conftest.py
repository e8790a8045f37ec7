"""Fixtures that test files share."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import backend  # before megalodon_ops, whose extension module it may replace
import pytest
import torch
from checks import available_isas
from hypothesis import HealthCheck, settings

from megalodon_ops import _C

settings.register_profile(
    "default",
    max_examples=int(os.environ.get("MEGALODON_EXAMPLES", "15")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")

# A shell ignores Ctrl-C in what it runs in the background, and all that starts there inherits it;
# some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips the tests of ops that have no CUDA kernel yet, and ends the run where a kernel has
    broken the process's use of the GPU: every later test would fail with that error.
    """
    try:
        return (yield)
    except Exception as error:
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                pytest.exit(f"{item.nodeid} has broken the GPU's context: {error}", returncode=1)
        reason = backend.without_cuda_kernel(error) if backend.BACKEND else None
        if reason is None:
            raise
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


# The CUDA kernels have none.
@pytest.fixture(params=[_C.isa()] if backend.BACKEND == "cuda" else available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set of this machine."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


# Of the command; its packages are imported where a test asks for it.


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    from command import TEXT

    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps. Tests must not change it."""
    from command import TEXT, TINY, train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_bytes(TEXT)
    out = folder / "run"
    options = [*TINY, "--steps", 6, "--eval-every", 3]
    assert train(out, "--data", folder / "corpus.txt", *options) == 0
    return out
