"""Models in files: ours (one safetensors file that holds the configuration too) and the official
consolidated checkpoints (`official.py`). Loading is strict and never unpickles an object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _fit, official
from ._atomic import replacing
from .config import MegalodonConfig
from .model import Megalodon

FILE_NAME = "checkpoint.safetensors"
FORMAT = "megalodon_ops.checkpoint"
VERSION = 1
TRAINING = "training."  # prefix of tensors that only a resumed run needs
FORMATS = ("safetensors", "official")
_SHOWN = 6  # of a long list of problems


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: MegalodonConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Megalodon:
    """A model from a file or folder, strictly: every parameter, nothing else, every shape.

    Args:
        path: a safetensors file of `save_checkpoint` or `megalodon train`, or a folder that holds
            one as `checkpoint.safetensors`; or the folder of an official consolidated checkpoint
            (`consolidated.pth`, or one `consolidated.NN.pth` a model-parallel rank, which are
            merged), or one `.pth` file; or a folder of `megalodon_ops.hf`.
        config: the configuration, for files that hold none; where there is one, both must agree.
        dtype: of the weights; None keeps what the embedding has in the file. CEMA, norms and
            gamma/beta are never narrower than float32.
        device: where to put the model.

    Returns:
        The model, in eval mode. Its memory is the model's own; no file stays open.

    Raises:
        TypeError: config is not a `MegalodonConfig`.
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is truncated or holds other objects than tensors; a parameter is
            missing, unexpected, or of another shape; shards do not fit together; the configuration
            is absent or contradicts the weights. The message names file, parameter, wanted, got.
        ImportError: safetensors is not installed (for its files).
    """
    place = Path(path)
    kind = _kind(place)
    if dtype is not None and dtype not in _fit.FLOATS:
        raise ValueError(f"load_checkpoint: dtype: wanted a floating dtype; got {dtype}")
    if config is not None and not isinstance(config, MegalodonConfig):
        raise TypeError(f"config: wanted a MegalodonConfig; got {type(config).__name__}")
    if kind == "hf":
        from .hf import MegalodonForCausalLM

        model: Megalodon = MegalodonForCausalLM.from_pretrained(
            place, dtype=dtype or "auto", local_files_only=True
        ).model
        if config is not None:
            _fit.require_same_config(config, model.config, str(place))
        return model.to(device).eval()
    if kind == "official":
        found, tensors = official.read(place, config)
        name = str(place)
    else:
        file = find_file(place)
        name = str(file)
        found, _, tensors = read_safetensors(
            file, lambda key: not key.startswith(TRAINING), config=config
        )
    if config is not None:
        _fit.require_same_config(config, found, name)
    model = build(found, tensors, name)
    return model.to(dtype or model.embed.weight.dtype).to(device).eval()


def save_checkpoint(
    model: Megalodon,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    num_shards: int = 1,
) -> Path:
    """Write a model, all of it or nothing; `load_checkpoint` reads it back bit for bit.

    Args:
        model: the model; its weights are written in the dtypes they have.
        path: for "safetensors" a file, or an existing folder, in which `checkpoint.safetensors` is
            replaced; for "official" a new or empty folder.
        format: "safetensors": one file with the configuration in its header. "official": what the
            released code loads: `consolidated.pth` (or `consolidated.NN.pth`), `config.json`,
            `consolidate_config.json`. None: "safetensors" where the path ends in `.safetensors` or
            is a folder that holds such a checkpoint, else "official".
        num_shards: model-parallel ranks of an official checkpoint.

    Returns:
        The file or folder.

    Raises:
        TypeError: model is not a `Megalodon`.
        ValueError: the format is unknown, or the model cannot be divided by num_shards.
        OSError: it cannot be written; what was there before is unharmed. FileExistsError: the
            folder of an official checkpoint is not empty.
        ImportError: safetensors is not installed (for its format).
    """
    if not isinstance(model, Megalodon):
        raise TypeError(f"model: wanted a Megalodon; got {type(model).__name__}")
    place = Path(path)
    if format is None:
        ours = place.suffix == ".safetensors" or (place / FILE_NAME).exists()
        format = "safetensors" if ours else "official"
    if format not in FORMATS:
        raise ValueError(f"format: wanted one of {', '.join(FORMATS)}; got {format!r}")
    if format == "official":
        official.write(model, place, num_shards)
        return place
    if num_shards != 1:
        raise ValueError(f'num_shards: wanted 1 with format="safetensors"; got {num_shards}')
    file = place / FILE_NAME if place.is_dir() else place
    write_safetensors(file, model.config, model.state_dict(), {})
    return file


def _kind(place: Path) -> str:
    """Which format a path means; an error where a folder holds several."""
    if not place.is_dir():
        return "official" if place.suffix in (".pth", ".pt") else "safetensors"
    shards = [file.name for file in official.shard_files(place)]
    found = {
        "safetensors": FILE_NAME if (place / FILE_NAME).exists() else "",
        "official": shards[0] if shards else "",
        "hf": "config.json" if official.is_transformers(place) else "",
    }
    kinds = [kind for kind, name in found.items() if name]
    if len(kinds) > 1:
        names = " and ".join(name for name in found.values() if name)
        raise ValueError(f"{place}: wanted one checkpoint; got {names}: name the file")
    return kinds[0] if kinds else "safetensors"


def find_file(path: Path) -> Path:
    """The safetensors file that `path`, a folder or the file itself, means."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        wanted = f"{FILE_NAME} or consolidated*.pth in it" if path.is_dir() else "a file"
        raise FileNotFoundError(2, f"no checkpoint here (wanted {wanted})", str(path))
    return file


