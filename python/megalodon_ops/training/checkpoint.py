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

from megalodon_ops._atomic import write_atomically
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
from megalodon_ops.tokenizer import BYTES, Tokenizer, load_tokenizer
from megalodon_ops.training.errors import CommandError


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


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file; raises CommandError."""
    try:
        return load_tokenizer(path)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def kept_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint, if it is a run's and has one; else bytes."""
    if not (path.is_file() or (path / FILE_NAME).is_file()) or path.suffix in (".pth", ".pt"):
        return BYTES
    checkpoint = load(path)
    return tokenizer_of(checkpoint, path) if checkpoint.settings.get("tokenizer") else BYTES


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put the tokenizer's file into a run's folder."""
    if tokenizer.file_name:
        write_atomically(folder / tokenizer.file_name, tokenizer.data)


def tokenizer_of(checkpoint: Checkpoint, path: str | Path, given: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the file `given`, or the one that its run has kept.

    Raises CommandError where it is not the one that the model was trained with, or is missing.
    """
    kept = checkpoint.settings.get("tokenizer")
    if not isinstance(kept, dict):
        kept = None
    vocab_size = checkpoint.config.vocab_size
    if given is not None:
        tokenizer = read_tokenizer(given)
    elif kept is not None:
        # Its name alone: a checkpoint from elsewhere must not choose among this machine's files.
        tokenizer = read_tokenizer(find(path).parent / Path(str(kept.get("file"))).name)
    elif vocab_size == BYTES.vocab_size:
        return BYTES
    else:
        raise CommandError(
            f"{find(path)} holds a model of {vocab_size} tokens and no tokenizer: bytes are 256; "
            "give --tokenizer FILE"
        )
    if "options" in checkpoint.settings and tokenizer.identity() != kept:
        raise CommandError(
            f"the tokenizer {given or tokenizer.file_name} is not the one that the model in "
            f"{find(path)} was trained with" + ("" if kept else " (it was trained on bytes)")
        )
    if tokenizer.vocab_size > vocab_size:
        raise CommandError(
            f"the tokenizer has {tokenizer.vocab_size} tokens; the model in {find(path)} has "
            f"{vocab_size}"
        )
    return tokenizer


def load_model(path: str | Path) -> tuple[Megalodon, Checkpoint]:
    """The model of a checkpoint, in eval mode, and the checkpoint without its weights."""
    checkpoint = load(path)
    try:
        model = build(checkpoint.config, checkpoint.weights, str(find(path)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    checkpoint.weights = {}
    return model.eval(), checkpoint
