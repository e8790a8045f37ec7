"""The kernels under test: those of the installed package, or with MEGALODON_TEST_BACKEND=simt,
simt_asan or simt_race the CUDA kernels, run on CPU tensors by the host executor (docs/executor.md).

Importing this module before ``megalodon_ops`` puts the extension module in place.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BACKEND = os.environ.get("MEGALODON_TEST_BACKEND", "")
SIMT_BUILD = Path(os.environ.get("MEGALODON_SIMT_BUILD", ROOT / "build-simt"))
CUDA_OPS = sorted(path.stem for path in ROOT.glob("cuda/ops/*.cu"))


def without_cuda_kernel(error: BaseException) -> str | None:
    """What to say of a test that failed because an op has no cuda/ops/{op}.cu yet, or not for this
    algorithm."""
    cause: BaseException | None = error
    while cause is not None:
        said = re.search(
            r"(\w+?)(_backward)?: a CUDA kernel( for algorithm \w+)? is not implemented yet",
            str(cause),
        )
        if said and (said[3] or said[1] not in CUDA_OPS):
            return said[0]
        cause = cause.__cause__ or cause.__context__
    return None


if BACKEND:
    found = [*(SIMT_BUILD / BACKEND).glob("_C.*")]
    if len(found) != 1:
        raise ImportError(f"no {BACKEND} extension in {SIMT_BUILD} (cmake --build --preset simt)")
    spec = importlib.util.spec_from_file_location("megalodon_ops._C", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["megalodon_ops._C"] = module
    spec.loader.exec_module(module)
