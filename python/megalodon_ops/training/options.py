"""The settings of a training run, their defaults and their limits; and the demo's model shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalodon_ops.config import MegalodonConfig
from megalodon_ops.training.errors import CommandError

# 3.4 million parameters. SwiGLU is off and the embedding is shared: with either the other way round
# the count would be 4.0 or 3.5 million at the same widths.
DEMO_SHAPE: Mapping[str, Any] = {
    "model_dim": 256,
    "num_layers": 4,
    "num_heads": 1,
    "z_dim": 128,
    "value_dim": 512,
    "ffn_hidden_dim": 640,
    "cema_ndim": 16,
    "chunk_size": 512,
    "norm_num_groups": 32,
    "swiglu": False,
    "share_emb": True,
}
DEFAULT_MINUTES = 3.0
DTYPES = ("auto", "float32", "bfloat16")
# Options that may differ when a run is resumed: they change when it ends and what it reports, and
# nothing about the steps in between but the learning rate's schedule.
REPLACEABLE = frozenset(
    {
        "data",
        "tokenizer",
        "steps",
        "minutes",
        "eval_every",
        "eval_bytes",
        "checkpoint_every",
        "threads",
    }
)


@dataclass(frozen=True)
class TrainOptions:
    """One training run. Exactly one of `steps` and `minutes` is set (default: 3 minutes).

    data: a file, a folder, or None for the Python standard library. tokenizer: a file, or None for
    bytes. pack: files are documents of their own. held_out: percent of the bytes.
    final_lr: the learning rate at the end, as a part of `lr`. threads: 0 leaves torch's choice.
    """

    data: str | None = None
    tokenizer: str | None = None
    pack: bool = True
    seq_len: int = 2048
    batch_size: int = 1
    steps: int | None = None
    minutes: float | None = None
    lr: float = 2e-3
    final_lr: float = 0.1
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    held_out: float = 5.0
    eval_every: int = 200
    eval_bytes: int = 32768
    checkpoint_every: int = 200
    threads: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise CommandError("give --steps or --minutes, not both")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)
        for name in (
            "seq_len",
            "batch_size",
            "steps",
            "eval_every",
            "eval_bytes",
            "checkpoint_every",
        ):
            self._require(name, lambda value: value >= 1, "at least 1")
        self._require("data", lambda value: value != "", "the path of a file or folder")
        self._require("tokenizer", lambda value: value != "", "the path of a file")
        for name in ("warmup_steps", "threads"):
            self._require(name, lambda value: value >= 0, "0 or more")
        self._require("seed", lambda value: 0 <= value < 2**63, "from 0 to 2^63 - 1")
        for name in ("lr", "minutes", "clip"):
            self._require(name, lambda value: 0 < value < math.inf, "a positive number")
        self._require("weight_decay", lambda value: 0 <= value < math.inf, "0 or more")
        self._require("final_lr", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._require("held_out", lambda value: 0 <= value < 100, "from 0 to below 100 (percent)")
        self._require("dtype", lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}")

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise CommandError(f"{option_name(name)} must be {wanted}; got {value}")

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear warm-up over the first steps, times a cosine over the run's progress (0 to 1)."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * warmup * (self.final_lr + (1 - self.final_lr) * cosine)


def option_name(name: str) -> str:
    """`seq_len` -> `--seq-len`."""
    return "--" + name.replace("_", "-")


def build_config(
    preset: str | None, given: Mapping[str, Any], vocab_size: int = 256
) -> MegalodonConfig:
    """The preset's or the demo's shape, changed by what was given, for a tokenizer's vocabulary."""
    vocabulary = {"vocab_size": vocab_size, "output_size": vocab_size}
    try:
        if preset is None:
            return MegalodonConfig.from_dict({**DEMO_SHAPE, **vocabulary, **given})
        return MegalodonConfig.preset(preset).replace(**vocabulary, **given)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def read_options(values: Mapping[str, Any]) -> TrainOptions:
    """The options saved in a checkpoint."""
    try:
        # Runs from before there was packing have no such setting and go on as they began.
        return TrainOptions(**{"pack": False, **values})
    except TypeError as error:
        raise CommandError(f"the checkpoint's training settings cannot be read: {error}") from error


def resumed_options(saved: TrainOptions, given: Mapping[str, Any], where: str) -> TrainOptions:
    """The saved options with the replaceable ones that were given again; any other that differs
    is an error, because the run would silently become another one."""
    asked = dict(given)
    if asked.get("dtype") == "auto":  # the decision was made when the run began
        del asked["dtype"]
    for name, value in asked.items():
        if name not in REPLACEABLE and value != getattr(saved, name):
            raise _conflict(name, getattr(saved, name), value, where)
    changes = {name: value for name, value in asked.items() if name in REPLACEABLE}
    if "steps" in changes or "minutes" in changes:
        changes = {"steps": None, "minutes": None} | changes
    return dataclasses.replace(saved, **changes)


def check_resumed_config(
    saved: MegalodonConfig, preset: str | None, given: Mapping[str, Any], where: str
) -> None:
    """Raise CommandError when the shape that was asked for is not the checkpoint's."""
    asked = dict(given)
    if preset is not None:
        asked = build_config(preset, given, saved.vocab_size).to_dict()
    for name, value in asked.items():
        if value != getattr(saved, name, None):
            raise _conflict(name, getattr(saved, name, None), value, where)


def _conflict(name: str, saved: object, asked: object, where: str) -> CommandError:
    return CommandError(
        f"--resume: the checkpoint in {where} has {name} = {saved}, not {asked}; leave the option "
        "out to go on with it, or start another run with another --out"
    )
