"""The asyncio client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from ensemerge_client import messages, rpcs
from ensemerge_client.errors import from_rpc
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
from ensemerge_protos import ensemerge_pb2, inference_pb2

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)


class AsyncClient:
    """Calls one server from one event loop. Use it as an async context manager, or close it.

    Every call takes `timeout_seconds` or the client's own, and raises a subclass of ClientError.
    """

    def __init__(self, target: str = "localhost:8001", *, timeout_seconds: float = rpcs.TIMEOUT_SECONDS) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._channel = grpc.aio.insecure_channel(target, options=rpcs.CHANNEL_OPTIONS)
        self._infer = self._channel.unary_unary(
            rpcs.MODEL_INFER.name,
            request_serializer=inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )

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
        request = messages.infer_request(model, inputs, version=version, outputs=outputs, id=id, parameters=parameters)
        try:
            response = await self._infer(request, timeout=timeout_seconds or self._timeout_seconds)
        except grpc.RpcError as error:
            raise from_rpc(error, self._target) from error
        return messages.result(response)

    async def send_labels(self, labels: Iterable[Label], *, timeout_seconds: float | None = None) -> list[LabelResult]:
        """Send the truth about earlier answers; returns when it is on the server's disk, one result for each label."""
        results: list[LabelResult] = []
        for request in messages.label_requests(labels):
            results += messages.label_results(await self._call(rpcs.SEND_LABELS, request, timeout_seconds))
        return results

    async def is_live(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether the server runs."""
        request = inference_pb2.ServerLiveRequest()
        return (await self._call(rpcs.SERVER_LIVE, request, timeout_seconds)).live

    async def is_ready(self, *, timeout_seconds: float | None = None) -> bool:
        """Whether every model of the server can answer."""
        request = inference_pb2.ServerReadyRequest()
        return (await self._call(rpcs.SERVER_READY, request, timeout_seconds)).ready

    async def is_model_ready(self, model: str, version: str = "", *, timeout_seconds: float | None = None) -> bool:
        """Whether `model` can answer; an unknown one cannot."""
        request = inference_pb2.ModelReadyRequest(name=model, version=version)
        return (await self._call(rpcs.MODEL_READY, request, timeout_seconds)).ready

    async def server_metadata(self, *, timeout_seconds: float | None = None) -> ServerMetadata:
        """The server's name, version and extensions."""
        request = inference_pb2.ServerMetadataRequest()
        return messages.server_metadata(await self._call(rpcs.SERVER_METADATA, request, timeout_seconds))

    async def model_metadata(
        self, model: str, version: str = "", *, timeout_seconds: float | None = None
    ) -> ModelMetadata:
        """What `model` takes and gives."""
        request = inference_pb2.ModelMetadataRequest(name=model, version=version)
        return messages.model_metadata(await self._call(rpcs.MODEL_METADATA, request, timeout_seconds))

    async def models(self, *, timeout_seconds: float | None = None) -> list[ModelState]:
        """Every model of the server's repository, and why those that are not ready are not."""
        request = inference_pb2.RepositoryIndexRequest()
        return messages.model_states(await self._call(rpcs.REPOSITORY_INDEX, request, timeout_seconds))

    async def experiments(self, name: str = "", *, timeout_seconds: float | None = None) -> list[ExperimentReport]:
        """How the arms of an experiment have fared so far; of all experiments without a name."""
        request = ensemerge_pb2.ListExperimentsRequest(name=name)
        return messages.experiment_reports(await self._call(rpcs.LIST_EXPERIMENTS, request, timeout_seconds))

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, rpc: rpcs.Rpc[Q, A], request: Q, timeout_seconds: float | None) -> A:
        method = self._channel.unary_unary(
            rpc.name, request_serializer=rpc.request.SerializeToString, response_deserializer=rpc.answer.FromString
        )
        try:
            return await method(request, timeout=timeout_seconds or self._timeout_seconds)
        except grpc.RpcError as error:
            raise from_rpc(error, self._target) from error
