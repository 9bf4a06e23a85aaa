"""Progress bars for long work: one for each stage, made when the stage first reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ensemerge.progress import Notify


@contextmanager
def bars(console: Console) -> Iterator[Notify]:
    """Yields `notify(stage, done, total)`, which draws what was counted."""
    with _drawn(console, MofNCompleteColumn(), TimeElapsedColumn()) as notify:
        yield notify


@contextmanager
def byte_bar(console: Console) -> Iterator[Notify]:
    """Yields `notify(stage, done, total)` for bytes, which draws how many a second."""
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with _drawn(console, *columns) as notify:
        yield notify


@contextmanager
def _drawn(console: Console, *columns: ProgressColumn) -> Iterator[Notify]:
    tasks: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description:<32}"), BarColumn(), *columns, console=console) as progress:

        def notify(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield notify
