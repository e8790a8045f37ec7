"""What `megalodon eval` does with its arguments: compares a model with gzip and xz on a corpus."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from megalodon_ops.training.checkpoint import Checkpoint, load_model, tokenizer_of
from megalodon_ops.training.data import Corpus, open_corpus
from megalodon_ops.training.errors import CommandError
from megalodon_ops.training.evaluation import compare
from megalodon_ops.training.options import read_options


def run(
    path: str | None, checkpoint: str, max_bytes: int, piece: int, tokenizer: str | None
) -> int:
    """Evaluate and print the result; returns the exit code. Raises CommandError and OSError."""
    model, saved = load_model(checkpoint)
    coder = tokenizer_of(saved, checkpoint, tokenizer)
    corpus, start = (open_corpus(path), 0) if path is not None else _held_out(saved)
    stop = min(corpus.size, start + max_bytes) if max_bytes else corpus.size

    # Transient and on stderr: standard output holds the result and nothing else.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=stop - start)
        try:
            result = compare(
                model,
                corpus.pieces(start, stop, piece),
                lambda count: bar.advance(task, count),
                coder,
                piece,
            )
        except ValueError as error:  # a byte that the tokenizer has no token for
            raise CommandError(str(error)) from error
    part = "" if path is not None else ", held out"
    print(f"{corpus.name}{part}: {result.count:,} bytes, {result.model:.4f} bits/byte")
    print(f"  megalodon  {result.model:.4f}")
    print(f"  xz -9      {result.xz:.4f}")
    print(f"  gzip -9    {result.gzip:.4f}")
    return 0


def _held_out(saved: Checkpoint) -> tuple[Corpus, int]:
    """The corpus that a checkpoint was trained on and where its held-out part begins."""
    corpus = open_corpus(read_options(saved.settings.get("options", {})).data)
    start = saved.settings.get("held_out_start", corpus.size)
    if saved.settings.get("corpus") != corpus.fingerprint():
        raise CommandError(
            f"the corpus {corpus.name!r} is not the one this run was trained on; name a file to "
            "evaluate instead"
        )
    if start >= corpus.size:
        raise CommandError("this run kept no part of its corpus from training; name a file instead")
    return corpus, start
