"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ensemerge.report import plots
from ensemerge.report.scorecard import Report, Scorecard


def write_page(report: Report, calibrated: Sequence[Scorecard], path: Path) -> None:
    """Write the report to `path`; `calibrated` are the models whose reliability is drawn."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text())
    drawn = {
        "accuracies": plots.accuracies(report.models),
        "costs": plots.costs(report.models, [card.name for card in calibrated]),
        "reliabilities": plots.reliabilities(calibrated),
        "latencies": plots.latencies(report.models),
    }
    path.write_text(template.render(report=report, plots=drawn))
