"""The one call shape: everything that answers a request is a servable.

    servable.submit(request, done)

A session, an ensemble, a cascade, a shadowed pair and an experiment are all servables, and wrapping one in another is
the only way to compose them. `done` is called exactly once, on any thread, with a Reply or with an error of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ensemerge.errors import EnsemergeError

Parameter = bool | int | float | str
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a servable takes or gives: the protocol's name of its dtype, and its shape, -1 where it varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a servable takes and gives. `batched`: axis 0 of every tensor is the batch, and rows are independent."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Request:
    """One question. `outputs` names those wanted, empty for all; `deadline` is on the clock of `time.monotonic`."""

    id: str
    inputs: Arrays
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    deadline: float = math.inf
    cancelled: Callable[[], bool] = never

    @property
    def rows(self) -> int:
        """The length of axis 0 of the first input; 1 for a scalar."""
        shape = next(iter(self.inputs.values())).shape
        return shape[0] if shape else 1


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went. `compute_seconds` is that of the whole batch of `batch_rows` rows."""

    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    batch_rows: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: arrays by output name, what else the client is told, and the version that ran."""

    outputs: Arrays
    version: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    timings: Timings = Timings()


Done = Callable[[Reply | EnsemergeError], None]


class Servable(Protocol):
    """Anything that answers requests."""

    @property
    def signature(self) -> Signature: ...

    def submit(self, request: Request, done: Done) -> None:
        """Answer `request`, now or later, through `done`. Never raises for what is wrong with the request."""
        ...


class Annotated:
    """A servable whose every reply carries some constant parameters."""

    def __init__(self, inner: Servable, parameters: Mapping[str, Parameter]) -> None:
        self._inner = inner
        self._parameters = dict(parameters)
        self.signature = inner.signature

    def submit(self, request: Request, done: Done) -> None:
        self._inner.submit(request, lambda outcome: done(with_parameters(outcome, self._parameters)))


def with_parameters(outcome: Reply | EnsemergeError, extra: Mapping[str, Parameter]) -> Reply | EnsemergeError:
    """The same outcome, which gains `extra` parameters; an error has them too, for whoever counts it."""
    if isinstance(outcome, EnsemergeError):
        outcome.parameters = {**outcome.parameters, **extra}
        return outcome
    return replace(outcome, parameters={**outcome.parameters, **extra})
