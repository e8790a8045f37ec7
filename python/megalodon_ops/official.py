"""Official consolidated checkpoints: a folder of `.pth` files, one a model-parallel rank.

What the released code (XuezheMax/megalodon, commit cff8ba5, reloading.py) reads:

    config.json              {"model": the fields of ModelConf, "tokenizer": ..., ...}
    consolidate_config.json  {"model_parallel_size": n, "dtype": "fp32" | "bf16" | "fp16"}
    consolidated.pth         the state_dict, where n is 1
    consolidated.00.pth ...  a state_dict a rank, where n > 1

Chunk parallelism divides the sequence and no weight: every rank of it has the same file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._atomic import new_folder
from .config import MegalodonConfig

if TYPE_CHECKING:
    from .model import Megalodon

# The axis along which the ranks of a model-parallel group divide a parameter; None: each rank has
# a copy. Linear layers whose outputs are divided ("column") have axis 0, those whose inputs are
# ("row") axis 1; CEMA and timestep norm go by channels, gamma and beta by heads.
_AXES: dict[str, int | None] = {
    "embed.weight": 1,
    "rope.freqs": None,
    "output.weight": 1,
    "timenorm.weight": 0,
    "timenorm.bias": 0,
    "timenorm.prior_mean": 0,
    "timenorm.prior_logv": 0,
    "timenorm.prior_count": None,
    "cema.alpha": 0,
    "cema.delta": 0,
    "cema.theta": 0,
    "cema.gamma": 0,
    "cema.omega": 0,
    "rmsnorm.weight": None,
    "wv.weight": 0,
    "wv.bias": 0,
    "wz.weight": 0,
    "wz.bias": 0,
    "wr.weight": 0,
    "wr.bias": 0,
    "wh1.weight": 0,
    "wh1.bias": 0,
    "wh2.weight": 1,
    "mega.gamma": 1,
    "mega.beta": 1,
    "norm.weight": None,
    "norm.bias": None,
    "fc1.weight": 0,
    "fc2.weight": 1,
    "fc3.weight": 0,
    "nffn.alpha": None,
}

# Fields of the released configuration that change how a model runs, not what it computes.
_WITHOUT_EFFECT = ("custom_bwd", "loss_parallel")

_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}

_REFUSAL = re.compile(r"((?:unsupported|Unsupported) \w+ \S+)")
_SHARD = re.compile(r"consolidated(?:\.(\d{2,}))?\.pth")


def shard_axis(name: str) -> int | None:
    """The axis along which model-parallel ranks divide a parameter of this name; None: copies.

    Raises:
        KeyError: no parameter of a Megalodon has that name.
    """
    if name.startswith("output.final_norm."):
        name = name.replace("output.final_norm", "timenorm")
    key = ".".join(name.rsplit(".", 2)[-2:])
    return _AXES[key]


def shard_files(folder: Path) -> list[Path]:
    """The consolidated files in a folder, in the order of their ranks."""
    found = [file for file in folder.iterdir() if _SHARD.fullmatch(file.name)]
    return sorted(found, key=lambda file: (len(file.name), file.name))


# Reading


def read(
    place: Path, config: MegalodonConfig | None = None
) -> tuple[MegalodonConfig, dict[str, Tensor]]:
    """Configuration and merged weights of a folder, or of one `.pth` file.

    Args:
        place: the folder or file.
        config: the configuration where the folder has none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or shards do not fit together.
    """
    folder = place if place.is_dir() else place.parent
    files = _complete(folder) if place.is_dir() else [_alone(place)]
    shards = [read_state_dict(file) for file in files]
    fields = _read_fields(folder)
    if fields is None:
        if config is None:
            raise FileNotFoundError(
                2, "no config.json or params.json; config= can give what it would say", str(folder)
            )
        return config, _merge(files, shards, config)
    source, values = fields
    # The released code writes -1 where the size is the tokenizer's.
    embed = shards[0].get("embed.weight")
    if values.get("vocab_size", -1) == -1 and embed is not None and embed.dim() == 2:
        values["vocab_size"] = embed.shape[0]
    if values.get("output_size") == -1:
        values["output_size"] = None
    try:
        found = MegalodonConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return found, _merge(files, shards, found)


def _alone(file: Path) -> Path:
    """A `.pth` file by itself; an error where it is one shard of several."""
    if not file.is_file():
        raise FileNotFoundError(2, "no checkpoint here (wanted a file)", str(file))
    size = _model_parallel_size(file.parent)
    if size not in (None, 1) and _SHARD.fullmatch(file.name):
        raise ValueError(
            f"{file}: one of {size} shards (consolidate_config.json); give the folder {file.parent}"
        )
    return file


def _complete(folder: Path) -> list[Path]:
    """The shards of a folder, of which none may be missing."""
    files = shard_files(folder)
    size = _model_parallel_size(folder)
    if any(file.name == "consolidated.pth" for file in files):
        wanted = ["consolidated.pth"]
    else:
        wanted = [f"consolidated.{rank:02d}.pth" for rank in range(size or len(files))]
    if size is not None and size != len(wanted):
        raise ValueError(
            f"{folder}: consolidate_config.json: model_parallel_size: wanted {len(wanted)} with "
            f"{wanted[0]}; got {size}"
        )
    names = [file.name for file in files]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FileNotFoundError(
            2, f"shards are missing: wanted {', '.join(missing)}; got {', '.join(names)}", folder
        )
    surplus = [name for name in names if name not in wanted]
    if surplus:
        raise ValueError(
            f"{folder}: shards: wanted {len(wanted)} ({wanted[0]} to {wanted[-1]}); got also "
            f"{', '.join(surplus)}"
        )
    return files


def _model_parallel_size(folder: Path) -> int | None:
    """The number of shards by consolidate_config.json; None where there is no such file."""
    path = folder / "consolidate_config.json"
    values = _read_json(path)
    if values is None:
        return None
    size = values.get("model_parallel_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{path}: model_parallel_size: wanted an int >= 1; got {size!r}")
    return size


def _read_fields(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The model's fields in config.json (under "model") or params.json, and which file it was."""
    for name in ("config.json", "params.json"):
        path = folder / name
        values = _read_json(path)
        if values is None:
            continue
        fields = values.get("model", values)
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: model: wanted an object; got {type(fields).__name__}")
        values = {key: value for key, value in fields.items() if key not in _WITHOUT_EFFECT}
        # Which attention runs there decides what its dropout drops.
        if values.pop("efficient_attn", "") is None and values.get("attention_dropout"):
            values["attention_dropout_mode"] = "weight"
        return path, values
    return None


