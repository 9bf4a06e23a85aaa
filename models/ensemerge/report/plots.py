"""The report's plots, as SVG that stands inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensemerge.report.scorecard import Scorecard

COLOURS = ("#2f6fab", "#d9822b", "#3d9970", "#b5457b", "#6b6b6b", "#8a6d3b")
# Fixed, so that the same figures give the same file.
STYLE: Any = {"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "ensemerge", "axes.axisbelow": True}


def accuracies(cards: Sequence[Scorecard]) -> str:
    """Each model's accuracy with its interval."""
    figure, axes = _figure(7.2, 0.42 * len(cards) + 1.0)
    places = range(len(cards))[::-1]
    for place, card in zip(places, cards, strict=True):
        low, high = card.accuracy.estimate - card.accuracy.low, card.accuracy.high - card.accuracy.estimate
        axes.errorbar(card.accuracy.estimate, place, xerr=[[low], [high]], fmt="o", color=COLOURS[0], capsize=3)
        axes.annotate(
            f"{card.accuracy.estimate:.1%}",
            (card.accuracy.estimate, place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(list(places), [card.name for card in cards])
    axes.set_ylim(-0.6, len(cards) - 0.3)
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("accuracy on the stream, with 95 % interval")
    return _svg(figure)


def reliabilities(cards: Sequence[Scorecard]) -> str:
    """Reliability diagrams side by side: accuracy against confidence, in bins of equal mass."""
    figure, grid = pyplot.subplots(1, len(cards), figsize=(2.9 * len(cards), 3.0), sharey=True, squeeze=False)
    for axes, card, colour in zip(grid[0], cards, COLOURS, strict=False):
        axes.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=1, linestyle="--")
        axes.plot(card.reliability.confidence, card.reliability.accuracy, marker="o", markersize=3, color=colour)
        axes.set_title(f"{card.name}\ncalibration error {card.reliability.calibration_error:.3f}", fontsize=9)
        axes.set_xlabel("confidence")
        _plain(axes)
    grid[0][0].set_ylabel("accuracy")
    return _svg(figure)


def costs(cards: Sequence[Scorecard], named: Sequence[str]) -> str:
    """Accuracy against what a row costs, relative to one member. Cards that are not `named` share one colour."""
    figure, axes = _figure(7.2, 3.4)
    others = [card for card in cards if card.name not in named]
    axes.plot(
        [card.relative_cost for card in others],
        [card.accuracy.estimate for card in others],
        "o", color="#b9c2cc", label="single networks",
    )  # fmt: skip
    for card, colour in zip([card for card in cards if card.name in named], COLOURS, strict=False):
        axes.plot(card.relative_cost, card.accuracy.estimate, "o", color=colour, markersize=8, label=card.name)
    axes.set_xlim(0, max(card.relative_cost for card in cards) * 1.1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("computing time for one row, relative to one member")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def latencies(cards: Sequence[Scorecard]) -> str:
    """Median, 95th and 99th percentile of each model's latency."""
    figure, axes = _figure(7.2, 0.42 * len(cards) + 1.0)
    places = range(len(cards))[::-1]
    for place, card in zip(places, cards, strict=True):
        axes.plot([card.p50 * 1e3, card.p99 * 1e3], [place, place], color="#cccccc", linewidth=2)
    for name, marker, colour in (("p50", "o", COLOURS[0]), ("p95", "s", COLOURS[1]), ("p99", "D", COLOURS[3])):
        values = [getattr(card, name) * 1e3 for card in cards]
        axes.plot(values, list(places), marker, color=colour, label=name, markersize=5, linestyle="none")
    axes.set_yticks(list(places), [card.name for card in cards])
    axes.set_xlim(left=0)
    axes.set_xlabel("latency that the client saw, milliseconds")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(width, height))
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(color="#eeeeee")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure) -> str:
    """A figure as an `<svg>` element."""
    buffer = io.StringIO()
    with pyplot.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
