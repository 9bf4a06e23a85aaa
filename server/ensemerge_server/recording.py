"""What is written down about an answer when it leaves: metrics, and the prediction that a label may come for."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass

import numpy as np

from ensemerge_server.catalogue import Deployed
from ensemerge_server.metrics import Metrics
from ensemerge_server.servable import Reply, Request
from ensemerge_server.store.records import Prediction
from ensemerge_server.store.writer import StoreWriter


class PredictionIds:
    """Ids that no other process issues: when this one started, some randomness, and a counter."""

    def __init__(self) -> None:
        self._prefix = f"{time.time_ns() // 1_000_000:012x}-{os.urandom(6).hex()}"
        self._counter = itertools.count()

    def next(self) -> str:
        return f"{self._prefix}-{next(self._counter):x}"


@dataclass(frozen=True)
class Recorder:
    """Records each answer once."""

    metrics: Metrics
    writer: StoreWriter
    ids: PredictionIds

    def answered(self, deployed: Deployed, request: Request, reply: Reply, seconds: float) -> str:
        """Record a reply that is about to leave and give it its prediction id."""
        prediction_id = self.ids.next()
        self.metrics.answered(deployed.name, reply, seconds)
        self.writer.log(_prediction(prediction_id, deployed, request, reply))
        return prediction_id


def _scorable(output: np.ndarray | None) -> np.ndarray | None:
    """An output that names a class for each row: `(rows, classes)` numbers, at least one of each."""
    if output is None or output.ndim != 2 or output.size == 0 or output.dtype.kind not in "fiu":
        return None
    return output


def _prediction(prediction_id: str, deployed: Deployed, request: Request, reply: Reply) -> Prediction:
    task = deployed.task if deployed.task is not None and deployed.task.kind == "classification" else None
    output = None if task is None else _scorable(reply.outputs.get(task.output))
    return Prediction(
        prediction_id=prediction_id,
        client_id=request.id,
        model=deployed.name,
        version=reply.version,
        experiment=str(reply.parameters.get("experiment", "")),
        arm=str(reply.parameters.get("arm", "")),
        time_seconds=time.time(),
        rows=request.rows if output is None else len(output),
        task=task,
        output=output,
    )
