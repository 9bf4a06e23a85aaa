"""The report as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ensemerge.report.scorecard import Report, Scorecard


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.print(_table(report.title, report.models))
    if report.arms:
        console.print(_table("The experiment, by arm", report.arms))
    for comparison in report.comparisons:
        console.print(f"[bold]{comparison.sentence}[/bold]: {comparison.in_points}")


def _table(title: str, cards: Sequence[Scorecard]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("what it is")
    for heading in ("requests", "accuracy, 95 %", "log-loss", "p50 ms", "p95 ms", "p99 ms", "req/s", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for card in cards:
        table.add_row(*_cells(card))
    return table


def _cells(card: Scorecard) -> list[str]:
    accuracy = card.accuracy
    return [
        card.name,
        card.what,
        f"{card.rows:,}",
        f"{accuracy.estimate:.2%} [{accuracy.low * 100:.1f}–{accuracy.high * 100:.1f}]",
        f"{card.log_loss:.3f}",
        *(f"{seconds * 1e3:.2f}" for seconds in (card.p50, card.p95, card.p99)),
        f"{card.requests_per_second:,.0f}",
        f"{card.relative_cost:.2f}×",
    ]
