"""Checkpoints: one safetensors file with the weights, and, under `training.`, what resuming needs.

The weights stand under their plain parameter names, so any safetensors reader can take them. The
header's metadata holds the configuration and the run's settings as JSON. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from megalodon_ops.config import MegalodonConfig
from megalodon_ops.model import Megalodon
from megalodon_ops.training.errors import CommandError

FILE_NAME = "checkpoint.safetensors"
FORMAT = "megalodon_ops.checkpoint"
VERSION = 1
TRAINING = "training."
BYTE_VALUES = 256


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    weights: the model's state_dict. training: tensors that only a resumed run needs (optimiser,
    generator). settings: JSON-able facts of the run (options, step, seconds, corpus).
    """

    config: MegalodonConfig
    weights: dict[str, torch.Tensor]
    training: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` completely or not at all.

    The bytes go to a temporary file beside it, reach the disk, and only then take the name; so a
    full disk, a crash or a second Ctrl-C leaves the previous file as it was. Raises OSError.
    """
    # One fixed name: what a killed process left behind is overwritten, and cannot pile up.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself is durable only when the folder's entry is on the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _free_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share memory (safetensors refuses tied weights)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `folder/checkpoint.safetensors` atomically; raises CommandError, nothing lost."""
    path = folder / FILE_NAME
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(checkpoint.config.to_dict()),
        "settings": json.dumps(checkpoint.settings),
    }
    tensors = dict(checkpoint.weights)
    tensors |= {TRAINING + name: tensor for name, tensor in checkpoint.training.items()}
    data = safetensors.torch.save(_free_storage(tensors), metadata)
    try:
        write_atomically(path, data)
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there was none before"
        raise CommandError(
            f"cannot save {path}: {error.strerror or error} ({len(data) / 1e6:.1f} MB to write, "
            f"{_free_bytes(folder) / 1e6:.1f} MB free); {kept}"
        ) from error
    return path


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def find(path: str | Path) -> Path:
    """The checkpoint file that `path`, a run's folder or the file itself, means."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise CommandError(f"no checkpoint at {file}; `megalodon train --out FOLDER` makes one")
    return file


def load(path: str | Path, training: bool = False) -> Checkpoint:
    """Read a checkpoint; `training` also reads what a resumed run needs.

    Raises CommandError when there is none, or it is truncated, foreign, or newer than this library.
    """
    file = find(path)
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CommandError(
                    f"{file} is a safetensors file, but not a checkpoint of `megalodon train` "
                    "(its header has no configuration)"
                )
            config, settings = _read_metadata(file, metadata)
            # clone: what is read must not stay tied to a file that a later save replaces.
            tensors = {
                name: handle.get_tensor(name).clone()
                for name in handle.keys()  # noqa: SIM118 (the handle is not a dict)
                if training or not name.startswith(TRAINING)
            }
    except safetensors.SafetensorError as error:
        raise CommandError(
            f"{file} is truncated, damaged or not a safetensors file: {error}"
        ) from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror or error}") from error
    return Checkpoint(
        config,
        {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINING)},
        {
            name.removeprefix(TRAINING): tensor
            for name, tensor in tensors.items()
            if name.startswith(TRAINING)
        },
        settings,
    )


def _read_metadata(file: Path, metadata: dict[str, str]) -> tuple[MegalodonConfig, dict[str, Any]]:
    try:
        if int(metadata["version"]) > VERSION:
            raise CommandError(f"{file} was written by a newer megalodon_ops; update to read it")
        config = MegalodonConfig.from_dict(json.loads(metadata["config"]))
        settings = json.loads(metadata["settings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{file} has a header that cannot be read: {error}") from error
    if config.vocab_size != BYTE_VALUES:
        raise CommandError(
            f"{file} holds a model of {config.vocab_size} tokens; this command works on bytes (256)"
        )
    return config, settings


def load_weights(model: Megalodon, checkpoint: Checkpoint, name: str | Path) -> None:
    """Put the weights into the model, strictly."""
    try:
        model.load_state_dict(checkpoint.weights, strict=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(
            f"the weights in {name} do not fit its configuration: {reason}"
        ) from error


def load_model(path: str | Path) -> tuple[Megalodon, Checkpoint]:
    """The model of a checkpoint, in eval mode, and the checkpoint without its weights."""
    checkpoint = load(path)
    model = Megalodon(checkpoint.config)
    load_weights(model, checkpoint, find(path))
    checkpoint.weights = {}
    return model.eval(), checkpoint
