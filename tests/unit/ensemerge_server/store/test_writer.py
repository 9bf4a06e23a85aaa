import threading
from collections.abc import Sequence

import numpy as np
import pytest

from ensemerge.errors import EnsemergeError, ShuttingDown, Unavailable
from ensemerge_server.store.records import ArmTotals, Committed, Label, LabelResult, LabelStatus, Prediction
from ensemerge_server.store.writer import StoreWriter

SECONDS = 10


class Remembering:
    """A store that remembers its transactions; it waits at the gate before each, and can be told to fail."""

    def __init__(self) -> None:
        self.transactions: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.closed = False

    def write(self, predictions: Sequence[Prediction], labels: Sequence[Label]) -> Committed:
        self.entered.release()
        assert self.gate.wait(SECONDS)
        if self.failure is not None:
            raise self.failure
        self.transactions.append((len(predictions), len(labels)))
        return Committed([LabelResult(LabelStatus.JOINED, label.prediction_id) for label in labels])

    def arms(self, experiment: str) -> list[ArmTotals]:
        return []

    def close(self) -> None:
        self.closed = True


class Events:
    def __init__(self) -> None:
        self.lost = 0
        self.commits = 0

    def committed(self, committed: Committed) -> None:
        self.commits += 1

    def dropped(self, predictions: int) -> None:
        self.lost += predictions


class Sent:
    """Labels on their way, and what came back."""

    def __init__(self, writer: StoreWriter, *names: str) -> None:
        self._came = threading.Event()
        self._outcome: Sequence[LabelResult] | EnsemergeError = ()
        writer.label([Label(name, 0, 1, 0.0) for name in names], self._done)

    def _done(self, outcome: Sequence[LabelResult] | EnsemergeError) -> None:
        self._outcome = outcome
        self._came.set()

    @property
    def outcome(self) -> Sequence[LabelResult] | EnsemergeError:
        assert self._came.wait(SECONDS)
        return self._outcome

    @property
    def names(self) -> list[str]:
        assert not isinstance(self.outcome, EnsemergeError), self.outcome
        return [result.message for result in self.outcome]


def prediction() -> Prediction:
    return Prediction("p", "", "m", "1", "", "", 0.0, 1, None, np.zeros(1))


@pytest.fixture
def store() -> Remembering:
    return Remembering()


def test_labels_are_acknowledged_after_the_commit_each_sender_with_their_own(store: Remembering) -> None:
    writer = StoreWriter(store, Events())
    store.gate.clear()
    first = Sent(writer, "a")
    assert store.entered.acquire(timeout=SECONDS)
    second, third = Sent(writer, "b", "c"), Sent(writer, "d")
    assert not first._came.is_set()
    store.gate.set()
    assert (first.names, second.names, third.names) == (["a"], ["b", "c"], ["d"])
    # What came while the first was being written went into one transaction.
    assert store.transactions == [(0, 1), (0, 3)]
    writer.close()


def test_predictions_are_gathered_and_a_label_finds_those_before_it(store: Remembering) -> None:
    writer = StoreWriter(store, Events())
    for _ in range(5):
        writer.log(prediction())
    assert Sent(writer, "a").names == ["a"]
    writer.close()
    assert sum(predictions for predictions, _ in store.transactions) == 5
    assert store.transactions[-1][1] == 1


def test_a_full_queue_drops_predictions_and_counts_them(store: Remembering) -> None:
    events = Events()
    writer = StoreWriter(store, events, queue_predictions=3)
    store.gate.clear()
    writing = Sent(writer, "a")
    assert store.entered.acquire(timeout=SECONDS)
    for _ in range(10):
        writer.log(prediction())
    assert events.lost == 7
    refused = Sent(writer, "b")
    assert isinstance(refused.outcome, Unavailable)
    store.gate.set()
    assert writing.names == ["a"]
    writer.close()
    assert sum(predictions for predictions, _ in store.transactions) == 3


@pytest.mark.parametrize("failure", [Unavailable("disk full"), RuntimeError("a mistake of ours")])
def test_a_failed_commit_is_told_and_the_writer_lives_on(store: Remembering, failure: Exception) -> None:
    events = Events()
    writer = StoreWriter(store, events)
    store.failure = failure
    writer.log(prediction())
    assert isinstance(Sent(writer, "a").outcome, Unavailable)
    assert events.lost == 1
    store.failure = None
    assert Sent(writer, "b").names == ["b"]
    writer.close()


def test_counting_that_fails_stops_nothing(store: Remembering) -> None:
    class Broken(Events):
        def committed(self, committed: Committed) -> None:
            raise ValueError("counters can only go up")

    writer = StoreWriter(store, Broken())
    assert [Sent(writer, name).names for name in "ab"] == [["a"], ["b"]]
    writer.close()


def test_an_entry_that_spoils_a_transaction_is_lost_alone() -> None:
    class Picky(Remembering):
        def write(self, predictions: Sequence[Prediction], labels: Sequence[Label]) -> Committed:
            if any(label.prediction_id == "poison" for label in labels):
                raise ValueError("cannot reshape")
            return super().write(predictions, labels)

    store, events = Picky(), Events()
    writer = StoreWriter(store, events)
    store.gate.clear()
    first = Sent(writer, "a")
    assert store.entered.acquire(timeout=SECONDS)
    writer.log(prediction())
    poison, honest = Sent(writer, "poison"), Sent(writer, "b")
    store.gate.set()
    assert (first.names, honest.names) == (["a"], ["b"])
    assert isinstance(poison.outcome, Unavailable)
    writer.close()
    assert (events.lost, sum(predictions for predictions, _ in store.transactions)) == (0, 1)


def test_closing_writes_what_waits_and_refuses_what_comes(store: Remembering) -> None:
    writer = StoreWriter(store, Events())
    for _ in range(4):
        writer.log(prediction())
    writer.close()
    assert sum(predictions for predictions, _ in store.transactions) == 4
    assert store.closed
    assert isinstance(Sent(writer, "late").outcome, ShuttingDown)
