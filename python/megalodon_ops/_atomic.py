"""Files and folders that appear completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what the block writes there takes the name at its end.

    The bytes reach the disk before the name does; so a full disk, a crash or Ctrl-C leaves the
    previous file as it was. Raises OSError.
    """
    # One fixed name: what a killed process left behind is overwritten, and cannot pile up.
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name, files and all, at the block's end.

    Raises:
        FileExistsError: there is something at `path` other than an empty folder.
        OSError: it cannot be written; nothing is left behind.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(17, "exists already; wanted a new or an empty folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        # mkdtemp's folders, and some libraries' files, are private to the user; these are as
        # readable as any new ones.
        umask = os.umask(0)
        os.umask(umask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask)
            sync(file)
        temporary.chmod(0o777 & ~umask)
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` completely or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
