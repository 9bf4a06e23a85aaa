"""The only door to Prometheus: what the server counts and times, recorded once, where an answer leaves.

Labels come from closed sets: `model` is a name of the repository (or empty, for requests that name no known one),
`version` what answered, `arm` an experiment's arm (or empty), `code` a gRPC status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ensemerge_server.catalogue import Catalogue
from ensemerge_server.lifecycle import Lifecycle
from ensemerge_server.servable import Parameter, Reply
from ensemerge_server.store.records import Committed, LabelStatus

# A second series beside every counter, saying when it began: Prometheus does not read it in this format.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (
    50e-6,
    100e-6,
    200e-6,
    350e-6,
    500e-6,
    750e-6,
    1e-3,
    1.5e-3,
    2.5e-3,
    5e-3,
    10e-3,
    25e-3,
    50e-3,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_ANSWER = ("model", "version", "arm")


@dataclass(frozen=True)
class _Children:
    """What counts the answers of one model, version and arm."""

    answered: Counter
    duration: Histogram
    queue: Histogram
    compute: Histogram
    batch_rows: Histogram


class Metrics:
    """Every family of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._children: dict[tuple[str, ...], _Children] = {}
        self._requests = self._counter("requests", "Finished requests by gRPC status.", (*_ANSWER, "code"))
        self._duration = self._histogram("request_duration_seconds", "From request read to answer computed.", _ANSWER)
        self._queue = self._histogram("queue_duration_seconds", "Waiting for the model.", _ANSWER)
        self._compute = self._histogram(
            "compute_duration_seconds", "The run of the batch that the request was part of.", _ANSWER
        )
        self._batch_rows = self._histogram(
            "batch_rows", "Rows of the batch that the request was part of.", ("model", "version"), ROWS
        )
        self._assignments = self._counter(
            "assignments", "Requests by arm, and by what decided it.", ("experiment", "arm", "assignment")
        )
        self._labelled = self._counter("labelled", "Answered rows whose label has come.", _ANSWER)
        self._correct = self._counter("correct", "Labelled rows whose predicted class was the label.", _ANSWER)
        self._log_loss = self._counter("log_loss_nats", "Summed -ln p(label) of scored rows.", _ANSWER)
        self._scored = self._counter("scored", "Labelled rows with a log-loss.", _ANSWER)
        self._labels = self._counter("labels", "Labels received, by what became of them.", ("result",))
        self._late_joins = self._counter("late_joins", "Labels that waited for their prediction and met it.", ())
        self._reused_ids = self._counter("reused_client_ids", "Predictions whose client id had been used before.", ())
        self._dropped = self._counter("dropped_predictions", "Predictions that were not stored.", ())
        for status in LabelStatus:
            self._labels.labels(status.value)

    def answered(self, model: str, reply: Reply, seconds: float) -> None:
        """Record an answer that leaves; `seconds` is how long the request was with us."""
        arm = str(reply.parameters.get("arm", ""))
        children = self._children_of(model, reply.version, arm)
        children.answered.inc()
        children.duration.observe(seconds)
        children.queue.observe(reply.timings.queue_seconds)
        children.compute.observe(reply.timings.compute_seconds)
        children.batch_rows.observe(reply.timings.batch_rows)
        self._assigned(reply.parameters)

    def _children_of(self, *who: str) -> _Children:
        # Looking a child up by its labels costs more than counting; there are as many as models, versions and arms.
        if who not in self._children:
            self._children[who] = _Children(
                self._requests.labels(*who, "OK"),
                self._duration.labels(*who),
                self._queue.labels(*who),
                self._compute.labels(*who),
                self._batch_rows.labels(*who[:2]),
            )
        return self._children[who]

    def refused(self, model: str, code: str, told: Mapping[str, Parameter]) -> None:
        """Record a request that ended in an error. `model` is empty when the request named none that we know."""
        self._requests.labels(model, "", str(told.get("arm", "")), code).inc()
        self._assigned(told)

    def _assigned(self, told: Mapping[str, Parameter]) -> None:
        if "arm" in told:
            self._assignments.labels(str(told["experiment"]), str(told["arm"]), str(told["assignment"])).inc()

    def committed(self, committed: Committed) -> None:
        """Record what a transaction of the store did. Each row is counted with its first label only."""
        for scored in committed.scored:
            if scored.correct is None:
                continue
            who = (scored.model, scored.version, scored.arm)
            self._labelled.labels(*who).inc()
            self._correct.labels(*who).inc(scored.correct)
            if scored.log_loss is not None:
                self._log_loss.labels(*who).inc(scored.log_loss)
                self._scored.labels(*who).inc()
        for result in committed.results:
            self._labels.labels(result.status.value).inc()
        self._late_joins.inc(sum(result.status is LabelStatus.JOINED for result in committed.late_results))
        self._reused_ids.inc(committed.reused_ids)

    def dropped(self, predictions: int) -> None:
        """Record predictions that the store did not get."""
        self._dropped.inc(predictions)

    def watch(self, catalogue: Catalogue, lifecycle: Lifecycle) -> None:
        """Report the models' states and the requests in flight with every scrape."""
        self._registry.register(_States(catalogue, lifecycle))

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help_text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"ensemerge_{name}", help_text, labels, registry=self._registry)

    def _histogram(
        self, name: str, help_text: str, labels: Sequence[str], buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        return Histogram(f"ensemerge_{name}", help_text, labels, buckets=buckets, registry=self._registry)


class _States(Collector):
    def __init__(self, catalogue: Catalogue, lifecycle: Lifecycle) -> None:
        self._catalogue = catalogue
        self._lifecycle = lifecycle

    def collect(self) -> Iterable[GaugeMetricFamily]:
        ready = GaugeMetricFamily(
            "ensemerge_model_ready",
            "1 for a model that can answer, 0 for one that cannot.",
            labels=["model", "version"],
        )
        for entry in self._catalogue.index():
            ready.add_metric([entry.name, entry.version], float(entry.state == "READY"))
        in_flight = GaugeMetricFamily(
            "ensemerge_requests_in_flight", "Inference requests being answered.", self._lifecycle.in_flight
        )
        return [ready, in_flight]
