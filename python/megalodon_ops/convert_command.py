"""What `megalodon convert` does with its arguments."""

from __future__ import annotations

from pathlib import Path

import torch

from megalodon_ops.checkpoint import FORMATS, load_checkpoint, save_checkpoint
from megalodon_ops.training.checkpoint import kept_tokenizer
from megalodon_ops.training.errors import CommandError

KINDS = (*FORMATS, "hf")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def run(source: Path, target: Path, format: str | None, num_shards: int, dtype: str | None) -> int:
    """Convert and say what was written; returns the exit code. Raises CommandError and OSError."""
    kind = format or ("safetensors" if target.suffix == ".safetensors" else "official")
    if kind not in KINDS:
        raise CommandError(f"--format must be one of {', '.join(KINDS)}; got {kind}")
    if dtype is not None and dtype not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    if num_shards != 1 and kind != "official":
        raise CommandError(f"--num-shards is for --format official; got --format {kind}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CommandError(f"{target} exists already; name another target")
    try:
        model = load_checkpoint(source, dtype=None if dtype is None else DTYPES[dtype])
        if kind == "hf":
            from megalodon_ops.hf import export

            export(model, target, kept_tokenizer(source))
        else:
            save_checkpoint(model, target, format=kind, num_shards=num_shards)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from error
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {kind}, {count:,} parameters, {model.embed.weight.dtype}")
    return 0
