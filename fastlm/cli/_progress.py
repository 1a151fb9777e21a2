"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """`with Progress("step", total) as progress: progress.update(done, "3.1 bits per byte")`."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.first = name, total, done
        self.started = self._printed = time.monotonic()
        self._bar = _rich_bar() if sys.stderr.isatty() else None
        self._task = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self.name, total=self.total, completed=self.first, note=""
            )
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES or done == self.total:
            self._printed = now
            left = (now - self.started) / max(done - self.first, 1) * (self.total - done)
            text = f"{self.name} {done}/{self.total}  {note}  {_clock(left)} left"
            print(text, file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _rich_bar():
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