def is_transformers(folder: Path) -> bool:
    """Whether a folder is one of `megalodon_ops.hf`: it has another config.json of its own."""
    values = _read_json(folder / "config.json") or {}
    return values.get("model_type") == "megalodon_ops"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted an object; got {type(values).__name__}")
    return values


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, by name; where possible mapped from the file, not read.

    Raises:
        ValueError: the file is truncated or damaged, or holds anything but named dense tensors.
        OSError: it cannot be read.
    """
    with file.open("rb"):
        pass  # what cannot be opened is an OSError; what follows is about the contents
    try:
        # Mapping needs the zip form; files from before torch 1.6 are read as a whole.
        values = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        # Of torch's advice how to switch its protection off nothing is passed on.
        found = _REFUSAL.search(str(error))
        raise ValueError(
            f"{file}: refused: damaged, or not a plain state_dict of tensors"
            f"{': ' + found[1] if found else ''}"
        ) from error
    except Exception as error:  # whatever the bytes of a damaged file make a reader raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{file}: truncated, damaged or not a .pth file: {lines[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: wanted a state_dict; got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name}: wanted a named tensor; got {type(value).__name__}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{file}: {name}: wanted a dense tensor; got {value.layout} on {value.device}"
            )
    return dict(values)


def _merge(
    files: list[Path], shards: list[dict[str, Tensor]], config: MegalodonConfig
) -> dict[str, Tensor]:
    """One state_dict of all the shards', in memory of its own."""
    count = len(shards)
    if count > 1:
        check_divisible(config, count)
    for file, shard in zip(files[1:], shards[1:], strict=True):
        for name in sorted(shard.keys() ^ shards[0].keys()):
            there, absent = (files[0], file) if name in shards[0] else (file, files[0])
            raise ValueError(f"{absent}: {name}: missing, but in {there.name}")
    merged = {}
    for name in list(shards[0]):
        parts = [shard.pop(name) for shard in shards]
        for file, part in zip(files[1:], parts[1:], strict=True):
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                raise ValueError(
                    f"{file}: {name}: wanted {_shown(parts[0])} as in {files[0].name}; "
                    f"got {_shown(part)}"
                )
        merged[name] = _merged(name, parts, files)
    return merged


