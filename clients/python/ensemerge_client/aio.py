"""The asyncio client."""

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


class AsyncClient:
    """Calls one server from one event loop. Use it as an async context manager, or close it.

    Every call takes `timeout_seconds`, the client's own by default, and raises a subclass of ClientError.
    """

    def __init__(self, target: str = "localhost:8001", *, timeout_seconds: float = calls.TIMEOUT_SECONDS) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        # A channel belongs to the event loop that runs when it is made: not before the first call.
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, grpc.aio.UnaryUnaryMultiCallable[Any, Any]] = {}

    async def infer(
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
        return await self._run(call, timeout_seconds)

    async def send_labels(self, labels: Iterable[Label], *, timeout_seconds: float | None = None) -> list[LabelResult]:
        """Send the truth about earlier answers; returns when it is on the server's disk, one result for each label."""
        results: list[LabelResult] = []
        for call in calls.send_labels(labels):
            answered: list[LabelResult] = await self._run(call, timeout_seconds)
            results += answered
        return results

    async def is_live(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether the server runs."""
        return await self._run(calls.is_live(), timeout_seconds)

    async def is_ready(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether every model of the server can answer."""
        return await self._run(calls.is_ready(), timeout_seconds)

    async def is_model_ready(self, model: str, version: str = "", *, timeout_seconds: float | None = None) -> bool:
        """Whether `model` can answer; an unknown one cannot."""
        return await self._run(calls.is_model_ready(model, version), timeout_seconds)

    async def server_metadata(self, *, timeout_seconds: float | None = None) -> ServerMetadata:
        """The server's name, version and extensions."""
        return await self._run(calls.server_metadata(), timeout_seconds)

    async def model_metadata(
        self, model: str, version: str = "", *, timeout_seconds: float | None = None
    ) -> ModelMetadata:
        """What `model` takes and gives."""
        return await self._run(calls.model_metadata(model, version), timeout_seconds)

    async def models(self, *, timeout_seconds: float | None = None) -> list[ModelState]:
        """Every model of the server's repository, and why those that are not ready are not."""
        return await self._run(calls.models(), timeout_seconds)

    async def experiments(self, name: str = "", *, timeout_seconds: float | None = None) -> list[ExperimentReport]:
        """How the arms of an experiment have fared so far; of all experiments without a name."""
        return await self._run(calls.experiments(name), timeout_seconds)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: calls.Call[T], timeout_seconds: float | None) -> T:
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            answer = await self._method(call)(call.request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error, self._target) from error
        except (ValueError, grpc.aio.UsageError) as error:  # what grpc says of a closed channel
            raise ClientClosed(f"the client of {self._target} is closed; open another one") from error
        return call.read(answer)

    def _method(self, call: calls.Call[T]) -> grpc.aio.UnaryUnaryMultiCallable[Any, Any]:
        if call.rpc not in self._methods:
            self._methods[call.rpc] = self._opened().unary_unary(
                call.rpc,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
        return self._methods[call.rpc]

    def _opened(self) -> grpc.aio.Channel:
        if self._channel is None:
            options = calls.channel_options(self._target)
            self._channel = grpc.aio.insecure_channel(self._target, options=options)
        return self._channel
