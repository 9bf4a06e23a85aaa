from collections.abc import Sequence

import pytest

from ensemerge.errors import EnsemergeError, InvalidRequest, NotFound, PermissionDenied
from ensemerge_protos import ensemerge_pb2 as pb
from ensemerge_server.experiments.spec import Arm, ExperimentSpec
from ensemerge_server.feedback import FeedbackService
from ensemerge_server.rpc import Call, Finish, Method
from ensemerge_server.service import Limits
from ensemerge_server.store.records import ArmTotals, Committed, Label, LabelResult, LabelStatus, Prediction
from ensemerge_server.store.writer import LabelsDone

HERE = Call(local=True)


class Memory:
    """A sink and a store: every label joins, one arm of two has answered."""

    def __init__(self) -> None:
        self.labels: list[Label] = []

    def label(self, labels: Sequence[Label], done: LabelsDone) -> None:
        self.labels += labels
        done([LabelResult(LabelStatus.JOINED) for _ in labels])

    def write(self, predictions: Sequence[Prediction], labels: Sequence[Label]) -> Committed:
        raise NotImplementedError

    def arms(self, experiment: str) -> list[ArmTotals]:
        return [ArmTotals("big", 10, 4, 3, 1.5, 4)]

    def close(self) -> None: ...


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def methods(memory: Memory) -> dict[str, Method]:
    spec = ExperimentSpec({"big": Arm("a", 3.0), "small": Arm("b", 1.0)}, "user_id", "salt")
    return dict(FeedbackService(memory, memory, {"x": spec}, Limits("test", id_bytes=16)).methods())


def ask(method: Method, message: pb.SendLabelsRequest | pb.ListExperimentsRequest, call: Call = HERE) -> bytes:
    finishes: list[Finish] = []
    method(message.SerializeToString(), call, finishes.append)
    (finish,) = finishes
    return finish()


def test_labels_from_elsewhere_are_refused(methods: dict[str, Method], memory: Memory) -> None:
    message = pb.SendLabelsRequest(labels=[pb.Label(prediction_id="p", class_index=1)])
    with pytest.raises(PermissionDenied, match="from this machine only"):
        ask(methods["/ensemerge.v1.Ensemerge/SendLabels"], message, Call(local=False))
    assert memory.labels == []


def test_one_bad_label_never_fails_the_others(methods: dict[str, Method], memory: Memory) -> None:
    labels = [
        pb.Label(prediction_id="good", class_index=1),
        pb.Label(prediction_id="no truth"),
        pb.Label(prediction_id="", class_index=1),
        pb.Label(prediction_id="longer than sixteen", class_index=1),
        pb.Label(prediction_id="when", class_index=1, time_seconds=float("nan")),
        pb.Label(prediction_id="too", row=2, class_name="cat", time_seconds=5.0),
    ]
    answer = ask(methods["/ensemerge.v1.Ensemerge/SendLabels"], pb.SendLabelsRequest(labels=labels))
    results = pb.SendLabelsResponse.FromString(answer).results
    status = pb.LabelResult.Status
    assert [status.Name(result.status) for result in results] == ["JOINED", *["INVALID"] * 4, "JOINED"]
    assert [(label.prediction_id, label.row, label.truth) for label in memory.labels] == [
        ("good", 0, 1),
        ("too", 2, "cat"),
    ]
    assert memory.labels[0].time_seconds > 1e9
    assert memory.labels[1].time_seconds == 5.0


def test_bytes_that_are_no_message_are_refused(methods: dict[str, Method]) -> None:
    finishes: list[Finish] = []
    methods["/ensemerge.v1.Ensemerge/SendLabels"](b"\xff", HERE, finishes.append)
    with pytest.raises(InvalidRequest, match=r"no ensemerge\.v1\.SendLabelsRequest"):
        finishes[0]()


def test_arms_that_have_not_answered_are_listed_with_zeros(methods: dict[str, Method]) -> None:
    answer = ask(methods["/ensemerge.v1.Ensemerge/ListExperiments"], pb.ListExperimentsRequest())
    (experiment,) = pb.ListExperimentsResponse.FromString(answer).experiments
    assert [(arm.name, arm.share, arm.predictions, arm.correct) for arm in experiment.arms] == [
        ("big", 0.75, 10, 3),
        ("small", 0.25, 0, 0),
    ]
    error: type[EnsemergeError] = NotFound
    with pytest.raises(error, match="no experiment 'y'; expected one of: x"):
        ask(methods["/ensemerge.v1.Ensemerge/ListExperiments"], pb.ListExperimentsRequest(name="y"))
