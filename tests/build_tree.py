"""Finding the build tree that the extension module under test came from."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from megalodon_ops import _C

ROOT = Path(__file__).resolve().parents[1]


def build_tree() -> Path | None:
    """The CMake build folder that was built last, of an editable install or in place."""
    objects = [
        path
        for folder in ("build/*", "build-*")
        for path in ROOT.glob(f"{folder}/CMakeFiles/_C.dir/cpp/bind/module.cpp.o")
    ]
    if not objects:
        return None
    return max(objects, key=lambda path: path.stat().st_mtime).parents[4]


def library() -> Path:
    """libmegalodon_ops, beside the extension module."""
    (path,) = Path(_C.__file__).parent.glob("libmegalodon_ops.*")
    return path


def linked_library() -> Path:
    """The library as the linker left it, with its symbols: an installed one has been stripped."""
    tree, installed = build_tree(), library()
    linked = None if tree is None else tree / installed.name
    return linked if linked is not None and linked.exists() else installed


def missing(what: str) -> NoReturn:
    """Skips the test, or fails it in CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