def _merged(name: str, parts: list[Tensor], files: list[Path]) -> Tensor:
    try:
        axis = shard_axis(name)
    except KeyError:
        axis = None  # an unexpected name; it is reported with all the others
    if axis is not None and len(parts) > 1:
        if parts[0].dim() <= axis:
            raise ValueError(
                f"{files[0]}: {name}: wanted {axis + 1} axes or more; got {_shown(parts[0])}"
            )
        return torch.cat(parts, axis)
    for file, part in zip(files[1:], parts[1:], strict=True):
        if not torch.equal(part, parts[0]):
            raise ValueError(
                f"{file}: {name}: wanted the values of {files[0].name}, since every rank has a "
                "copy; got others: the shards are of different checkpoints"
            )
    return parts[0].clone(memory_format=torch.contiguous_format)


def check_divisible(config: MegalodonConfig, num_shards: int) -> None:
    """Raise ValueError where a model cannot be divided into so many shards."""
    if isinstance(num_shards, bool) or not isinstance(num_shards, int) or num_shards < 1:
        raise ValueError(f"num_shards: wanted an int >= 1; got {num_shards!r}")
    for field in ("num_heads", "model_dim", "norm_num_groups", "ffn_hidden_dim"):
        size = getattr(config, field)
        if size % num_shards:
            raise ValueError(
                f"num_shards: wanted a divisor of {field} = {size} (each rank has as many); "
                f"got {num_shards}"
            )


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# Writing


def write(model: Megalodon, folder: Path, num_shards: int = 1) -> None:
    """Write a model as a new folder of the official layout; see `save_checkpoint`."""
    check_divisible(model.config, num_shards)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with new_folder(folder) as temporary:
        for rank in range(num_shards):
            name = "consolidated.pth" if num_shards == 1 else f"consolidated.{rank:02d}.pth"
            torch.save(
                {key: _part(key, value, rank, num_shards) for key, value in weights.items()},
                temporary / name,
            )
        _write_json(temporary / "config.json", official_config(model.config, num_shards))
        _write_json(
            temporary / "consolidate_config.json",
            {
                "model_parallel_size": num_shards,
                "dtype": _DTYPE_NAMES[model.embed.weight.dtype],
            },
        )


def _part(name: str, tensor: Tensor, rank: int, num_shards: int) -> Tensor:
    axis = shard_axis(name)
    if axis is not None:
        tensor = tensor.chunk(num_shards, axis)[rank]
    # clone: torch.save would write the whole memory that a part lies in.
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def official_config(config: MegalodonConfig, num_shards: int) -> dict[str, Any]:
    """What the released code's config.json says of a model."""
    fields = config.to_dict()
    if fields["output_size"] is None:
        fields["output_size"] = -1
    if fields.pop("attention") != "chunk":
        raise ValueError("the released code has no sliding attention: no official checkpoint")
    drops_keys = fields.pop("attention_dropout_mode") == "key" and config.attention_dropout > 0
    return {
        "model": {**fields, "efficient_attn": "fused" if drops_keys else None},
        "tokenizer": {"path": None, "additional_vocab_size": 0, "data_tokenized": False},
        "model_parallel_size": num_shards,
        "chunk_parallel_size": 1,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
