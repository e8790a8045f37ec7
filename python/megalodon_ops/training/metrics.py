"""A run's numbers: `metrics.jsonl`, one JSON object a line, and the loss curve `loss.png`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalodon_ops._atomic import write_atomically
from megalodon_ops.training.errors import CommandError

FILE_NAME = "metrics.jsonl"
CURVE_NAME = "loss.png"
SMOOTHING = 0.95


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run; a last line cut short by a crash is left out."""
    path = folder / FILE_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


class MetricsLog:
    """Appends records, each flushed, so that another program can follow the file.

    Records after `keep_until_step` (of a run that went on past its last checkpoint and was killed)
    are dropped first: the resumed run writes them again.
    """

    def __init__(self, folder: Path, keep_until_step: int) -> None:
        self._path = folder / FILE_NAME
        kept = [
            record for record in read_metrics(folder) if record.get("step", 0) <= keep_until_step
        ]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        try:
            write_atomically(self._path, text.encode())
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {self._path}: {error.strerror}") from error

    def write(self, kind: str, step: int, **values: float | int | str | None) -> None:
        """Append `{"kind": kind, "step": step, ...}`."""
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise CommandError(
                f"cannot write {self._path}: {error.strerror}; the last checkpoint is intact"
            ) from error

    def close(self) -> None:
        """Close the file; what a full disk left in the buffer is given up."""
        with contextlib.suppress(OSError):
            self._file.close()


def draw_loss_curve(folder: Path) -> Path:
    """Draw the training and held-out loss of the run in `folder` as `loss.png`."""
    # Imported here: matplotlib takes half a second, and only this needs it. The figure is made
    # without pyplot, which would look for a display and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(read_metrics(folder))
    train = [(r["step"], r["bits_per_byte"]) for r in records if r.get("kind") == "train"]
    held_out = [(r["step"], r["bits_per_byte"]) for r in records if r.get("kind") == "eval"]
    smooth: list[float] = []
    for _, value in train:
        smooth.append(value if not smooth else SMOOTHING * smooth[-1] + (1 - SMOOTHING) * value)

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in train]
    axes.plot(
        steps, [value for _, value in train], color="0.8", linewidth=0.8, label="training step"
    )
    axes.plot(steps, smooth, color="C0", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="bits per byte", title=str(folder.name))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)  # type: ignore[no-untyped-call]
    path = folder / CURVE_NAME
    try:
        write_atomically(path, picture.getvalue())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    return path
