"""What a report says about one model, or one arm of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemerge.measures.calibration import Reliability, reliability
from ensemerge.measures.intervals import Interval, wilson
from ensemerge.measures.scores import Floats, Integers, correct, log_losses


@dataclass(frozen=True)
class Answers:
    """What a model answered to some requests: `probabilities` `(rows, classes)`, the truth, and what it took.

    `latencies` `(rows,)` are in seconds, as the client saw them; `seconds` is how long all of them took together;
    `cost` is the model's computing time for one row, in seconds.
    """

    name: str
    what: str
    probabilities: Floats
    labels: Integers
    latencies: Floats
    seconds: float
    cost: float


@dataclass(frozen=True)
class Scorecard:
    """One line of the table. Latencies in seconds; `relative_cost` is 1 for one member."""

    name: str
    what: str
    rows: int
    accuracy: Interval
    log_loss: float
    p50: float
    p95: float
    p99: float
    requests_per_second: float
    relative_cost: float
    reliability: Reliability


@dataclass(frozen=True)
class Comparison:
    """A paired difference of two accuracies, and the sentence that it belongs to."""

    sentence: str
    difference: Interval

    @property
    def in_points(self) -> str:
        """The difference in percentage points, with its interval."""
        low, high = self.difference.low * 100, self.difference.high * 100
        return f"{self.difference.estimate * 100:+.2f} points, 95 % interval [{low:+.2f}, {high:+.2f}]"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. `facts` are pairs of what was set and to what."""

    title: str
    models: tuple[Scorecard, ...]
    arms: tuple[Scorecard, ...]
    comparisons: tuple[Comparison, ...]
    facts: tuple[tuple[str, str], ...]


def score(answers: Answers, member_cost: float) -> Scorecard:
    """Score what a model answered; `member_cost` is what one member takes for a row, in seconds."""
    hits = int(correct(answers.probabilities, answers.labels).sum())
    p50, p95, p99 = np.quantile(answers.latencies, [0.5, 0.95, 0.99])
    return Scorecard(
        name=answers.name,
        what=answers.what,
        rows=len(answers.labels),
        accuracy=wilson(hits, len(answers.labels)),
        log_loss=float(log_losses(answers.probabilities, answers.labels).mean()),
        p50=float(p50),
        p95=float(p95),
        p99=float(p99),
        requests_per_second=len(answers.labels) / answers.seconds,
        relative_cost=answers.cost / member_cost,
        reliability=reliability(answers.probabilities, answers.labels),
    )
