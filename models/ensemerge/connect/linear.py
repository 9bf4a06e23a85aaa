"""The straight line between the weights of two networks, and the barrier on it.

Networks between which the loss does not rise are linearly connected; those trained apart hardly ever are, until their
units are brought into one order (Frankle, Dziugaite, Roy and Carbin 2020, arXiv 1912.05671; Entezari, Sedghi, Saukh
and Neyshabur 2022, arXiv 2110.06296).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.connect.labelled import Scores
from ensemerge.errors import InvalidData
from ensemerge.graph.pairing import pair_weights
from ensemerge.graph.surgery import held_tensors, with_weights
from ensemerge.progress import Notify, silent

Score = Callable[[ir.Model], Scores]
Prepare = Callable[[ir.Model, float], ir.Model]


@dataclass(frozen=True)
class Point:
    """The network at (1 − t) a + t b, and how well it does."""

    t: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """The points of a line, from t = 0 to t = 1."""

    points: tuple[Point, ...]

    @property
    def loss_barrier(self) -> float:
        """How far the loss rises above the straight line between its ends at most; 0 where it never does."""
        return self._height([point.loss for point in self.points])

    @property
    def error_barrier(self) -> float:
        """The same of the share of rows that are named wrongly."""
        return self._height([1.0 - point.accuracy for point in self.points])

    def _height(self, values: list[float]) -> float:
        t = np.array([point.t for point in self.points])
        excess = np.array(values) - ((1 - t) * values[0] + t * values[-1])
        return float(max(excess.max(), 0.0))


def barrier(a: ir.Model, b: ir.Model, points: int, score: Score, prepare: Prepare, notify: Notify = silent) -> Curve:
    """Walk from `a` to `b` in a straight line and score the network at `points` places, both ends among them.

    Weights are paired by the structure of the graphs. `prepare(model, t)` restores what weights alone do not carry
    over; the ends are prepared as well. `notify` is called after each point. Raises InvalidData for fewer than 3
    points, StructureMismatch when the networks are not alike, and what `score` and `prepare` raise.
    """
    if points < 3:
        raise InvalidData(f"expected at least 3 points, the two networks and one between them; got {points}")
    line = Line(a, b)
    found: list[Point] = []
    for t in np.linspace(0.0, 1.0, points).tolist():
        scores = score(prepare(line.at(t), t))
        found.append(Point(t, scores.loss, scores.accuracy))
        notify("barrier", len(found), points)
    return Curve(tuple(found))


def as_it_is(model: ir.Model, _t: float) -> ir.Model:
    """Prepares nothing."""
    return model


class Line:
    """All networks (1 − t) a + t b, as graphs like `a`'s. Raises StructureMismatch when `b`'s is another."""

    def __init__(self, a: ir.Model, b: ir.Model) -> None:
        ours, theirs = held_tensors(a), held_tensors(b)
        self._graph = a
        self._ends = {name: (ours[name], theirs[other]) for name, other in pair_weights(a, b).items()}

    def at(self, t: float) -> ir.Model:
        """The network at `t`; at 0 and 1 the weights are those of `a` and `b`, bit by bit."""
        return with_weights(
            self._graph, {name: _between(a.numpy(), b.numpy(), t) for name, (a, b) in self._ends.items()}
        )


def _between(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """(1 − t) a + t b, computed in float64; what is equal stays, infinities of masks too."""
    differ = a != b
    mixed = a.copy()
    # A weight that is infinite in one network alone becomes no number at all, which the scores refuse.
    with np.errstate(invalid="ignore"):
        mixed[differ] = (1 - t) * a[differ].astype(np.float64) + t * b[differ].astype(np.float64)
    return mixed
