"""Progress of long work on stderr: a bar for a person, a line per stage for a log file."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressLine:
    """Shows stages with (done, total); use as a context manager around the work."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(title),
                BarColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`stage` has done `done` of `total` (0: unknown); a terminal shows the note beside it."""
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task(stage, total=None, note=note)
            self._bar.update(
                self._task, description=stage, completed=done, total=total or None, note=note
            )
        elif stage != self._stage:
            print(f"{self._title}: {stage}", file=sys.stderr, flush=True)
        self._stage = stage
