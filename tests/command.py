"""The `megalodon` command as its tests call it: options of a tiny run, calls, what they tell.

Importing it skips the tests where a package of the command is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("torch", "safetensors.torch", "typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

from megalodon_ops import cli  # noqa: E402
from megalodon_ops.training.metrics import read_metrics  # noqa: E402

TEXT = "".join(f"line {i}: the {i * i} quick brown foxes, é€😀\n" for i in range(120)).encode()
SIZES = {
    "model-dim": 16,
    "num-layers": 2,
    "z-dim": 8,
    "value-dim": 12,
    "ffn-hidden-dim": 16,
    "cema-ndim": 2,
    "chunk-size": 8,
    "norm-num-groups": 4,
}
SHAPE = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
TINY = [*SHAPE, "--seq-len=20", "--batch-size=2", "--dtype=float32", "--eval-bytes=40"]


def train(out: Path, *arguments: object) -> int:
    return cli.main(["train", "--out", str(out), *map(str, arguments)])


def train_records(out: Path) -> list[tuple[float, ...]]:
    keys = ("step", "bits_per_byte", "gradient_norm", "lr")
    return [tuple(r[k] for k in keys) for r in read_metrics(out) if r["kind"] == "train"]


def one_line(capfd: pytest.CaptureFixture[str], code: int) -> str:
    """The error told on stderr: one line, exit code 2, no traceback."""
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("megalodon: error: ")
    assert error.count("\n") == 1, error
    return error


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megalodon_ops", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
