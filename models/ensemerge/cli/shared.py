"""What commands that make a version show of it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ensemerge.repository import Version


def show_version(version: Version, *, as_json: bool) -> None:
    """Print where a version is and what was checked."""
    assert version.manifest is not None  # it was published just now
    if as_json:
        print(version.manifest.to_json(), end="")
        return
    console = Console()
    console.print(f"[bold]{version.name}[/bold] version {version.number}: {version.folder}", soft_wrap=True)
    table = Table("check", "measured", "bound", "of what")
    for check in version.manifest.checks:
        table.add_row(check.name, f"{check.difference:.2e}", f"{check.bound:.0e}", check.detail)
    console.print(table)
