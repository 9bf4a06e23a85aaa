"""Labels in any order against a model of a few lines: every row is counted once, with the truth that is latest."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ensemerge.repository import Task
from ensemerge_server.store.records import Label, LabelStatus, Prediction
from ensemerge_server.store.sqlite import SqliteStore

CLASSES = ("0", "1", "2")
ROWS = 2
IDS = st.sampled_from([f"p{number}" for number in range(5)])
CLIENT_IDS = st.sampled_from(["", "c0", "c1"])


class LabelsInAnyOrder(RuleBasedStateMachine):
    """The model: what each prediction said, who stands for whom, and the latest truth of each (id, row)."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self._store = SqliteStore(Path(self._folder.name) / "store.sqlite")
        self._said: dict[str, np.ndarray] = {}
        self._aliases: dict[str, list[str]] = {}
        self._truths: dict[tuple[str, int], tuple[float, int]] = {}
        self._waiting: dict[tuple[str, int], tuple[float, int]] = {}
        self._scored = 0
        self._clock = 0.0

    @rule(prediction_id=IDS, client_id=CLIENT_IDS, seed=st.integers(0, 99))
    def predict(self, prediction_id: str, client_id: str, seed: int) -> None:
        if prediction_id in self._said:
            return
        output = np.random.default_rng(seed).standard_normal((ROWS, 3)).astype(np.float32)
        task = Task("classification", "y", "logits", CLASSES)
        made = Prediction(prediction_id, client_id, "m", "1", "x", "a", self._clock, ROWS, task, output)
        self._scored += len(self._store.write([made], []).scored)
        self._said[prediction_id] = output.argmax(axis=1)
        self._join(prediction_id, prediction_id)
        if client_id:
            self._aliases.setdefault(client_id, []).append(prediction_id)
            if len(self._aliases[client_id]) == 1:
                self._join(client_id, prediction_id)

    def _join(self, waiting_id: str, prediction_id: str) -> None:
        for (identifier, row), truth in list(self._waiting.items()):
            if identifier == waiting_id:
                del self._waiting[identifier, row]
                held = self._truths.get((prediction_id, row))
                # Of two truths the later holds; the same truth again changes nothing.
                if held is None or (held[1] != truth[1] and truth[0] >= held[0]):
                    self._truths[prediction_id, row] = truth

    @rule(
        identifier=st.one_of(IDS, st.sampled_from(["c0", "c1"])), row=st.integers(0, ROWS - 1), truth=st.integers(0, 2)
    )
    def label(self, identifier: str, row: int, truth: int) -> None:
        self._clock += 1
        committed = self._store.write([], [Label(identifier, row, truth, self._clock)])
        (result,) = committed.results
        self._scored += len(committed.scored)
        owner = identifier if identifier in self._said else self._owner(identifier)
        book = self._truths if owner else self._waiting
        key = (owner or identifier, row)
        held = book.get(key)
        if held is None:
            ambiguous = len(self._aliases.get(identifier, [])) > 1
            waits = LabelStatus.AMBIGUOUS if ambiguous else LabelStatus.PENDING
            assert result.status is (LabelStatus.JOINED if owner else waits)
        else:
            assert result.status is (LabelStatus.DUPLICATE if held[1] == truth else LabelStatus.CONFLICT)
        if held is None or held[1] != truth:
            book[key] = (self._clock, truth)

    def _owner(self, client_id: str) -> str:
        known = self._aliases.get(client_id, [])
        return known[0] if len(known) == 1 else ""

    @invariant()
    def every_row_is_counted_once_with_its_latest_truth(self) -> None:
        totals = self._store.arms("x")
        labelled = sum(arm.labelled for arm in totals)
        right = sum(arm.correct for arm in totals)
        assert (labelled, self._scored) == (len(self._truths), len(self._truths))
        assert right == sum(int(self._said[name][row]) == truth for (name, row), (_, truth) in self._truths.items())
        assert sum(arm.predictions for arm in totals) == ROWS * len(self._said)

    def teardown(self) -> None:
        self._store.close()
        self._folder.cleanup()


LabelsInAnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLabelsInAnyOrder = LabelsInAnyOrder.TestCase
