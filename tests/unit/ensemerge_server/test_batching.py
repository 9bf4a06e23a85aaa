import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from ensemerge.errors import (
    Cancelled,
    DeadlineExceeded,
    EnsemergeError,
    ExecutionFailed,
    QueueFull,
    ShuttingDown,
)
from ensemerge_server.batching import Batcher
from ensemerge_server.servable import Arrays, Reply, Request, Signature, TensorSpec

SECONDS = 10


class Doubler:
    """Doubles its input. It waits before each run until the gate opens, and notes the rows of every run."""

    def __init__(self, *, batched: bool = True, fail: Callable[[np.ndarray], bool] = lambda array: False) -> None:
        tensor = TensorSpec("x", "FP32", (-1, -1))
        outputs = (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "FP32", (-1, -1)))
        self.signature = Signature((tensor,), outputs, batched)
        self.gate = threading.Event()
        self.gate.set()
        self.runs: list[int] = []
        self.started = threading.Semaphore(0)
        self._fail = fail

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
        self.started.release()
        assert self.gate.wait(SECONDS)
        self.runs.append(len(inputs["x"]))
        if self._fail(inputs["x"]):
            raise ExecutionFailed("poison")
        return [inputs["x"] * (2 if name == "y" else 3) for name in outputs]


class Asked:
    """One request on its way, and what came back."""

    def __init__(self, batcher: Batcher, request: Request) -> None:
        self._came = threading.Event()
        self._outcomes: list[Reply | EnsemergeError] = []
        batcher.submit(request, self._done)

    def _done(self, outcome: Reply | EnsemergeError) -> None:
        self._outcomes.append(outcome)
        self._came.set()

    @property
    def outcome(self) -> Reply | EnsemergeError:
        assert self._came.wait(SECONDS)
        (outcome,) = self._outcomes
        return outcome

    @property
    def reply(self) -> Reply:
        assert isinstance(self.outcome, Reply), self.outcome
        return self.outcome


def rows(count: int, value: float = 1.0, width: int = 2, **rest: object) -> Request:
    return Request("", {"x": np.full((count, width), value, np.float32)}, **rest)  # type: ignore[arg-type]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def batcher(doubler: Doubler) -> Iterator[Batcher]:
    batcher = Batcher(doubler, "3", batch_rows=8, queue_requests=4)
    yield batcher
    doubler.gate.set()
    batcher.close()


def test_a_lone_request_runs_at_once(batcher: Batcher, doubler: Doubler) -> None:
    reply = Asked(batcher, rows(2)).reply
    assert reply.outputs["y"].tolist() == [[2, 2], [2, 2]]
    assert set(reply.outputs) == {"y", "z"}
    assert (reply.version, reply.timings.batch_rows, doubler.runs) == ("3", 2, [2])


def test_what_waits_forms_one_batch_and_everyone_gets_their_rows(batcher: Batcher, doubler: Doubler) -> None:
    doubler.gate.clear()
    first = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    others = [Asked(batcher, rows(count, value)) for count, value in ((2, 5.0), (3, 7.0))]
    doubler.gate.set()
    assert first.reply.timings.batch_rows == 1
    assert [asked.reply.outputs["y"].tolist() for asked in others] == [[[10.0, 10.0]] * 2, [[14.0, 14.0]] * 3]
    assert doubler.runs == [1, 5]
    assert others[0].reply.timings.queue_seconds > 0


def test_a_batch_stops_at_its_limit_and_nothing_is_lost(batcher: Batcher, doubler: Doubler) -> None:
    doubler.gate.clear()
    first = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    others = [Asked(batcher, rows(5)) for _ in range(3)]
    doubler.gate.set()
    for asked in (first, *others):
        assert asked.reply
    assert doubler.runs == [1, 5, 5, 5]


def test_only_rows_of_one_shape_and_the_same_outputs_share_a_batch(batcher: Batcher, doubler: Doubler) -> None:
    doubler.gate.clear()
    first = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    others = [Asked(batcher, request) for request in (rows(1), rows(1, outputs=("z",)), rows(1, width=3))]
    doubler.gate.set()
    assert first.reply.outputs["y"].shape == (1, 2)
    assert [asked.reply.outputs["z"].shape for asked in others] == [(1, 2), (1, 2), (1, 3)]
    assert set(others[1].reply.outputs) == {"z"}
    assert doubler.runs == [1, 1, 1, 1]


