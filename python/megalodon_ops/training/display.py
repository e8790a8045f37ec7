"""What a training run shows: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 10.0


def clock(seconds: float) -> str:
    """`75.2` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Display:
    """Shows the progress of one run; used as a context manager around its loop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -float("inf")
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=console
            )
            self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(
        self, step: int, progress: float, bits: float, tokens_per_second: float, left: float
    ) -> None:
        """Show one finished step: smoothed bits per byte, speed, and seconds left."""
        text = (
            f"step {step}  {bits:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s  "
            f"{clock(left)} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(1.0, progress), description=text)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{100 * min(1.0, progress):3.0f}%  {text}")
