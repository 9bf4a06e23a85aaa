"""What was measured, and the tables that show it. Ratios are taken within a round, then their median over rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

SERVER = "ensemerge"
FLOOR = "bare grpcio"
IN_FLIGHT = (1, 16, 64)
FLOOR_IN_FLIGHT = 64
BATCH_ROWS = (1, 8, 32)


@dataclass(frozen=True)
class Sample:
    """One load on one server in one round. `cpu_microseconds` is the server's processor time per request."""

    server: str
    model: str
    in_flight: int
    round: int
    requests: int
    requests_per_second: float
    p50_milliseconds: float
    p99_milliseconds: float
    cpu_microseconds: float


@dataclass(frozen=True)
class Limit:
    """ONNX Runtime in process, in batches of `rows`, in one round."""

    model: str
    rows: int
    round: int
    items_per_second: float


@dataclass(frozen=True)
class Results:
    """Everything that one run of the benchmark measured, and on what."""

    facts: Mapping[str, str]
    samples: Sequence[Sample]
    limits: Sequence[Limit]

    @property
    def models(self) -> list[str]:
        """The models in the order in which they were measured."""
        return list(dict.fromkeys(limit.model for limit in self.limits))

    def of(self, server: str, model: str, in_flight: int) -> list[Sample]:
        """The samples of one cell, one for each round."""
        wanted = (server, model, in_flight)
        return [sample for sample in self.samples if (sample.server, sample.model, sample.in_flight) == wanted]

    def items_per_second(self, model: str, rows: int) -> list[float]:
        """What ONNX Runtime does in process, round by round."""
        return [limit.items_per_second for limit in self.limits if (limit.model, limit.rows) == (model, rows)]

    def best_rows(self, model: str) -> int:
        """The batch with which ONNX Runtime computes most."""
        return max(BATCH_ROWS, key=lambda rows: median(self.items_per_second(model, rows)))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def show(results: Results, console: Console) -> None:
    """Print the limits, what the server makes of them, and the machine."""
    console.print(_limits_table(results))
    console.print()
    console.print(_serving_table(results))
    console.print()
    console.print(", ".join(f"{name} {value}" for name, value in results.facts.items()), style="dim", highlight=False)


def _limits_table(results: Results) -> Table:
    batches = [f"batch {rows}\nitems/s" for rows in BATCH_ROWS]
    floor = ["bare grpcio\nrequests/s", "min–max", "its CPU µs\nper request"]
    title = f"The limits: ONNX Runtime in process, and grpcio without a model at {FLOOR_IN_FLIGHT} in flight"
    table = _table(title, ["model", *batches, *floor])
    for model in results.models:
        items = [_rate(median(results.items_per_second(model, rows))) for rows in BATCH_ROWS]
        floors = results.of(FLOOR, model, FLOOR_IN_FLIGHT)
        table.add_row(model, *items, *_rates(floors), f"{_median(floors, _cpu):,.0f}")
    return table


def _serving_table(results: Results) -> Table:
    load = ["model", "in\nflight", "requests/s", "min–max", "p50 ms", "p99 ms"]
    shares = ["of it bare\ngrpcio", "of\nbatch 1", "of best\nbatch"]
    table = _table(
        "The server, and its requests/s as a share of the items/s in process", [*load, "CPU µs\nper request", *shares]
    )
    for model in results.models:
        for in_flight in IN_FLIGHT:
            table.add_row(model, str(in_flight), *_figures(results, model, in_flight))
        table.add_section()
    return table


def _figures(results: Results, model: str, in_flight: int) -> list[str]:
    samples = results.of(SERVER, model, in_flight)
    best = results.best_rows(model)
    return [
        *_rates(samples),
        f"{_median(samples, lambda sample: sample.p50_milliseconds):,.2f}",
        f"{_median(samples, lambda sample: sample.p99_milliseconds):,.2f}",
        f"{_median(samples, _cpu):,.0f}",
        _floor_share(results, model, in_flight),
        _percent(_share_of_limit(results, samples, 1)),
        f"{_percent(_share_of_limit(results, samples, best))} ({best})",
    ]


def _rates(samples: Sequence[Sample]) -> tuple[str, str]:
    """The median over rounds, and the range."""
    rates = [sample.requests_per_second for sample in samples]
    return _rate(median(rates)), f"{_rate(min(rates))}–{_rate(max(rates))}"


def _rate(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _share_of_limit(results: Results, samples: Sequence[Sample], rows: int) -> float:
    limits = results.items_per_second(samples[0].model, rows)
    return median(sample.requests_per_second / limit for sample, limit in zip(samples, limits, strict=True))


def _floor_share(results: Results, model: str, in_flight: int) -> str:
    """The processor time of bare grpcio relative to the server's, where both had as many requests in flight."""
    floors = results.of(FLOOR, model, in_flight)
    if not floors:
        return "–"
    samples = results.of(SERVER, model, in_flight)
    return _percent(median(_cpu(floor) / _cpu(sample) for floor, sample in zip(floors, samples, strict=True)))


def _median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    return median(figure(sample) for sample in samples)


def _cpu(sample: Sample) -> float:
    return sample.cpu_microseconds


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for position, heading in enumerate(columns):
        table.add_column(heading, justify="right" if position else "left")
    return table
