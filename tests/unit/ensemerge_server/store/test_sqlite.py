import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemerge.errors import Unavailable
from ensemerge.repository import Task
from ensemerge_server.store.records import ArmTotals, Committed, Label, LabelStatus, Prediction
from ensemerge_server.store.sqlite import SqliteStore

TASK = Task("classification", "logits", "logits", ("cat", "dog", "emu"))
# Two rows: the first says dog, the second emu.
OUTPUT = np.log(np.array([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], np.float32))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state" / "store.sqlite")
    yield store
    store.close()


def prediction(prediction_id: str = "p1", **changes: Any) -> Prediction:
    fields: dict[str, Any] = {
        "client_id": "",
        "model": "pets",
        "version": "1",
        "experiment": "",
        "arm": "",
        "time_seconds": 100.0,
        "rows": 2,
        "task": TASK,
        "output": OUTPUT,
        **changes,
    }
    return Prediction(prediction_id, **fields)


def label(prediction_id: str = "p1", row: int = 0, truth: int | str = 1, time_seconds: float = 200.0) -> Label:
    return Label(prediction_id, row, truth, time_seconds)


def statuses(committed: Committed) -> list[LabelStatus]:
    return [result.status for result in committed.results]


def test_a_label_joins_its_row_and_scores_it(store: SqliteStore) -> None:
    store.write([prediction()], [])
    committed = store.write([], [label(row=0, truth=1), label(row=1, truth="cat")])
    assert statuses(committed) == [LabelStatus.JOINED] * 2
    assert [scored.correct for scored in committed.scored] == [True, False]
    losses = [scored.log_loss for scored in committed.scored]
    assert losses == pytest.approx(-np.log([0.7, 0.1]), rel=1e-5)


def test_a_label_in_the_transaction_of_its_prediction_joins(store: SqliteStore) -> None:
    assert statuses(store.write([prediction()], [label()])) == [LabelStatus.JOINED]


def test_the_same_label_twice_counts_once(store: SqliteStore) -> None:
    committed = store.write([prediction()], [label(), label(), label(truth="dog")])
    assert statuses(committed) == [LabelStatus.JOINED, LabelStatus.DUPLICATE, LabelStatus.DUPLICATE]
    assert len(committed.scored) == 1


def test_of_two_truths_the_later_holds_and_neither_is_lost(store: SqliteStore, tmp_path: Path) -> None:
    store.write([prediction(experiment="x", arm="a")], [label(truth=0, time_seconds=200)])
    overruled = store.write([], [label(truth=1, time_seconds=300)])
    outdated = store.write([], [label(truth=2, time_seconds=250)])
    assert statuses(overruled) + statuses(outdated) == [LabelStatus.CONFLICT] * 2
    assert not overruled.scored
    assert "this later label holds" in overruled.results[0].message
    assert "still holds" in outdated.results[0].message
    assert rounded(store.arms("x")) == [ArmTotals("a", 2, 1, 1, 0.3567, 1)]
    history = query(tmp_path, "SELECT truth, time_seconds, reason FROM label_history ORDER BY truth")
    assert history == [(0, 200.0, "overruled"), (2, 250.0, "overruled")]


def test_a_label_before_its_prediction_waits_and_joins(store: SqliteStore, tmp_path: Path) -> None:
    early = store.write([], [label("client-7"), label("client-7"), label("client-7", truth=2, time_seconds=300)])
    assert statuses(early) == [LabelStatus.PENDING, LabelStatus.DUPLICATE, LabelStatus.CONFLICT]
    committed = store.write([prediction(client_id="client-7")], [])
    assert [result.status for result in committed.late_results] == [LabelStatus.JOINED, LabelStatus.CONFLICT]
    assert [scored.correct for scored in committed.scored] == [True]
    assert query(tmp_path, "SELECT truth FROM labels") == [(2,)]
    assert query(tmp_path, "SELECT COUNT(*) FROM pending_labels") == [(0,)]


def test_a_waiting_label_that_cannot_hold_goes_to_the_history(store: SqliteStore, tmp_path: Path) -> None:
    store.write([], [label(row=9), label(row=0, truth="yak")])
    committed = store.write([prediction()], [])
    assert [result.status for result in committed.late_results] == [LabelStatus.INVALID] * 2
    reasons = query(tmp_path, "SELECT reason FROM label_history ORDER BY row")
    assert "class 'yak' is unknown; 'pets' has 3 classes: cat, dog, emu" in reasons[0][0]
    assert "row 9 does not exist; the prediction has 2 rows" in reasons[1][0]


def test_a_later_label_that_cannot_hold_does_not_displace_one_that_can(store: SqliteStore, tmp_path: Path) -> None:
    store.write([], [label(truth=1, time_seconds=200), label(truth="yak", time_seconds=300)])
    committed = store.write([prediction()], [])
    assert [result.status for result in committed.late_results] == [LabelStatus.JOINED, LabelStatus.INVALID]
    assert query(tmp_path, "SELECT truth FROM labels") == [(1,)]


def test_an_answer_of_no_rows_has_none_to_label(store: SqliteStore) -> None:
    committed = store.write([prediction(rows=0, output=OUTPUT[:0])], [label()])
    assert "the prediction has 0 rows" in committed.results[0].message


