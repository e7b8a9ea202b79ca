"""What a long run is doing: one bar on a terminal, one plain line per pass everywhere else, always on stderr.

The bar has no refresh thread of its own: a thread that draws while a prefill is timed would be in the numbers. It is
drawn when a stage or a sample changes, ten times a second at most.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

REDRAW_S = 0.1


class Progress:
    """``with Progress() as progress: progress.start(48, "accuracy · pevlm")``, then `stage` and `advance`."""

    def __init__(self, terminal: bool | None = None) -> None:
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Bar | None = None
        self._what = self._stage = self._unit = ""
        self._done = self._total = 0
        self._started_s = self._drawn_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.finish()

    def start(self, total: int, what: str, unit: str = "sample") -> None:
        """A pass of `total` samples begins; `what` is for example ``accuracy · pevlm``. Ends the pass before it."""
        self.finish()
        self._what, self._stage, self._done, self._total, self._unit = what, "", 0, total, unit
        self._started_s = time.monotonic()
        if self.terminal:
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(what, total=total)
        else:
            self._line(f"{what}: {total} {unit}s")

    def stage(self, text: str) -> None:
        """What the sample in hand is at: ``decode video``, ``prefill``, …"""
        self._stage = text
        self._draw()

    def advance(self) -> None:
        """One sample is done."""
        self._done += 1
        self._draw(force=self._done == self._total)

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def finish(self) -> None:
        """The last pass is over: take the bar away."""
        if not self._what:
            return
        if self._bar:
            self._draw(force=True)
            self._bar.stop()
            self._bar = None
        else:
            self._line(f"{self._what}: {self._done}/{self._total} in {time.monotonic() - self._started_s:.1f} s")
        self._what = ""

    def _draw(self, force: bool = False) -> None:
        now_s = time.monotonic()
        if self._bar is None or (not force and now_s - self._drawn_s < REDRAW_S):
            return
        self._drawn_s = now_s
        at = f"{self._unit} {min(self._done + 1, self._total)}/{self._total}"
        text = " · ".join(part for part in (self._what, at, self._stage) if part)
        task = self._bar.task_ids[0]
        self._bar.update(task, description=self._what if force else text, completed=self._done, refresh=True)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=True),
        auto_refresh=False,
    )
