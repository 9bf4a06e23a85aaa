"""What goes into the store and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from ensemerge.repository import Task


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer: who gave it, and what it said, `(rows, classes)` on the task's scale.

    `output` is None for a model that states no classification: its labels are kept but cannot be scored.
    """

    prediction_id: str
    client_id: str
    model: str
    version: str
    experiment: str
    arm: str
    time_seconds: float
    rows: int
    task: Task | None
    output: np.ndarray | None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes: the task's, or their indices where the output tells how many there are."""
        if self.task is None or self.task.classes or self.output is None:
            return self.task.classes if self.task else ()
        return tuple(str(index) for index in range(self.output.shape[-1]))


@dataclass(frozen=True, slots=True)
class Label:
    """The truth about one row of one answer, a class by its index or by its name.

    `prediction_id` is the server's, or the client's own id while that is unique.
    """

    prediction_id: str
    row: int
    truth: int | str
    time_seconds: float


class LabelStatus(Enum):
    """What became of a label. The values are the words of the metrics."""

    JOINED = "joined"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    PENDING = "pending"
    AMBIGUOUS = "ambiguous"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class LabelResult:
    status: LabelStatus
    message: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """A row that got its first label. `correct` and `log_loss` (nats) are None where they cannot be told."""

    model: str
    version: str
    arm: str
    correct: bool | None
    log_loss: float | None


@dataclass(frozen=True)
class Committed:
    """What one transaction did: a result for each label, in order, the rows that are labelled since, and reused ids."""

    results: Sequence[LabelResult] = ()
    scored: Sequence[Scored] = ()
    reused_ids: int = 0
    # Labels that waited for a prediction and met it in this transaction.
    late_results: Sequence[LabelResult] = ()


@dataclass(frozen=True, slots=True)
class ArmTotals:
    """How an arm has fared: rows answered, labelled, right, and the summed log-loss of the `scored` ones."""

    arm: str
    predictions: int
    labelled: int
    correct: int
    log_loss_sum: float
    scored: int


class Store(Protocol):
    """Predictions and labels on disk. One thread owns a store; `arms` may be called from any."""

    def write(self, predictions: Sequence[Prediction], labels: Sequence[Label]) -> Committed:
        """Store both, predictions first, in one transaction: all of it is on disk afterwards, or nothing."""
        ...

    def arms(self, experiment: str) -> list[ArmTotals]:
        """The totals of each arm of an experiment that has answered."""
        ...

    def close(self) -> None: ...
