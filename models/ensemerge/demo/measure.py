"""Ask every model the same questions through the server, and note what it answered and what it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ensemerge.demo.digits import Images
from ensemerge.demo.make import UNIT
from ensemerge.measures.scores import Floats, softmax
from ensemerge.progress import Notify
from ensemerge_client import AsyncClient, Label, Result

IN_FLIGHT = 8
# Models take turns after so many requests: what else the machine does then slows all of them alike.
TURN_REQUESTS = 500
COST_REQUESTS = 300
USERS = 2_000


@dataclass
class Log:
    """What a model has answered so far, in the order of the requests."""

    probabilities: list[Floats] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    prediction_ids: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compute_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """One model's answers to the first `rows` requests of the stream."""

    model: str
    rows: int
    log: Log


async def measure(address: str, plan: dict[str, int], stream: Images, seed: int, notify: Notify) -> list[Measurement]:
    """Send each model of `plan` as many requests of the stream as it says, one image each.

    Every request names a user, drawn from `USERS`: an experiment keeps each on one arm.
    """
    users = np.random.default_rng(seed).integers(USERS, size=len(stream))
    logs = {model: Log() for model in plan}
    total = sum(plan.values())
    async with AsyncClient(address) as client:
        for turn, (model, rows) in enumerate(_turns(plan)):
            await _send(client, model, stream, users, rows, logs[model])
            done = min(total, (turn + 1) * TURN_REQUESTS)
            notify("requests through the server", done, total)
        await _measure_costs(client, logs, stream)
    return [Measurement(model, rows, logs[model]) for model, rows in plan.items()]


async def send_labels(address: str, measurements: Sequence[Measurement], stream: Images, notify: Notify) -> None:
    """Tell the server the truth about every answer of the stream."""
    async with AsyncClient(address) as client:
        for position, measurement in enumerate(measurements):
            truth = stream.digits.numpy()
            ids = measurement.log.prediction_ids
            await client.send_labels(Label(name, 0, int(truth[row])) for row, name in enumerate(ids))
            notify("labels", position + 1, len(measurements))


def _turns(plan: dict[str, int]) -> Iterator[tuple[str, range]]:
    """Who is asked which requests, in which order."""
    for start in range(0, max(plan.values()), TURN_REQUESTS):
        for model, rows in plan.items():
            if start < rows:
                yield model, range(start, min(start + TURN_REQUESTS, rows))


async def _send(client: AsyncClient, model: str, stream: Images, users: np.ndarray, rows: range, log: Log) -> None:
    """Send the requests `rows` with `IN_FLIGHT` of them on the way at any time."""
    results: dict[int, tuple[Result, float]] = {}
    waiting = iter(rows)

    async def worker() -> None:
        for row in waiting:
            image = _image(stream, row)
            started = time.perf_counter()
            result = await client.infer(model, {"image": image}, parameters={UNIT: f"user-{users[row]}"})
            results[row] = result, time.perf_counter() - started

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    log.seconds += time.perf_counter() - started
    for row in rows:
        result, latency = results[row]
        log.probabilities.append(_probabilities(result))
        log.latencies.append(latency)
        log.prediction_ids.append(result.prediction_id)
        log.arms.append(result.arm)


async def _measure_costs(client: AsyncClient, logs: dict[str, Log], stream: Images) -> None:
    """The computing time of single rows, the models in turn, with nothing else on the way."""
    for row in range(COST_REQUESTS):
        for model, log in logs.items():
            result = await client.infer(model, {"image": _image(stream, row % len(stream))})
            if result.timings is not None:
                log.compute_seconds.append(result.timings.compute_seconds / result.timings.batch_rows)


def _image(stream: Images, row: int) -> np.ndarray:
    """One image of the stream, as a batch of one."""
    return stream.pixels[row : row + 1].numpy()


def _probabilities(result: Result) -> Floats:
    """The answer to one image, `(10,)`, whichever scale the model answers on."""
    if "probabilities" in result.outputs:
        return np.asarray(result["probabilities"][0])
    return softmax(result["logits"][0])
