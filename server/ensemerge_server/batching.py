"""Greedy dynamic batching: whatever waits when the session is free forms the next batch. There is no timer.

With one request in flight latency is the model's own; under load batches form by themselves. One queue and one
thread that owns the session.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ensemerge.errors import Cancelled, DeadlineExceeded, EnsemergeError, ExecutionFailed, QueueFull, ShuttingDown
from ensemerge_server.servable import Arrays, Done, Reply, Request, Signature, Timings

log = logging.getLogger(__name__)


class Runnable(Protocol):
    """What the batcher owns: a session, or in a test anything that runs."""

    @property
    def signature(self) -> Signature: ...

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    done: Done
    since: float

    def joins(self, other: _Waiting) -> bool:
        """Whether both may run in one batch: the same outputs wanted, and rows of the same shape."""
        mine, its = self.request, other.request
        return mine.outputs == its.outputs and all(
            array.shape[1:] == its.inputs[name].shape[1:] for name, array in mine.inputs.items()
        )


class Batcher:
    """A servable around a session. `version` is told in every reply; `batch_rows` and `queue_requests` are limits."""

    def __init__(self, runnable: Runnable, version: str, *, batch_rows: int, queue_requests: int) -> None:
        self.signature = runnable.signature
        self._runnable = runnable
        self._version = version
        self._batch_rows = batch_rows if self.signature.batched else 0
        self._queue_requests = queue_requests
        self._all_outputs = tuple(spec.name for spec in self.signature.outputs)
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._carried: _Waiting | None = None
        # Nothing may slip in behind the mark that ends the queue.
        self._door = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"batcher-{version}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return self._queue.qsize()

    def submit(self, request: Request, done: Done) -> None:
        refusal: EnsemergeError | None = None
        with self._door:
            if self._closing:
                refusal = ShuttingDown("the model is being unloaded; try again shortly")
            elif self.depth >= self._queue_requests:
                refusal = QueueFull(f"Exceeds maximum queue size of {self._queue_requests} requests; try again shortly")
            else:
                self._queue.put(_Waiting(request, done, time.monotonic()))
        if refusal is not None:
            done(refusal)

    def close(self) -> None:
        """Answer what waits, then stop. Requests that come later are refused."""
        with self._door:
            self._closing = True
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._next()) is not None:
            batch = [waiting for waiting in self._gather(first) if _still_wanted(waiting)]
            if batch:
                self._answer(batch)

    def _next(self) -> _Waiting | None:
        carried, self._carried = self._carried, None
        return carried or self._queue.get()

    def _gather(self, first: _Waiting) -> list[_Waiting]:
        batch, rows = [first], first.request.rows
        while rows < self._batch_rows:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                self._queue.put(None)
                break
            if rows + waiting.request.rows > self._batch_rows or not waiting.joins(first):
                self._carried = waiting
                break
            batch.append(waiting)
            rows += waiting.request.rows
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        outcomes: Sequence[Reply | EnsemergeError]
        try:
            outcomes = self._run(batch)
        except Exception as error:  # whatever it is, the thread lives on and every caller gets an answer
            if len(batch) > 1:
                # One request may have spoilt the batch for the others: each gets a run, and a verdict, of its own.
                for waiting in batch:
                    self._answer([waiting])
                return
            outcomes = [error if isinstance(error, EnsemergeError) else ExecutionFailed(f"the model failed: {error!r}")]
        for waiting, outcome in zip(batch, outcomes, strict=True):
            try:
                waiting.done(outcome)
            except Exception:  # a mistake of whoever waits; the model goes on for everybody else
                log.exception("an answer could not be handed over")

    def _run(self, batch: list[_Waiting]) -> list[Reply]:
        requests = [waiting.request for waiting in batch]
        names = requests[0].outputs or self._all_outputs
        started = time.monotonic()
        arrays = self._runnable.run(_joined(requests), names)
        seconds = time.monotonic() - started
        rows = sum(request.rows for request in requests)
        parts = _split(arrays, [request.rows for request in requests])
        return [
            Reply(
                outputs=dict(zip(names, part, strict=True)),
                version=self._version,
                timings=Timings(started - waiting.since, seconds, rows),
            )
            for waiting, part in zip(batch, parts, strict=True)
        ]


def _still_wanted(waiting: _Waiting) -> bool:
    # A transport calls a call whose deadline has passed cancelled too: the deadline is asked first.
    if waiting.request.deadline < time.monotonic():
        waiting.done(DeadlineExceeded("Request timeout expired while the request waited for the model"))
        return False
    if waiting.request.cancelled():
        waiting.done(Cancelled("the caller went away while the request waited"))
        return False
    return True


def _joined(requests: list[Request]) -> Arrays:
    """The inputs of a batch, one below the other. A lone request is passed on without a copy."""
    if len(requests) == 1:
        return requests[0].inputs
    return {name: np.concatenate([request.inputs[name] for request in requests]) for name in requests[0].inputs}


def _split(arrays: list[np.ndarray], rows: list[int]) -> list[list[np.ndarray]]:
    """The outputs of a batch, cut back into those of its requests."""
    if len(rows) == 1:
        return [arrays]
    for array in arrays:
        if len(array) != sum(rows):
            raise ExecutionFailed(f"the model answered {len(array)} rows to a batch of {sum(rows)}; expected as many")
    parts, start = [], 0
    for count in rows:
        parts.append([array[start : start + count] for array in arrays])
        start += count
    return parts
