"""What a client gets back, and the label it sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

Parameter = bool | int | float | str


@dataclass(frozen=True)
class Timings:
    """Where the time went on the server. `compute_seconds` is that of a batch of `batch_rows` rows."""

    queue_seconds: float
    compute_seconds: float
    batch_rows: int


@dataclass(frozen=True)
class Result:
    """An answer: arrays by output name, which model and version gave it, and what else the server said.

    The arrays lie in the message's own memory and are read-only; copy one to change it.
    """

    outputs: Mapping[str, np.ndarray]
    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]

    def __getitem__(self, output: str) -> np.ndarray:
        """The array of an output. Raises KeyError, which names those that there are."""
        if output not in self.outputs:
            raise KeyError(f"no output '{output}'; the answer has {', '.join(self.outputs)}")
        return self.outputs[output]

    @property
    def prediction_id(self) -> str:
        """Names this answer when its label comes; empty from a server that issues none."""
        return str(self.parameters.get("prediction_id", ""))

    @property
    def experiment(self) -> str:
        return str(self.parameters.get("experiment", ""))

    @property
    def arm(self) -> str:
        """The arm of the experiment that answered; empty where there is none."""
        return str(self.parameters.get("arm", ""))

    @property
    def members(self) -> tuple[str, ...]:
        """The models behind an ensemble's or a merge's answer, as name:version."""
        names = str(self.parameters.get("members", ""))
        return tuple(names.split(",")) if names else ()

    @property
    def timings(self) -> Timings | None:
        """None from a server that does not tell."""
        told = self.parameters
        if "compute_seconds" not in told:
            return None
        return Timings(
            float(told.get("queue_seconds", 0.0)), float(told["compute_seconds"]), int(told.get("batch_rows", 0))
        )


@dataclass(frozen=True)
class TensorMetadata:
    """An input or output: -1 in `shape` stands for a size that varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True)
class ServerMetadata:
    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class ModelState:
    """A line of the server's repository index; `reason` says why a model is not READY."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Label:
    """The truth about one row of an answer: a class by its index or its name.

    `prediction_id` is the answer's, or the request id that you gave, while that is unique. `time_seconds` is when the
    truth became known, since 1970; 0 means now.
    """

    prediction_id: str
    row: int
    truth: int | str
    time_seconds: float = 0.0


class LabelStatus(Enum):
    """What became of a label; the contract in ensemerge.proto says more."""

    JOINED = 1
    DUPLICATE = 2
    CONFLICT = 3
    PENDING = 4
    AMBIGUOUS = 5
    INVALID = 6


@dataclass(frozen=True)
class LabelResult:
    status: LabelStatus
    message: str


@dataclass(frozen=True)
class ArmReport:
    """How an arm has fared: rows answered, labelled, right, and the summed log-loss of the `scored` ones, in nats."""

    name: str
    model: str
    share: float
    predictions: int
    labelled: int
    correct: int
    log_loss_sum: float
    scored: int


@dataclass(frozen=True)
class ExperimentReport:
    name: str
    unit: str
    arms: tuple[ArmReport, ...]
