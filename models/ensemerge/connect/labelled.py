"""How well a classifier does on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidData
from ensemerge.graph.feeds import read_arrays
from ensemerge.graph.run import Arrays, Runner
from ensemerge.measures.scores import Integers, accuracy, log_losses, softmax
from ensemerge.repository import Task

LABELS = "labels"


@dataclass(frozen=True)
class Scores:
    """Mean log-loss in nats, and the share of rows whose most probable class is the label."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Labelled:
    """Rows by input name, arrays `(rows, …)`, and the class of each, `(rows,) int`."""

    feeds: Arrays
    labels: Integers

    def score(self, model: ir.Model, task: Task) -> Scores:
        """Run the network. Raises InvalidData where rows or labels do not fit it or its answer is not finite."""
        answers = Runner(model).run(self.feeds, [task.output])[task.output].astype(np.float64)
        if not np.isfinite(answers).all():
            raise InvalidData(f"the answers '{task.output}' are not finite; check the data and the weights")
        self._check(answers, task)
        probabilities = softmax(answers) if task.scale == "logits" else answers
        loss = float(log_losses(probabilities, self.labels).mean())
        return Scores(loss, accuracy(probabilities, self.labels))

    def _check(self, answers: np.ndarray, task: Task) -> None:
        if answers.ndim != 2 or len(answers) != len(self.labels):
            raise InvalidData(
                f"expected one row of '{task.output}' for each of {len(self.labels)} labels, got {list(answers.shape)}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= answers.shape[1]:
            raise InvalidData(
                f"expected labels from 0 to {answers.shape[1] - 1}, the columns of '{task.output}'; got {low} to {high}"
            )


def read_labelled(path: Path) -> Labelled:
    """An .npz file with one array for each input and the classes as `labels`. Raises InvalidData."""
    feeds = dict(read_arrays(path))
    labels = feeds.pop(LABELS, None)
    if labels is None:
        raise InvalidData(f"{path} has no '{LABELS}', only {sorted(feeds)}; expected the class of each row")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidData(f"{path}: expected '{LABELS}' as whole numbers (rows,), got {labels.dtype} {labels.shape}")
    return Labelled(feeds, labels.astype(np.int64))
