"""What commands that make a version show of it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ensemerge.repository import Task, Version


def _task_line(task: Task | None) -> str:
    if task is None:
        return "no task: the graph does not tell what its output means; state it, or labels cannot be scored"
    return f"task: {task.kind} by '{task.output}' ({task.scale}), {len(task.classes)} classes"


def show_version(version: Version, *, as_json: bool) -> None:
    """Print where a version is and what was checked."""
    assert version.manifest is not None  # it was published just now
    if as_json:
        print(version.manifest.to_json(), end="")
        return
    console = Console()
    console.print(f"{version.name} version {version.number}: {version.folder}", markup=False, soft_wrap=True)
    console.print(_task_line(version.manifest.task), markup=False)
    table = Table("check", "measured", "bound", "of what")
    for check in version.manifest.checks:
        table.add_row(check.name, f"{check.difference:.2g}", f"{check.bound:.0g}", escape(check.detail))
    console.print(table)