def test_an_answer_that_is_not_a_number_has_no_log_loss(store: SqliteStore) -> None:
    (scored,) = store.write([prediction(output=OUTPUT * np.nan)], [label(truth=0)]).scored
    assert (scored.correct, scored.log_loss) == (False, None)


def test_probabilities_above_one_cost_nothing(store: SqliteStore) -> None:
    task = Task("classification", "y", "probabilities", TASK.classes)
    (scored,) = store.write([prediction(task=task, output=np.full((2, 3), 1.5, np.float32))], [label()]).scored
    assert scored.log_loss == 0.0


def test_servers_that_start_together_share_a_new_store(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: SqliteStore(tmp_path / "store.sqlite"), range(8)))
    for number, one in enumerate(stores):
        one.write([prediction(f"p{number}")], [label(f"p{number}")])
        one.close()


def test_a_clients_id_stands_for_its_prediction_while_it_is_unique(store: SqliteStore, tmp_path: Path) -> None:
    first = store.write([prediction("p1", client_id="c")], [label("c")])
    second = store.write([prediction("p2", client_id="c")], [label("c", row=1), label("p2")])
    assert statuses(first) == [LabelStatus.JOINED]
    assert (first.reused_ids, second.reused_ids) == (0, 1)
    assert statuses(second) == [LabelStatus.AMBIGUOUS, LabelStatus.JOINED]
    assert "2 predictions share this client id" in second.results[0].message
    assert query(tmp_path, "SELECT id, row FROM pending_labels") == [("c", 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (label(row=2), "row 2 does not exist"),
        (label(truth=3), "class 3 is unknown"),
        (label(truth=-1), "class -1 is unknown"),
        (label(truth="Dog"), "class 'Dog' is unknown"),
    ],
)
def test_a_label_that_can_never_hold_is_told_so(store: SqliteStore, wrong: Label, message: str) -> None:
    committed = store.write([prediction()], [wrong])
    assert statuses(committed) == [LabelStatus.INVALID]
    assert message in committed.results[0].message


def test_answers_without_a_task_keep_their_labels_unscored(store: SqliteStore) -> None:
    committed = store.write([prediction(task=None, output=None)], [label(truth=12345), label(row=1, truth="cat")])
    assert statuses(committed) == [LabelStatus.JOINED, LabelStatus.INVALID]
    assert [(scored.correct, scored.log_loss) for scored in committed.scored] == [(None, None)]


def test_wide_answers_keep_their_class_but_no_probabilities(store: SqliteStore) -> None:
    output = np.zeros((1, 101), np.float32)
    output[0, 77] = 1
    wide = prediction(task=Task("classification", "y", "logits"), output=output, rows=1)
    (scored,) = store.write([wide], [label(truth=77)]).scored
    assert (scored.correct, scored.log_loss) == (True, None)


def test_totals_of_arms_are_recomputed_from_what_is_stored(store: SqliteStore) -> None:
    store.write(
        [prediction(f"p{number}", experiment="x", arm="a" if number % 2 else "b") for number in range(6)],
        [label(f"p{number}", row=1, truth=2) for number in range(3)],
    )
    # -ln 0.6, once and twice.
    assert rounded(store.arms("x")) == [ArmTotals("a", 6, 1, 1, 0.5108, 1), ArmTotals("b", 6, 2, 2, 1.0217, 2)]
    assert store.arms("y") == []


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    first = SqliteStore(path)
    first.write([prediction(experiment="x", arm="a")], [label()])
    first.close()
    second = SqliteStore(path)
    assert statuses(second.write([], [label()])) == [LabelStatus.DUPLICATE]
    assert second.arms("x")[0].labelled == 1
    second.close()


def test_a_store_of_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(Unavailable, match="written by a newer ensemerge"):
        SqliteStore(path)


def test_a_file_that_is_no_store_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"this is no database, it is a sentence" * 100)
    with pytest.raises(Unavailable, match=r"cannot open the store .*store\.sqlite.*check the disk"):
        SqliteStore(path)


def test_a_failed_transaction_keeps_nothing_and_the_next_one_works(store: SqliteStore) -> None:
    store.write([prediction("p1")], [])
    with pytest.raises(Unavailable, match="cannot write to the store"):
        store.write([prediction("p2"), prediction("p1")], [label("p2")])
    assert statuses(store.write([prediction("p2")], [label("p2")])) == [LabelStatus.JOINED]


def rounded(totals: list[ArmTotals]) -> list[ArmTotals]:
    return [replace(arm, log_loss_sum=round(arm.log_loss_sum, 4)) for arm in totals]


def query(tmp_path: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(tmp_path / "state" / "store.sqlite")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_the_first_transaction_may_fail_without_spoiling_the_second(store: SqliteStore) -> None:
    with pytest.raises(Unavailable):
        store.write([prediction("p1"), prediction("p1")], [])
    assert statuses(store.write([prediction("p1")], [label("p1", truth="dog")])) == [LabelStatus.JOINED]


def test_classes_are_known_even_where_the_answer_left_out_their_output(store: SqliteStore) -> None:
    committed = store.write([prediction(output=None)], [label(truth="dog"), label(row=1, truth=99)])
    assert statuses(committed) == [LabelStatus.JOINED, LabelStatus.INVALID]
