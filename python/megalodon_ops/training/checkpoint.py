"""A run's checkpoint: the file of `megalodon_ops.checkpoint`, with what resuming needs beside it.

The weights stand under their plain parameter names, so any safetensors reader can take them; what
only a resumed run needs has the prefix `training.`. Errors are the command's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalodon_ops.checkpoint import (
    FILE_NAME,
    TRAINING,
    build,
    find_file,
    read_safetensors,
    write_safetensors,
)
from megalodon_ops.config import MegalodonConfig
from megalodon_ops.model import Megalodon
from megalodon_ops.training.errors import CommandError

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


def save(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `folder/checkpoint.safetensors` atomically; raises CommandError, nothing lost."""
    path = folder / FILE_NAME
    tensors = dict(checkpoint.weights)
    tensors |= {TRAINING + name: tensor for name, tensor in checkpoint.training.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        write_safetensors(path, checkpoint.config, tensors, checkpoint.settings)
    except OSError as error:
        kept = "the previous checkpoint is intact" if path.exists() else "there was none before"
        raise CommandError(
            f"cannot save {path}: {error.strerror or error} ({size / 1e6:.1f} MB to write, "
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
    try:
        return find_file(Path(path))
    except FileNotFoundError as error:
        raise CommandError(
            f"no checkpoint at {path}; `megalodon train --out FOLDER` makes one"
        ) from error


def load(path: str | Path, training: bool = False) -> Checkpoint:
    """Read a checkpoint; `training` also reads what a resumed run needs.

    Raises CommandError when there is none, or it is truncated, foreign, or newer than this library.
    """
    file = find(path)
    try:
        config, settings, tensors = read_safetensors(
            file, lambda name: training or not name.startswith(TRAINING)
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror or error}") from error
    if config.vocab_size != BYTE_VALUES:
        raise CommandError(
            f"{file} holds a model of {config.vocab_size} tokens; this command works on bytes (256)"
        )
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
    try:
        model = build(checkpoint.config, checkpoint.weights, str(find(path)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    checkpoint.weights = {}
    return model.eval(), checkpoint
