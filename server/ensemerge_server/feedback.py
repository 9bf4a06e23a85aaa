"""What comes back about answers: labels, and how the arms of experiments have fared by them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from ensemerge.errors import EnsemergeError, InvalidRequest, NotFound, PermissionDenied
from ensemerge_protos import ensemerge_pb2
from ensemerge_server.experiments.spec import ExperimentSpec
from ensemerge_server.rpc import Call, Deliver, Method, at_once, failing, parse
from ensemerge_server.service import Limits
from ensemerge_server.store.records import ArmTotals, Label, LabelResult, LabelStatus, Store
from ensemerge_server.store.writer import LabelsDone

LABELS_LIMIT = 100_000


class LabelSink(Protocol):
    """Where labels go: the store's writer."""

    def label(self, labels: Sequence[Label], done: LabelsDone) -> None: ...


class FeedbackService:
    """Labels and experiments."""

    def __init__(
        self, sink: LabelSink, store: Store, experiments: Mapping[str, ExperimentSpec], limits: Limits
    ) -> None:
        self._sink = sink
        self._store = store
        self._experiments = experiments
        self._limits = limits

    def methods(self) -> Mapping[str, Method]:
        return {
            "/ensemerge.v1.Ensemerge/SendLabels": self.send_labels,
            "/ensemerge.v1.Ensemerge/ListExperiments": at_once(
                ensemerge_pb2.ListExperimentsRequest, self._list_experiments
            ),
        }

    def send_labels(self, message: bytes, call: Call, deliver: Deliver) -> None:
        """SendLabels. Whoever may write labels may change a verdict, so without a token only local callers may."""
        try:
            if not call.local:
                raise PermissionDenied("labels are taken from this machine only; call from the server's own host")
            parsed = parse(ensemerge_pb2.SendLabelsRequest, message)
            if len(parsed.labels) > LABELS_LIMIT:
                raise InvalidRequest(f"{len(parsed.labels)} labels in one call; expected at most {LABELS_LIMIT}")
            judged = [self._label(label) for label in parsed.labels]
        except EnsemergeError as error:
            deliver(failing(error))
            return
        good = [label for label in judged if isinstance(label, Label)]
        self._sink.label(good, lambda results: deliver(lambda: _label_results(judged, results)))

    def _label(self, message: ensemerge_pb2.Label) -> Label | LabelResult:
        truth = message.WhichOneof("truth")
        if truth is None:
            return LabelResult(LabelStatus.INVALID, "no truth is given; expected class_index or class_name")
        if not 0 < len(message.prediction_id.encode()) <= self._limits.id_bytes:
            size = len(message.prediction_id.encode())
            message_text = f"prediction_id has {size} bytes; expected 1 to {self._limits.id_bytes}"
            return LabelResult(LabelStatus.INVALID, message_text)
        if not math.isfinite(message.time_seconds):
            return LabelResult(LabelStatus.INVALID, "time_seconds is not finite; expected seconds since 1970")
        return Label(message.prediction_id, message.row, getattr(message, truth), message.time_seconds or time.time())

    def _list_experiments(self, message: ensemerge_pb2.ListExperimentsRequest) -> ensemerge_pb2.ListExperimentsResponse:
        if message.name and message.name not in self._experiments:
            known = ", ".join(self._experiments) or "none"
            raise NotFound(f"no experiment '{message.name[:80]}'; expected one of: {known}")
        names = [message.name] if message.name else list(self._experiments)
        return ensemerge_pb2.ListExperimentsResponse(experiments=[self._experiment(name) for name in names])

    def _experiment(self, name: str) -> ensemerge_pb2.Experiment:
        spec = self._experiments[name]
        totals = {arm.arm: arm for arm in self._store.arms(name)}
        weight = sum(arm.weight for arm in spec.arms.values())
        arms = [
            _arm(arm, entry.model, entry.weight / weight, totals.get(arm, ArmTotals(arm, 0, 0, 0, 0.0, 0)))
            for arm, entry in spec.arms.items()
        ]
        return ensemerge_pb2.Experiment(name=name, unit=spec.unit, arms=arms)


def _arm(name: str, model: str, share: float, totals: ArmTotals) -> ensemerge_pb2.Arm:
    return ensemerge_pb2.Arm(
        name=name,
        model=model,
        share=share,
        predictions=totals.predictions,
        labelled=totals.labelled,
        correct=totals.correct,
        log_loss_sum=totals.log_loss_sum,
        scored=totals.scored,
    )


def _label_results(judged: Sequence[Label | LabelResult], stored: Sequence[LabelResult] | EnsemergeError) -> bytes:
    """The results in the order of the request: of the labels that were refused at the door, and of those stored."""
    if isinstance(stored, EnsemergeError):
        raise stored
    rest = iter(stored)
    results = [entry if isinstance(entry, LabelResult) else next(rest) for entry in judged]
    encoded = [ensemerge_pb2.LabelResult(status=result.status.name, message=result.message) for result in results]
    return ensemerge_pb2.SendLabelsResponse(results=encoded).SerializeToString()
