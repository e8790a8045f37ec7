"""Where the C side of the installed package lies."""

from __future__ import annotations

from pathlib import Path

from megalodon_ops import _C


def _installed(*parts: str) -> str:
    # Beside the extension module, which an editable install keeps apart from the Python files.
    path = Path(_C.__file__).parent.joinpath(*parts)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not there: the extension module was built in place; `pip install` the "
            "package, or `cmake --install` the build tree, to use it from C"
        )
    return str(path)


def include_dir() -> str:
    """The folder of the C header ``megalodon.h``."""
    return _installed("include")


def cmake_dir() -> str:
    """The folder of the CMake package, for ``find_package(megalodon_ops)``: give it to CMake as
    ``-Dmegalodon_ops_DIR=...``. It defines the target ``megalodon_ops::megalodon_ops``.
    """
    return _installed("share", "cmake", "megalodon_ops")
