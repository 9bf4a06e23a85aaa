"""Labels as they come in life: late, early, twice, wrong, for rows, by the client's own id, and to a killed server."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.graphs import images
from support.servers import RunningServer, running

from ensemerge_client import Client, Label, LabelStatus, Unavailable

X = images(4)


@pytest.fixture
def fresh(repository: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose counters start at zero."""
    with running(repository, tmp_path / "state") as server:
        yield server


def statuses(client: Client, *labels: Label) -> list[str]:
    return [result.status.name for result in client.send_labels(labels)]


def test_every_way_a_label_can_come(fresh: RunningServer) -> None:
    with Client(fresh.grpc) as client:
        answer = client.infer("a", {"image": X}, id="mine")
        predicted = [int(row) for row in answer["logits"].argmax(axis=1)]
        batch = [Label(answer.prediction_id, row, predicted[row]) for row in range(3)]
        wrong = (predicted[3] + 1) % 3
        assert statuses(client, *batch) == ["JOINED"] * 3
        assert statuses(client, batch[0]) == ["DUPLICATE"]
        assert statuses(client, Label("mine", 3, wrong)) == ["JOINED"]
        assert statuses(client, Label("mine", 3, predicted[3])) == ["CONFLICT"]
        assert statuses(client, Label("never-seen", 0, 1)) == ["PENDING"]
        assert statuses(client, Label(answer.prediction_id, 4, 1), Label(answer.prediction_id, 0, 3)) == ["INVALID"] * 2
        assert statuses(client, Label("early", 0, 1)) == ["PENDING"]
        client.infer("a", {"image": X[:1]}, id="early")
        client.infer("a", {"image": X[:1]}, id="mine")
        assert statuses(client, Label("mine", 0, 1)) == ["AMBIGUOUS"]
        assert statuses(client, Label("early", 0, 1)) == ["DUPLICATE"]

    counted = {
        status: fresh.metric("ensemerge_labels_total", result=status.lower()) for status in LabelStatus.__members__
    }
    assert counted == {"JOINED": 4, "DUPLICATE": 2, "CONFLICT": 1, "PENDING": 2, "AMBIGUOUS": 1, "INVALID": 2}
    assert fresh.metric("ensemerge_late_joins_total") == 1
    assert fresh.metric("ensemerge_reused_client_ids_total") == 1
    # Three right ones, one wrong (its correction is in the store, a counter never goes down), one that came early.
    assert fresh.metric("ensemerge_labelled_total", model="a") == 5
    early_is_right = int(predicted[0] == 1)
    assert fresh.metric("ensemerge_correct_total", model="a") == 3 + early_is_right


def test_classes_go_by_name_as_well(fresh: RunningServer) -> None:
    with Client(fresh.grpc) as client:
        answer = client.infer("ensemble", {"image": X})
        results = client.send_labels([Label(answer.prediction_id, 0, "2"), Label(answer.prediction_id, 1, "yak")])
    assert [result.status.name for result in results] == ["JOINED", "INVALID"]
    assert "'ensemble' has 3 classes: 0, 1, 2" in results[1].message


def test_the_arms_of_an_experiment_are_told_apart(fresh: RunningServer) -> None:
    with Client(fresh.grpc) as client:
        answers = [client.infer("digits", {"image": X}, parameters={"user_id": f"u{n}"}) for n in range(30)]
        truths = np.random.default_rng(0).integers(3, size=(30, 4))
        labels = [
            Label(a.prediction_id, r, int(t))
            for a, rows in zip(answers, truths, strict=True)
            for r, t in enumerate(rows)
        ]
        assert set(statuses(client, *labels)) == {"JOINED"}
        (report,) = client.experiments("digits")
    assert (report.name, report.unit) == ("digits", "user_id")
    for arm in report.arms:
        mine = [n for n, answer in enumerate(answers) if answer.arm == arm.name]
        probabilities = np.concatenate([answers[n]["probabilities"] for n in mine])
        truth = truths[mine].ravel()
        assert (arm.model, arm.share, arm.predictions, arm.labelled) == (arm.name, 0.5, 4 * len(mine), 4 * len(mine))
        assert arm.correct == int((probabilities.argmax(axis=1) == truth).sum())
        losses = -np.log(probabilities[np.arange(len(truth)), truth])
        assert arm.log_loss_sum == pytest.approx(losses.sum(), rel=1e-4)
        assert fresh.metric("ensemerge_labelled_total", model="digits", arm=arm.name) == arm.labelled


def test_a_killed_server_keeps_every_label_it_acknowledged(repository: Path, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server, Client(server.grpc) as client:
        answers = [client.infer("a", {"image": X}) for _ in range(200)]
        acknowledged: list[Label] = []
        enough = threading.Event()

        def send() -> None:
            for answer in answers:
                label = Label(answer.prediction_id, 0, 1)
                try:
                    (result,) = client.send_labels([label])
                except Unavailable:
                    return
                assert result.status is LabelStatus.JOINED
                acknowledged.append(label)
                if len(acknowledged) == 20:
                    enough.set()

        sender = threading.Thread(target=send)
        sender.start()
        assert enough.wait(30)
        server.kill()
        sender.join(30)
    assert len(acknowledged) >= 20
    with running(repository, tmp_path) as again, Client(again.grpc) as client:
        assert set(statuses(client, *acknowledged)) == {"DUPLICATE"}
