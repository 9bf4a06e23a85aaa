import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ensemerge.measures.intervals import Interval
from ensemerge.report.page import write_page
from ensemerge.report.scorecard import Answers, Comparison, Report, Scorecard, score
from ensemerge.report.terminal import show


def card(name: str, seed: int = 0) -> Scorecard:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(3), 200)
    labels = np.where(generator.random(200) < 0.7, probabilities.argmax(axis=1), 0)
    answers = Answers(name, "what <it> is", probabilities, labels, generator.random(200) / 100, 2.0, 3e-5)
    return score(answers, member_cost=2e-5)


@pytest.fixture
def report() -> Report:
    comparison = Comparison("One against <the other>", Interval(0.0123, -0.001, 0.02))
    return Report(
        "A title", (card("digits-ensemble"), card("digits-collapsed", 1)), (card("arm a"),), (comparison,), ()
    )


def test_a_scorecard_measures_what_it_says() -> None:
    scored = card("x")
    assert (scored.rows, scored.requests_per_second) == (200, 100.0)
    assert scored.relative_cost == pytest.approx(1.5)
    assert scored.accuracy.low < scored.accuracy.estimate < scored.accuracy.high
    assert scored.p50 <= scored.p95 <= scored.p99


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_terminal(report: Report, width: int) -> None:
    file = io.StringIO()
    show(report, Console(file=file, width=width))
    shown = file.getvalue()
    assert "…" not in shown
    assert "+1.23 points, 95 % interval [-0.10, +2.00]" in shown
    assert ("what <it> is" in shown) == (width == 140)


def test_the_page_stands_alone_and_escapes_what_it_shows(report: Report, tmp_path: Path) -> None:
    write_page(report, report.models, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "One against &lt;the other&gt;" in page
    assert "<script" not in page
    write_page(report, report.models, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
