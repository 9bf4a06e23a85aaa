"""The thread between the request path and the store: predictions are handed over and forgotten, labels waited for."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ensemerge.errors import EnsemergeError, ShuttingDown, Unavailable
from ensemerge_server.store.records import Committed, Label, LabelResult, Prediction, Store

log = logging.getLogger(__name__)

# A transaction takes what comes within this time, or sooner this many entries: a commit costs about a millisecond.
GATHER_SECONDS = 0.05
GATHER_ENTRIES = 512
QUEUE_PREDICTIONS = 65536

LabelsDone = Callable[[Sequence[LabelResult] | EnsemergeError], None]


class StoreEvents(Protocol):
    """Told what became of predictions and labels; the metrics listen."""

    def committed(self, committed: Committed) -> None: ...

    def dropped(self, predictions: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Labels:
    labels: Sequence[Label]
    done: LabelsDone


_Entry = Prediction | _Labels


class StoreWriter:
    """Owns a store. Inference never waits for it: when its queue is full, predictions are dropped and counted."""

    def __init__(self, store: Store, events: StoreEvents, queue_predictions: int = QUEUE_PREDICTIONS) -> None:
        self._store = store
        self._events = events
        self._limit = queue_predictions
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        # Nothing may slip in behind the mark that ends the queue.
        self._door = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def log(self, prediction: Prediction) -> None:
        """Hand over a prediction; never blocks, never raises."""
        with self._door:
            taken = not self._closing and self._queue.qsize() < self._limit
            if taken:
                self._queue.put(prediction)
        if not taken:
            self._events.dropped(1)

    def label(self, labels: Sequence[Label], done: LabelsDone) -> None:
        """Store labels; `done` is called when they are on disk, on the writer's thread, or with the error.

        Labels queue behind the predictions made before them, so a label for an answer that its sender has seen
        always finds it.
        """
        refusal: EnsemergeError | None = None
        with self._door:
            if self._closing:
                refusal = ShuttingDown("the server is stopping; send the labels again when it is back")
            elif self._queue.qsize() >= self._limit:
                refusal = Unavailable("too many predictions and labels wait for the disk; send them again shortly")
            else:
                self._queue.put(_Labels(labels, done))
        if refusal is not None:
            done(refusal)

    def close(self) -> None:
        """Write what waits, then close the store."""
        with self._door:
            self._closing = True
            self._queue.put(None)
        self._thread.join()
        self._store.close()

    def _work(self) -> None:
        stopping = False
        while not stopping:
            entries, stopping = self._gather()
            predictions = [entry for entry in entries if isinstance(entry, Prediction)]
            labels = [entry for entry in entries if isinstance(entry, _Labels)]
            if entries:
                self._commit(predictions, labels)

    def _gather(self) -> tuple[list[_Entry], bool]:
        """The entries of the next transaction, and whether the writer was told to stop after them."""
        entries: list[_Entry] = []
        until = float("inf")
        while len(entries) < GATHER_ENTRIES:
            try:
                entry = self._queue.get(timeout=None if not entries else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                return entries, True
            # Whoever sent labels waits for the commit: only what is there already joins them.
            if isinstance(entry, _Labels):
                until = 0.0
            elif not entries:
                until = time.monotonic() + GATHER_SECONDS
            entries.append(entry)
        return entries, False

    def _commit(self, predictions: Sequence[Prediction], batches: Sequence[_Labels]) -> None:
        try:
            committed = self._store.write(predictions, [label for batch in batches for label in batch.labels])
        except Exception as error:  # whatever it is, the writer lives on and every sender gets an answer
            if not isinstance(error, EnsemergeError) and len(predictions) + len(batches) > 1:
                self._commit_one_by_one(predictions, batches)
                return
            log.error("%d predictions and %d batches of labels not stored: %s", len(predictions), len(batches), error)
            self._events.dropped(len(predictions))
            failure = error if isinstance(error, EnsemergeError) else Unavailable(f"labels cannot be stored: {error!r}")
            for batch in batches:
                batch.done(failure)
            return
        self._tell(committed)
        start = 0
        for batch in batches:
            batch.done(committed.results[start : start + len(batch.labels)])
            start += len(batch.labels)

    def _commit_one_by_one(self, predictions: Sequence[Prediction], batches: Sequence[_Labels]) -> None:
        """One entry spoilt the transaction for the others: each gets its own."""
        for prediction in predictions:
            self._commit([prediction], [])
        for batch in batches:
            self._commit([], [batch])

    def _tell(self, committed: Committed) -> None:
        try:
            self._events.committed(committed)
        except Exception:  # who counts must not stop who stores
            log.exception("a transaction was stored but not counted")