def test_a_model_without_a_batch_axis_runs_one_request_at_a_time() -> None:
    doubler = Doubler(batched=False)
    batcher = Batcher(doubler, "1", batch_rows=8, queue_requests=8)
    doubler.gate.clear()
    asked = [Asked(batcher, rows(2)) for _ in range(3)]
    doubler.gate.set()
    assert all(one.reply for one in asked)
    batcher.close()
    assert doubler.runs == [2, 2, 2]


def test_a_request_that_spoils_a_batch_fails_alone() -> None:
    doubler = Doubler(fail=lambda array: bool(np.isnan(array).any()))
    batcher = Batcher(doubler, "1", batch_rows=8, queue_requests=8)
    doubler.gate.clear()
    first = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    good, bad = Asked(batcher, rows(1)), Asked(batcher, rows(1, float("nan")))
    doubler.gate.set()
    assert first.reply
    assert good.reply
    assert isinstance(bad.outcome, ExecutionFailed)
    batcher.close()


def test_a_full_queue_refuses(batcher: Batcher, doubler: Doubler) -> None:
    doubler.gate.clear()
    running = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    waiting = [Asked(batcher, rows(1)) for _ in range(4)]
    refused = Asked(batcher, rows(1))
    assert isinstance(refused.outcome, QueueFull)
    assert "Exceeds maximum queue size of 4" in str(refused.outcome)
    doubler.gate.set()
    assert all(asked.reply for asked in (running, *waiting))


def test_who_went_away_or_came_too_late_is_not_run(batcher: Batcher, doubler: Doubler) -> None:
    doubler.gate.clear()
    running = Asked(batcher, rows(1))
    assert doubler.started.acquire(timeout=SECONDS)
    gone = Asked(batcher, rows(1, cancelled=lambda: True))
    late = Asked(batcher, rows(1, deadline=time.monotonic() - 1))
    doubler.gate.set()
    assert running.reply
    assert isinstance(gone.outcome, Cancelled)
    assert isinstance(late.outcome, DeadlineExceeded)
    assert doubler.runs == [1]


def test_closing_answers_what_waits_and_refuses_what_comes(doubler: Doubler) -> None:
    batcher = Batcher(doubler, "1", batch_rows=2, queue_requests=8)
    doubler.gate.clear()
    asked = [Asked(batcher, rows(1)) for _ in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    doubler.gate.set()
    closing.join(SECONDS)
    assert all(one.reply for one in asked)
    assert isinstance(Asked(batcher, rows(1)).outcome, ShuttingDown)


def test_outputs_of_another_length_are_an_error_not_a_mix_up() -> None:
    class Shrinker(Doubler):
        def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
            whole = super().run(inputs, outputs)
            return [array[:1] for array in whole]

    shrinker = Shrinker()
    batcher = Batcher(shrinker, "1", batch_rows=8, queue_requests=8)
    shrinker.gate.clear()
    first = Asked(batcher, rows(1))
    assert shrinker.started.acquire(timeout=SECONDS)
    pair = [Asked(batcher, rows(1)) for _ in range(2)]
    shrinker.gate.set()
    # Together they cannot be told apart, so each ran alone, where one row is right.
    assert all(asked.reply.outputs["y"].shape == (1, 2) for asked in (first, *pair))
    assert shrinker.runs == [1, 2, 1, 1]
    batcher.close()


def test_a_caller_whose_answer_cannot_be_handed_over_harms_nobody(batcher: Batcher) -> None:
    def broken(outcome: Reply | EnsemergeError) -> None:
        raise ValueError("a mistake of mine")

    batcher.submit(rows(1), broken)
    assert Asked(batcher, rows(1)).reply


def test_a_deadline_that_passed_is_told_as_such_even_where_the_transport_calls_it_cancelled(batcher: Batcher) -> None:
    late = Asked(batcher, rows(1, deadline=time.monotonic() - 1, cancelled=lambda: True))
    assert isinstance(late.outcome, DeadlineExceeded)
