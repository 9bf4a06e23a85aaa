"""The synchronous client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np

from ensemerge_client import calls
from ensemerge_client.errors import ClientClosed, from_rpc
from ensemerge_client.results import (
    ExperimentReport,
    Label,
    LabelResult,
    ModelMetadata,
    ModelState,
    Parameter,
    Result,
    ServerMetadata,
)

T = TypeVar("T")


class Client:
    """Calls one server. Safe to share between threads; use it as a context manager, or close it.

    Every call takes `timeout_seconds`, the client's own by default, and raises a subclass of ClientError.
    """

    def __init__(self, target: str = "localhost:8001", *, timeout_seconds: float = calls.TIMEOUT_SECONDS) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.insecure_channel(target, options=calls.channel_options(target))
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable[Any, Any]] = {}

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        id: str = "",
        parameters: Mapping[str, Parameter] | None = None,
        timeout_seconds: float | None = None,
    ) -> Result:
        """Ask `model` about `inputs`, arrays by name with the batch on axis 0.

        `version` and `outputs` default to the newest and to all; `parameters` may carry an experiment's unit.
        """
        call = calls.infer(model, inputs, version, outputs, id, parameters)
        return self._run(call, timeout_seconds)

    def send_labels(self, labels: Iterable[Label], *, timeout_seconds: float | None = None) -> list[LabelResult]:
        """Send the truth about earlier answers; returns when it is on the server's disk, one result for each label."""
        results: list[LabelResult] = []
        for call in calls.send_labels(labels):
            answered: list[LabelResult] = self._run(call, timeout_seconds)
            results += answered
        return results

    def is_live(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether the server runs."""
        return self._run(calls.is_live(), timeout_seconds)

    def is_ready(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether every model of the server can answer."""
        return self._run(calls.is_ready(), timeout_seconds)

    def is_model_ready(self, model: str, version: str = "", *, timeout_seconds: float | None = None) -> bool:
        """Whether `model` can answer; an unknown one cannot."""
        return self._run(calls.is_model_ready(model, version), timeout_seconds)

    def server_metadata(self, *, timeout_seconds: float | None = None) -> ServerMetadata:
        """The server's name, version and extensions."""
        return self._run(calls.server_metadata(), timeout_seconds)

    def model_metadata(self, model: str, version: str = "", *, timeout_seconds: float | None = None) -> ModelMetadata:
        """What `model` takes and gives."""
        return self._run(calls.model_metadata(model, version), timeout_seconds)

    def models(self, *, timeout_seconds: float | None = None) -> list[ModelState]:
        """Every model of the server's repository, and why those that are not ready are not."""
        return self._run(calls.models(), timeout_seconds)

    def experiments(self, name: str = "", *, timeout_seconds: float | None = None) -> list[ExperimentReport]:
        """How the arms of an experiment have fared so far; of all experiments without a name."""
        return self._run(calls.experiments(name), timeout_seconds)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: calls.Call[T], timeout_seconds: float | None) -> T:
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            answer = self._method(call)(call.request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error, self._target) from error
        except ValueError as error:  # what grpc says of a closed channel
            raise ClientClosed(f"the client of {self._target} is closed; open another one") from error
        return call.read(answer)

    def _method(self, call: calls.Call[T]) -> grpc.UnaryUnaryMultiCallable[Any, Any]:
        if call.rpc not in self._methods:
            self._methods[call.rpc] = self._channel.unary_unary(
                call.rpc,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
        return self._methods[call.rpc]
