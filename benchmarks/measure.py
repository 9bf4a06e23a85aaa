"""Measure every cell of the table once in each round, the limits between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.request import urlopen

import numpy as np
from in_process import InProcess
from load import Generate, Load, Question
from processes import Running, pinned
from prometheus_client.parser import text_string_to_metric_families
from results import BATCH_ROWS, Limit, Sample

from ensemerge.errors import CheckFailed
from ensemerge.progress import Notify

# Part of a cell's time that goes into its warm-up.
WARM_UP = 0.2


@dataclass(frozen=True)
class Cell:
    """One line of a table: a server, and how it is asked."""

    server: str
    process: Running
    question: Question
    in_flight: int
    generate: Generate

    def warm_up(self, seconds: float) -> int:
        """Find out how many requests take about `seconds`: the same number is sent in every round."""
        load, _ = self._load(2 * self.in_flight)
        if load.seconds < WARM_UP * seconds:
            load, _ = self._load(self._requests(load, WARM_UP * seconds))
        return self._requests(load, seconds)

    def measure(self, round_: int, requests: int) -> Sample:
        """Send so many requests. Raises CheckFailed unless every one was answered with OK."""
        load, cpu_seconds = self._load(requests)
        p50, p99 = np.quantile(load.latencies_seconds, (0.5, 0.99)) * 1e3
        return Sample(
            server=self.server,
            model=self.question.model,
            in_flight=self.in_flight,
            round=round_,
            requests=requests,
            requests_per_second=load.requests_per_second,
            p50_milliseconds=float(p50),
            p99_milliseconds=float(p99),
            cpu_microseconds=cpu_seconds / requests * 1e6,
        )

    def _load(self, requests: int) -> tuple[Load, float]:
        """A load, and the processor time that the server spent on it."""
        answered, dropped = self._counters()
        cpu_seconds = self.process.cpu_seconds()
        load = self.generate(self.process.addresses["grpc"], self.question, self.in_flight, requests)
        cpu_seconds = self.process.cpu_seconds_at_rest() - cpu_seconds
        answered, dropped = np.subtract(self._counters(), (answered, dropped))
        if answered != requests or dropped:
            message = (
                f"{self.server} answered {answered:.0f} of {requests} requests with OK and dropped {dropped:.0f} "
                "predictions; expected answers to all and none dropped: the figures would lack a part of the work"
            )
            raise CheckFailed(message, difference=abs(requests - answered) + dropped, bound=0)
        return load, cpu_seconds

    def _counters(self) -> tuple[float, float]:
        """Answers given with OK so far, and predictions that the store did not take."""
        with urlopen(f"http://{self.process.addresses['metrics']}/metrics") as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        answered = (s for s in samples if s.name == "ensemerge_requests_total" and s.labels["code"] == "OK")
        dropped = (s for s in samples if s.name == "ensemerge_dropped_predictions_total")
        return sum(s.value for s in answered), sum(s.value for s in dropped)

    def _requests(self, load: Load, seconds: float) -> int:
        # Fewer than two waves would measure the start and the end.
        return max(2 * self.in_flight, round(load.requests_per_second * seconds))


@dataclass(frozen=True)
class Contest:
    """One model: in process, and in every cell that serves it."""

    question: Question
    in_process: InProcess
    cells: Sequence[Cell]

    def limits(self, round_: int, core: int, seconds: float) -> Iterator[Limit]:
        """What ONNX Runtime does on the server's `core` while the server sleeps; all batches together in `seconds`."""
        for rows in BATCH_ROWS:
            with pinned(core):
                rate = self.in_process.items_per_second(self.question.inputs, rows, seconds / len(BATCH_ROWS))
            yield Limit(self.question.model, rows, round_, rate)


def measure(
    contests: Sequence[Contest], rounds: int, seconds: float, core: int, notify: Notify
) -> tuple[list[Sample], list[Limit]]:
    """Take `rounds` turns through all contests, about `seconds` in each cell."""
    requests = list(_warm_up(contests, seconds, notify))
    samples: list[Sample] = []
    limits: list[Limit] = []
    for round_ in range(rounds):
        for contest, counts in zip(contests, requests, strict=True):
            limits += contest.limits(round_, core, seconds)
            for cell, count in zip(contest.cells, counts, strict=True):
                samples.append(cell.measure(round_, count))
            notify("measure: models × rounds", len(samples) // len(contest.cells), rounds * len(contests))
    return samples, limits


def _warm_up(contests: Sequence[Contest], seconds: float, notify: Notify) -> Iterator[list[int]]:
    for position, contest in enumerate(contests):
        yield [cell.warm_up(seconds) for cell in contest.cells]
        notify("warm up", position + 1, len(contests))
