"""What `megalodon train` does with its arguments: begins a run or goes on with one, and trains."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megalodon_ops.checkpoint import FILE_NAME
from megalodon_ops.config import MegalodonConfig
from megalodon_ops.tokenizer import BYTES, Tokenizer
from megalodon_ops.training import checkpoint as checkpoints
from megalodon_ops.training import options as settings
from megalodon_ops.training.checkpoint import Checkpoint
from megalodon_ops.training.data import open_corpus
from megalodon_ops.training.display import Display, clock
from megalodon_ops.training.errors import CommandError
from megalodon_ops.training.loop import Trainer
from megalodon_ops.training.options import TrainOptions


@dataclass(frozen=True)
class _Setup:
    """What a run is made of. saved: the checkpoint that it goes on from, if it is not new."""

    out: Path
    config: MegalodonConfig
    options: TrainOptions
    tokenizer: Tokenizer
    saved: Checkpoint | None


def _new_run(
    out: Path, given: dict[str, Any], shape: dict[str, Any], preset: str | None, overwrite: bool
) -> _Setup:
    options = TrainOptions(**given)
    tokenizer = checkpoints.read_tokenizer(options.tokenizer) if options.tokenizer else BYTES
    config = settings.build_config(preset, shape, tokenizer.vocab_size)
    if (out / FILE_NAME).exists() and not overwrite:
        raise CommandError(
            f"{out} already holds a run: --resume goes on with it, --overwrite discards it"
        )
    return _Setup(out, config, options, tokenizer, None)


def _resumed_run(
    out: Path, given: dict[str, Any], shape: dict[str, Any], preset: str | None
) -> _Setup:
    saved = checkpoints.load(out, training=True)
    out = checkpoints.find(out).parent
    settings.check_resumed_config(saved.config, preset, shape, str(out))
    own = settings.read_options(saved.settings.get("options", {}))
    options = settings.resumed_options(own, given, str(out))
    tokenizer = checkpoints.tokenizer_of(saved, out, given.get("tokenizer"))
    return _Setup(out, saved.config, options, tokenizer, saved)


def run(
    out: Path,
    given: dict[str, Any],
    shape: dict[str, Any],
    preset: str | None,
    resume: bool,
    overwrite: bool,
    stop_after: int | None,
) -> int:
    """Train and say how it goes; returns the exit code. Raises CommandError and OSError.

    given, shape: the fields of `TrainOptions` and of `MegalodonConfig` that were given.
    """
    for name in ("data", "tokenizer"):
        if given.get(name):
            # Absolute, so that --resume and eval find it from anywhere.
            given[name] = os.path.abspath(given[name])
    if resume:
        setup = _resumed_run(out, given, shape, preset)
    else:
        setup = _new_run(out, given, shape, preset, overwrite)
    corpus = open_corpus(setup.options.data)
    setup.out.mkdir(parents=True, exist_ok=True)
    checkpoints.keep_tokenizer(setup.tokenizer, setup.out)

    display = Display(Console())
    display.say(f"corpus: {corpus.name}, {corpus.size:,} bytes in {len(corpus.files):,} files")
    trainer = Trainer(
        setup.config, setup.options, corpus, setup.out, display, setup.saved, setup.tokenizer
    )
    return _train(trainer, setup, display, stop_after)


def _train(trainer: Trainer, setup: _Setup, display: Display, stop_after: int | None) -> int:
    out, options = setup.out, setup.options
    unit = "bytes" if setup.tokenizer is BYTES else "tokens"
    display.say(
        f"model: {trainer.parameter_count:,} parameters; windows of {options.seq_len} {unit}, "
        f"{options.batch_size} a step; {trainer.options.dtype}"
    )
    if trainer.progress() >= 1:
        display.say(
            f"the run in {out} is complete at step {trainer.step}; --steps or --minutes adds"
        )
        return 0
    if setup.saved is not None:
        display.say(f"resuming after step {trainer.step}")
    outcome = trainer.run(stop_after)
    full = f", rows {100 * outcome.fullness:.2f}% full" if options.pack else ""
    display.say(
        f"step {outcome.step} after {clock(outcome.seconds)}, {outcome.tokens_per_second:,.0f} "
        f"tokens/s{full}; saved {outcome.checkpoint}"
    )
    if not outcome.finished:
        display.say(f"continue with: megalodon train --out {out} --resume")
    return 0 if outcome.signal is None else 128 + outcome.signal
