"""The `megalodon` command: train, generate, eval, convert, bench, info.

This module only reads arguments; the work is in `train_command.py`, `generate_command.py` and the
others, and in `training/`. Torch is imported inside the commands, so that `--help` and usage errors
are immediate.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as error:  # the library itself needs none of them
    raise SystemExit(
        f"megalodon: error: the command needs {error.name}; pip install 'megalodon-ops[cli]'"
    ) from None

from megalodon_ops.training.errors import CommandError

DEFAULT_OUT = "runs/megalodon"
NEEDED = ("torch", "safetensors", "matplotlib", "numpy")  # typer and rich: see the imports
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Train, evaluate and run Megalodon language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

SHAPE, SCHEDULE, REPORTS = "Model shape", "Training", "Reports and checkpoints"


def _shape(help_text: str, default: object) -> Any:
    return typer.Option(help=help_text, show_default=str(default), rich_help_panel=SHAPE)


def _training(help_text: str, default: object, panel: str = SCHEDULE) -> Any:
    return typer.Option(help=help_text, show_default=str(default), rich_help_panel=panel)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path(DEFAULT_OUT),
    data: Annotated[
        str | None,
        _training("A file or a folder of any bytes.", "the Python standard library's source"),
    ] = None,
    tokenizer: Annotated[
        str | None, _training("A tokenizer.json or a SentencePiece model.", "bytes")
    ] = None,
    pack: Annotated[
        bool | None,
        typer.Option(
            "--pack/--no-pack",
            help="Files are documents: none sees another. --no-pack: one text, end to end.",
            show_default="--pack",
            rich_help_panel=SCHEDULE,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where --out holds a run already.")
    ] = False,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this many steps; see --resume.")
    ] = None,
    steps: Annotated[int | None, _training("Length of the run in steps.", "none")] = None,
    minutes: Annotated[float | None, _training("Length of the run in minutes.", 3)] = None,
    seq_len: Annotated[int | None, _training("Bytes (or tokens) in a window.", 2048)] = None,
    batch_size: Annotated[int | None, _training("Windows in a step.", 1)] = None,
    lr: Annotated[float | None, _training("Highest learning rate.", 0.002)] = None,
    final_lr: Annotated[float | None, _training("Last rate, as a part of --lr.", 0.1)] = None,
    warmup_steps: Annotated[int | None, _training("Steps of linear warm-up.", 50)] = None,
    weight_decay: Annotated[float | None, _training("On weight matrices only.", 0.1)] = None,
    clip: Annotated[float | None, _training("Largest norm of the gradient.", 1.0)] = None,
    seed: Annotated[int | None, _training("Of weights, windows and dropout.", 0)] = None,
    dtype: Annotated[
        str | None, _training("float32, bfloat16, or auto: the faster, measured.", "auto")
    ] = None,
    threads: Annotated[int | None, _training("CPU threads; 0: torch's choice.", 0)] = None,
    held_out: Annotated[
        float | None, _training("Last part of the bytes kept from training, percent.", 5)
    ] = None,
    eval_every: Annotated[
        int | None, _training("Steps between held-out evaluations.", 200, REPORTS)
    ] = None,
    eval_bytes: Annotated[
        int | None, _training("Held-out bytes in each of them.", 32768, REPORTS)
    ] = None,
    checkpoint_every: Annotated[
        int | None, _training("Steps between checkpoints.", 200, REPORTS)
    ] = None,
    preset: Annotated[
        str | None, _shape("A released shape, such as mega200M.", "the demo's shape")
    ] = None,
    model_dim: Annotated[int | None, _shape("D", 256)] = None,
    num_layers: Annotated[int | None, _shape("Blocks.", 4)] = None,
    num_heads: Annotated[int | None, _shape("H", 1)] = None,
    z_dim: Annotated[int | None, _shape("S, all heads together.", 128)] = None,
    value_dim: Annotated[int | None, _shape("E, all heads together.", 512)] = None,
    ffn_hidden_dim: Annotated[int | None, _shape("F", 640)] = None,
    cema_ndim: Annotated[int | None, _shape("N", 16)] = None,
    chunk_size: Annotated[int | None, _shape("C", 512)] = None,
    norm_num_groups: Annotated[int | None, _shape("G", 32)] = None,
    swiglu: Annotated[bool | None, _shape("A gated feed-forward.", "no")] = None,
    share_emb: Annotated[bool | None, _shape("One matrix for embedding and output.", "yes")] = None,
    dropout: Annotated[float | None, _shape("On embedding and sub-layer outputs.", 0)] = None,
    hidden_dropout: Annotated[float | None, _shape("Inside sub-layers.", 0)] = None,
    attention_dropout: Annotated[float | None, _shape("Of attention keys.", 0)] = None,
) -> int:
    """Train a language model on text; Ctrl-C saves first, --resume continues exactly."""
    from megalodon_ops.config import MegalodonConfig
    from megalodon_ops.train_command import run
    from megalodon_ops.training.options import TrainOptions

    # None means "not given": a resumed run keeps its own value, a new one takes the default.
    values = {name: value for name, value in locals().items() if value is not None}
    shape = {f.name: values[f.name] for f in fields(MegalodonConfig) if f.name in values}
    given = {f.name: values[f.name] for f in fields(TrainOptions) if f.name in values}
    return run(out, given, shape, preset, resume, overwrite, stop_after)


def _drawing(help_text: str, default: object) -> Any:
    return typer.Option(
        help=help_text, show_default=f"{default}, or the loaded state's", rich_help_panel="Sampling"
    )


@app.command()
def generate(
    checkpoint: Annotated[
        str, typer.Option(help="A run's folder or a checkpoint file.")
    ] = DEFAULT_OUT,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompt_file: Annotated[
        str | None, typer.Option(help="Read the prompt from a file; - is standard input.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Bytes to make; 0: go on until Ctrl-C.")
    ] = 512,
    temperature: Annotated[float | None, _drawing("0: always the most likely byte.", 0.8)] = None,
    top_k: Annotated[int | None, _drawing("Choose among the k most likely; 0: all.", 0)] = None,
    top_p: Annotated[float | None, _drawing("Choose among the likeliest of this sum.", 1)] = None,
    min_p: Annotated[
        float | None, _drawing("Choose among those this likely beside the likeliest.", 0)
    ] = None,
    repetition_penalty: Annotated[
        float | None, _drawing("Above 1: what was there becomes less likely.", 1)
    ] = None,
    repetition_window: Annotated[
        int | None, _drawing("Only the last so many bytes were there; 0: all.", 0)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, show_default="random")] = None,
    beams: Annotated[
        int, typer.Option(min=0, help="Search the likeliest text with so many beams; 0: draw.")
    ] = 0,
    length_penalty: Annotated[
        float, typer.Option(help="Of beams: above 1 favours longer texts.")
    ] = 1.0,
    load_state: Annotated[
        str | None, typer.Option(help="Go on from this file of --save-state.")
    ] = None,
    save_state: Annotated[
        str | None, typer.Option(help="Write the state at the end, or at Ctrl-C, to this file.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's file; the run's own if absent.")
    ] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
    timing: Annotated[bool, typer.Option("--timing", help="Print ms/token at the end.")] = False,
) -> int:
    """Stream text from a checkpoint as it is made, at constant memory."""
    from megalodon_ops.generate_command import Request, run
    from megalodon_ops.training.checkpoint import load_model, tokenizer_of

    drawing = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "repetition_window": repetition_window,
    }
    request = Request(
        prompt,
        prompt_file,
        max_new_tokens or None,
        {name: value for name, value in drawing.items() if value is not None},
        tuple(text.encode("utf-8", "surrogateescape") for text in stop or ()),
        seed,
        beams,
        length_penalty,
        load_state,
        save_state,
        echo,
        timing,
    )
    request.check()
    model, saved = load_model(checkpoint)
    return run(model, request, tokenizer_of(saved, checkpoint, tokenizer))


@app.command(name="eval")
def evaluate(
    path: Annotated[
        str | None,
        typer.Argument(help="A file or folder; the held-out part of the run's corpus if absent."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="A run's folder or a checkpoint file.")
    ] = DEFAULT_OUT,
    max_bytes: Annotated[int, typer.Option(min=0, help="Stop after this many; 0: all.")] = 0,
    piece: Annotated[
        int, typer.Option(min=1, help="Bytes (or tokens) in one call of the model.")
    ] = 2048,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's file; the run's own if absent.")
    ] = None,
) -> int:
    """Bits per byte of any file, streamed at constant memory, next to gzip -9 and xz -9."""
    from megalodon_ops.eval_command import run

    return run(path, checkpoint, max_bytes, piece, tokenizer)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: a run's folder, an official folder, or a file.")
    ],
    target: Annotated[Path, typer.Argument(help="Where to: FILE.safetensors, or a new folder.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="safetensors, official, or hf (transformers).",
            show_default="safetensors for a file of that name, official for a folder",
        ),
    ] = None,
    num_shards: Annotated[
        int, typer.Option(min=1, help="Model-parallel ranks of an official checkpoint.")
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or float64.", show_default="the source's"),
    ] = None,
) -> int:
    """Convert between our safetensors file, official consolidated checkpoints, transformers."""
    from megalodon_ops.convert_command import run

    return run(source, target, format, num_shards, dtype)


@app.command()
def info() -> int:
    """Versions, instruction set, CUDA, threads, and the table of ops."""
    from megalodon_ops.info import show

    show(Console())
    return 0


@app.command()
def bench(
    select: Annotated[
        str, typer.Argument(help="An op's name, or any pytest -k expression; all if absent.")
    ] = "",
) -> int:
    """Run the benchmarks of a source checkout (its bench/ folder)."""

    # The checkout one stands in, or the one that an editable install comes from.
    places = [Path.cwd(), *Path(__file__).resolve().parents[2:3]]
    folder = next((p / "bench" for p in places if any(p.glob("bench/bench_*.py"))), None)
    if folder is None:
        raise CommandError("no bench/ folder here: the benchmarks are in a source checkout")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise CommandError("the benchmarks need pytest-benchmark: pip install pytest-benchmark")
    command = [sys.executable, "-m", "pytest", str(folder), "-o", "python_files=bench_*.py"]
    command += ["--benchmark-enable", "--benchmark-only", *(["-k", select] if select else [])]
    return subprocess.call(command, cwd=folder.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for an error, told in one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return int(app(arguments, prog_name="megalodon", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CommandError as error:
        return _fail(str(error), error.code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in NEEDED:
            raise
        return _fail(f"the command needs {error.name}; pip install 'megalodon-ops[cli]'")
    except MemoryError:
        return _fail("out of memory; a smaller model, --batch-size or --seq-len needs less")
    except Exception as error:
        message = _expected(error)
        if message is None:
            raise  # a bug: its traceback is the useful report
        return _fail(message)


def _expected(error: Exception) -> str | None:
    """The message of an error that is the user's to mend, or None for a bug."""
    if hasattr(error, "format_message"):  # a usage error; old and new typer have different classes
        return str(error.format_message())
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):
        return "out of memory; a smaller model, --batch-size or --seq-len needs less"
    return None


def _fail(message: str, code: int = EXIT_USAGE) -> int:
    print(f"megalodon: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