def write_safetensors(
    file: Path, config: MegalodonConfig, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Replace `file` atomically by these tensors, under this configuration. Raises OSError."""
    import safetensors.torch

    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(config.to_dict()),
        "settings": json.dumps(dict(settings)),
    }
    data = safetensors.torch.save(_free_storage(tensors), metadata)
    with replacing(file) as temporary:
        temporary.write_bytes(data)


def _free_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory (safetensors refuses tied weights)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def read_safetensors(
    file: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    config: MegalodonConfig | None = None,
) -> tuple[MegalodonConfig, dict[str, Any], dict[str, Tensor]]:
    """Configuration, settings, and those tensors whose names are wanted.

    `config` stands in where the file's header has none.

    Raises:
        ValueError: the file is truncated, foreign, or newer than this library.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            settings: dict[str, Any] = {}
            if metadata.get("format") == FORMAT:
                config, settings = _read_metadata(file, metadata)
            elif config is None:
                raise ValueError(
                    f"{file}: not a checkpoint of `megalodon train` or save_checkpoint: its header "
                    f"has no configuration (format: wanted {FORMAT!r}; got "
                    f"{metadata.get('format')!r}); config= can give it"
                )
            # clone: what is read must not stay tied to a file that a later save replaces.
            tensors = {
                name: handle.get_tensor(name).clone()
                for name in handle.keys()  # noqa: SIM118 (the handle is not a dict)
                if wanted(name)
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file}: truncated, damaged or not a safetensors file: {error}"
        ) from error
    return config, settings, tensors


def _read_metadata(file: Path, metadata: dict[str, str]) -> tuple[MegalodonConfig, dict[str, Any]]:
    try:
        version = int(metadata["version"])
        config = MegalodonConfig.from_dict(json.loads(metadata["config"]))
        settings = json.loads(metadata["settings"])
        if not isinstance(settings, dict):
            raise TypeError(f"settings: wanted an object; got {type(settings).__name__}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: its header cannot be read: {error}") from error
    if version > VERSION:
        raise ValueError(
            f"{file}: written by a newer megalodon_ops (version {version}); update to read it"
        )
    return config, settings


def build(config: MegalodonConfig, tensors: Mapping[str, Tensor], name: str) -> Megalodon:
    """The model that these tensors, which it takes over, are. `name` is theirs, for errors.

    Raises:
        ValueError: they do not fit the configuration.
    """
    _fit.check_layers(config, tensors, name)
    # Without memory of its own, so that loading needs room for one set of weights.
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = Megalodon(config)
    except RuntimeError as error:
        raise ValueError(f"{name}: the configuration has sizes of no tensor: {error}") from error
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    problems = _fit.differences(shapes, tensors, config)
    if not problems:
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            # torch's first line says which class it was.
            problems = [line.strip() for line in str(error).splitlines()[1:]]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{name}: the weights do not fit the configuration: "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )
    return model
