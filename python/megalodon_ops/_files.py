"""Safetensors files that are written whole or not at all, and that notice damage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._atomic import write_atomically


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata, with a checksum of both, by atomic replacement.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; an older file of that name is unharmed.
    """
    from safetensors.torch import save

    named = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = save(named, metadata={**metadata, "sha256": _digest(named, metadata)})
    write_atomically(Path(path), data)


def read(
    path: str | os.PathLike[str], format: str, version: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file written by `write`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or metadata's "format" or "version" is another.
        ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            named = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{name}: truncated, or not a safetensors file: {error}") from error
    for key, wanted in (("format", format), ("version", version)):
        if metadata.get(key) != wanted:
            raise ValueError(f"{name}: {key}: wanted {wanted!r}; got {metadata.get(key)!r}")
    if metadata.pop("sha256", None) != _digest(named, metadata):
        raise ValueError(f"{name}: damaged: its contents do not agree with its checksum")
    return named, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(metadata.items()):
        digest.update(f"{key}={value}\0".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}: {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
