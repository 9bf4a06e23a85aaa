"""The store in one SQLite file: write-ahead log, one writer, labels synced to disk before they are acknowledged."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from ensemerge.ensemble.combiners import to_probabilities
from ensemerge.errors import Unavailable
from ensemerge.measures.scores import log_losses
from ensemerge_server.store.records import (
    ArmTotals,
    Committed,
    Label,
    LabelResult,
    LabelStatus,
    Prediction,
    Scored,
)

SCHEMA_VERSION = 1
# Wider answers keep their predicted class only, and no log-loss: a row of 1,000 probabilities is 4 kB.
CLASSES_KEPT = 100
BUSY_SECONDS = 10.0


class SqliteStore:
    """The store of one server. Raises Unavailable when the file cannot be opened or written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _translated(f"cannot open the store {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened here, used by the one thread that calls `write`.
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._patiently(lambda: self._connection.execute("PRAGMA journal_mode = WAL"))
            self._patiently(self._migrate)
        self._class_lists: dict[tuple[str, ...], int] = {}

    def _patiently(self, step: Callable[[], object]) -> None:
        """Do what several servers that start together on one file cannot do at once; SQLite itself does not wait."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                step()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.05)
            else:
                return

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise Unavailable(
                f"the store {self._path} was written by a newer ensemerge (schema {version}, expected at most "
                f"{SCHEMA_VERSION}); upgrade, or name another folder with --state"
            )
        self._connection.executescript(files(__package__).joinpath("schema.sql").read_text())
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def write(self, predictions: Sequence[Prediction], labels: Sequence[Label]) -> Committed:
        with _translated(f"cannot write to the store {self._path}"):
            # NORMAL survives a killed process, FULL a power cut as well: what a label's sender is promised.
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if labels else 'NORMAL'}")
            with self._transaction():
                transaction = _Transaction(self._connection, self._class_lists)
                for prediction in predictions:
                    transaction.add_prediction(prediction)
                results = [transaction.add_label(label) for label in labels]
        return Committed(results, transaction.scored, transaction.reused_ids, transaction.late_results)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._class_lists.clear()
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def arms(self, experiment: str) -> list[ArmTotals]:
        with _translated(f"cannot read the store {self._path}"):
            reader = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
            try:
                return [ArmTotals(*row) for row in reader.execute(_ARM_TOTALS, {"experiment": experiment})]
            finally:
                reader.close()

    def close(self) -> None:
        self._connection.close()


_ARM_TOTALS = """
    WITH answered AS (
        SELECT arm, SUM(rows) AS rows FROM predictions WHERE experiment = :experiment GROUP BY arm
    ), truths AS (
        SELECT arm, COUNT(correct) AS labelled, SUM(correct) AS correct,
            SUM(log_loss) AS loss, COUNT(log_loss) AS scored
        FROM predictions JOIN labels USING (prediction_id) WHERE experiment = :experiment GROUP BY arm
    )
    SELECT arm, rows, IFNULL(labelled, 0), IFNULL(correct, 0), IFNULL(loss, 0.0), IFNULL(scored, 0)
    FROM answered LEFT JOIN truths USING (arm) ORDER BY arm
"""


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise Unavailable(f"{what}: {error}; check the disk and the folder's permissions, then try again") from error


@dataclass(frozen=True)
class _Answer:
    """A stored prediction, as far as a label needs it."""

    prediction_id: str
    model: str
    version: str
    arm: str
    rows: int
    classes: tuple[str, ...]
    predicted: np.ndarray | None
    probabilities: np.ndarray | None

    def index(self, truth: int | str) -> int:
        """The class that a label names. Raises ValueError."""
        index = truth
        if isinstance(truth, str):
            index = self.classes.index(truth) if truth in self.classes else -1
        elif not self.classes and truth >= 0:
            return truth
        if not isinstance(index, int) or not 0 <= index < len(self.classes):
            known = ", ".join(self.classes[:20]) + (", …" if len(self.classes) > 20 else "")
            raise ValueError(f"class {truth!r} is unknown; '{self.model}' has {len(self.classes)} classes: {known}")
        return index

    def score(self, row: int, truth: int) -> Scored:
        correct = None if self.predicted is None else bool(self.predicted[row] == truth)
        loss = None
        # A model that answered NaN was wrong or right by accident; its log-loss would spoil every sum.
        if self.probabilities is not None and np.isfinite(self.probabilities[row]).all():
            loss = float(log_losses(self.probabilities[row : row + 1], np.array([truth]))[0])
        return Scored(self.model, self.version, self.arm, correct, loss)


class _Transaction:
    """Predictions and labels joined, within one database transaction."""

    def __init__(self, connection: sqlite3.Connection, class_lists: dict[tuple[str, ...], int]) -> None:
        self._database = connection
        self._class_lists = class_lists
        self._now = time.time()
        self._anyone_waits = connection.execute("SELECT 1 FROM pending_labels LIMIT 1").fetchone() is not None
        self._found: dict[str, tuple[_Answer | None, int]] = {}
        self.scored: list[Scored] = []
        self.late_results: list[LabelResult] = []
        self.reused_ids = 0

    def add_prediction(self, prediction: Prediction) -> None:
        self._database.execute(
            "INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                prediction.prediction_id,
                prediction.client_id,
                prediction.model,
                prediction.version,
                prediction.experiment,
                prediction.arm,
                prediction.time_seconds,
                prediction.rows,
                self._class_list(prediction),
                *_said(prediction),
            ),
        )
        unique = self._add_alias(prediction) if prediction.client_id else False
        if self._anyone_waits:
            self._join_waiting(prediction.prediction_id, prediction.prediction_id)
            if unique:
                self._join_waiting(prediction.client_id, prediction.prediction_id)

    def _add_alias(self, prediction: Prediction) -> bool:
        """Let the client's id stand for the prediction; whether it does so alone."""
        (uses,) = self._database.execute(
            "INSERT INTO aliases VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET uses = uses + 1 RETURNING uses",
            (prediction.client_id, prediction.prediction_id),
        ).fetchone()
        self.reused_ids += uses > 1
        return bool(uses == 1)

    def _class_list(self, prediction: Prediction) -> int | None:
        """The number under which the names of the prediction's classes are stored; None where there are none."""
        classes = prediction.classes
        if classes and classes not in self._class_lists:
            names = json.dumps(classes)
            self._database.execute("INSERT OR IGNORE INTO class_lists (names) VALUES (?)", (names,))
            (number,) = self._database.execute("SELECT id FROM class_lists WHERE names = ?", (names,)).fetchone()
            self._class_lists[classes] = number
        return self._class_lists[classes] if classes else None

    def add_label(self, label: Label) -> LabelResult:
        """Store a label, after the transaction's predictions. The labels of a batch come together: it is read once."""
        if label.prediction_id not in self._found:
            self._found = {label.prediction_id: self._find(label.prediction_id)}
        answer, uses = self._found[label.prediction_id]
        if answer is None:
            return self._keep_waiting(label, uses)
        return self._join(label, answer)

    def _find(self, identifier: str) -> tuple[_Answer | None, int]:
        """The prediction that an id stands for, and how many there are if it is a client's."""
        row = self._database.execute(_ANSWER, (identifier,)).fetchone()
        if row is not None:
            return _answer(row), 1
        alias = self._database.execute(
            "SELECT prediction_id, uses FROM aliases WHERE client_id = ?", (identifier,)
        ).fetchone()
        if alias is None or alias[1] > 1:
            return None, 0 if alias is None else alias[1]
        return _answer(self._database.execute(_ANSWER, (alias[0],)).fetchone()), 1

    def _join(self, label: Label, answer: _Answer) -> LabelResult:
        try:
            truth = answer.index(label.truth)
        except ValueError as error:
            return LabelResult(LabelStatus.INVALID, str(error))
        if label.row >= answer.rows:
            message = f"row {label.row} does not exist; the prediction has {answer.rows} rows, the first of them 0"
            return LabelResult(LabelStatus.INVALID, message)
        held = self._database.execute(
            "SELECT truth, time_seconds, received_seconds FROM labels WHERE prediction_id = ? AND row = ?",
            (answer.prediction_id, label.row),
        ).fetchone()
        if held is None:
            self.scored.append(self._hold(label, answer, truth))
            return LabelResult(LabelStatus.JOINED)
        if held[0] == truth:
            return LabelResult(LabelStatus.DUPLICATE)
        return self._settle(label, answer, truth, held)

    def _settle(self, label: Label, answer: _Answer, truth: int, held: tuple[int, float, float]) -> LabelResult:
        """Two labels for one row: the later one holds, the other goes to the history."""
        if label.time_seconds >= held[1]:
            self._remember(answer.prediction_id, label.row, *held, "overruled")
            self._hold(label, answer, truth)
            return LabelResult(LabelStatus.CONFLICT, f"class {held[0]} was known before; this later label holds")
        self._remember(answer.prediction_id, label.row, truth, label.time_seconds, self._now, "overruled")
        return LabelResult(LabelStatus.CONFLICT, f"class {held[0]} is known from a later time and still holds")

    def _hold(self, label: Label, answer: _Answer, truth: int) -> Scored:
        scored = answer.score(label.row, truth)
        self._database.execute(
            "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)",
            (answer.prediction_id, label.row, truth, label.time_seconds, self._now, scored.correct, scored.log_loss),
        )
        return scored

    def _keep_waiting(self, label: Label, uses: int) -> LabelResult:
        """Keep a label that no single prediction answers to. Which of several holds is settled when they join."""
        latest = self._database.execute(
            "SELECT truth FROM pending_labels WHERE id = ? AND row = ? ORDER BY time_seconds DESC LIMIT 1",
            (label.prediction_id, label.row),
        ).fetchone()
        if latest is not None and latest[0] == label.truth:
            return LabelResult(LabelStatus.DUPLICATE, "this label waits already")
        self._anyone_waits = True
        self._database.execute(
            "INSERT OR REPLACE INTO pending_labels VALUES (?, ?, ?, ?, ?)",
            (label.prediction_id, label.row, label.truth, label.time_seconds, self._now),
        )
        if latest is not None:
            return LabelResult(LabelStatus.CONFLICT, "another label for this row waits; the later one will hold")
        if uses > 1:
            message = f"{uses} predictions share this client id; name the prediction_id of the answer"
            return LabelResult(LabelStatus.AMBIGUOUS, message)
        return LabelResult(LabelStatus.PENDING, "no such prediction yet; the label is kept until it comes")

    def _join_waiting(self, identifier: str, prediction_id: str) -> None:
        """Join the labels that came before their prediction, in the order of their times."""
        waiting = self._database.execute(
            "SELECT row, truth, time_seconds, received_seconds FROM pending_labels WHERE id = ? "
            "ORDER BY time_seconds, received_seconds",
            (identifier,),
        ).fetchall()
        if not waiting:
            return
        answer, _ = self._find(prediction_id)
        assert answer is not None  # it was inserted in this transaction
        for row, truth, then, received in waiting:
            result = self._join(Label(prediction_id, row, truth, then), answer)
            self.late_results.append(result)
            if result.status is LabelStatus.INVALID:
                self._remember(identifier, row, truth, then, received, result.message)
        self._database.execute("DELETE FROM pending_labels WHERE id = ?", (identifier,))

    def _remember(self, identifier: str, row: int, truth: int | str, then: float, received: float, why: str) -> None:
        self._database.execute(
            "INSERT INTO label_history VALUES (?, ?, ?, ?, ?, ?)", (identifier, row, truth, then, received, why)
        )


def _said(prediction: Prediction) -> tuple[bytes | None, bytes | None]:
    """The predicted class of each row, and the probabilities where there are not too many."""
    if prediction.output is None or prediction.task is None:
        return None, None
    values = to_probabilities(prediction.output, prediction.task.scale)
    # A row that is not a number names no class: argmax would say the first.
    predicted = np.where(np.isfinite(values).all(axis=-1), values.argmax(axis=-1), -1)
    kept = values.astype("<f4").tobytes() if values.shape[-1] <= CLASSES_KEPT else None
    return predicted.astype("<i4").tobytes(), kept


_ANSWER = """
    SELECT prediction_id, model, version, arm, rows, names, predicted, probabilities
    FROM predictions LEFT JOIN class_lists ON id = class_list WHERE prediction_id = ?
"""


def _answer(row: tuple[str, str, str, str, int, str | None, bytes | None, bytes | None]) -> _Answer:
    prediction_id, model, version, arm, rows, names, predicted, probabilities = row
    classes = tuple(json.loads(names)) if names else ()
    return _Answer(
        prediction_id,
        model,
        version,
        arm,
        rows,
        classes,
        None if predicted is None else np.frombuffer(predicted, "<i4"),
        None if probabilities is None else np.frombuffer(probabilities, "<f4").reshape(rows, len(classes)),
    )
