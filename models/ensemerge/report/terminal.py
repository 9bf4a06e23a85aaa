"""The report as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ensemerge.report.scorecard import Report, Scorecard

WIDE = 120


def show(report: Report, console: Console) -> None:
    """Print the report."""
    # On a narrow terminal the figures matter more than the words.
    wide = console.width >= WIDE
    console.print(_table(report.title, report.models, wide=wide))
    if report.arms:
        console.print()
        console.print(_table("The experiment, by arm", report.arms, wide=wide))
    console.print()
    for comparison in report.comparisons:
        console.print(f"[bold]{comparison.sentence}[/bold]\n    {comparison.in_points}")


def _table(title: str, cards: Sequence[Scorecard], *, wide: bool) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    table.add_column("model", no_wrap=True)
    if wide:
        table.add_column("what it is")
        table.add_column("requests", justify="right")
    for heading in ("accuracy, 95 %", "loss", "p50 p95 p99 ms", "req/s", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for card in cards:
        words = (card.what, f"{card.rows:,}") if wide else ()
        table.add_row(card.name, *words, *_figures(card))
    return table


def _figures(card: Scorecard) -> list[str]:
    accuracy = card.accuracy
    return [
        f"{accuracy.estimate * 100:.1f} [{accuracy.low * 100:.1f}–{accuracy.high * 100:.1f}]",
        f"{card.log_loss:.3f}",
        " ".join(f"{seconds * 1e3:.1f}" for seconds in (card.p50, card.p95, card.p99)),
        f"{card.requests_per_second:,.0f}",
        f"{card.relative_cost:.2f}×",
    ]
