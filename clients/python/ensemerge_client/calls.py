"""Every call as data: which RPC, what is sent, and how the answer is read. Both clients run these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import Message

from ensemerge_client import messages
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

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0
_LOOPBACK = ("localhost", "127.", "[::1]", "unix:")

_INFERENCE = "/inference.GRPCInferenceService/"
_OWN = "/ensemerge.v1.Ensemerge/"
MODEL_INFER = f"{_INFERENCE}ModelInfer"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One unary call: the RPC's full name, the message, the type of the answer, and what to make of it."""

    rpc: str
    request: Message
    answer: type[Message]
    read: Callable[[Any], T]


def channel_options(target: str) -> list[tuple[str, int]]:
    """Messages may be as large as their tensors; the server has a limit of its own. A proxy is no way to loopback."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if target.startswith(_LOOPBACK) else options


def infer(
    model: str,
    inputs: Mapping[str, np.ndarray],
    version: str,
    outputs: Sequence[str],
    id: str,
    parameters: Mapping[str, Parameter] | None,
) -> Call[Result]:
    request = messages.infer_request(model, inputs, version=version, outputs=outputs, id=id, parameters=parameters)
    return Call(MODEL_INFER, request, inference_pb2.ModelInferResponse, messages.result)


def send_labels(labels: Iterable[Label]) -> Iterator[Call[list[LabelResult]]]:
    """Several calls where there are many labels."""
    for request in messages.label_requests(labels):
        yield Call(f"{_OWN}SendLabels", request, ensemerge_pb2.SendLabelsResponse, messages.label_results)


def is_live() -> Call[bool]:
    request = inference_pb2.ServerLiveRequest()
    return Call(f"{_INFERENCE}ServerLive", request, inference_pb2.ServerLiveResponse, lambda answer: answer.live)


def is_ready() -> Call[bool]:
    request = inference_pb2.ServerReadyRequest()
    return Call(f"{_INFERENCE}ServerReady", request, inference_pb2.ServerReadyResponse, lambda answer: answer.ready)


def is_model_ready(model: str, version: str) -> Call[bool]:
    request = inference_pb2.ModelReadyRequest(name=model, version=version)
    return Call(f"{_INFERENCE}ModelReady", request, inference_pb2.ModelReadyResponse, lambda answer: answer.ready)


def server_metadata() -> Call[ServerMetadata]:
    request = inference_pb2.ServerMetadataRequest()
    return Call(f"{_INFERENCE}ServerMetadata", request, inference_pb2.ServerMetadataResponse, messages.server_metadata)


def model_metadata(model: str, version: str) -> Call[ModelMetadata]:
    request = inference_pb2.ModelMetadataRequest(name=model, version=version)
    return Call(f"{_INFERENCE}ModelMetadata", request, inference_pb2.ModelMetadataResponse, messages.model_metadata)


def models() -> Call[list[ModelState]]:
    request = inference_pb2.RepositoryIndexRequest()
    return Call(f"{_INFERENCE}RepositoryIndex", request, inference_pb2.RepositoryIndexResponse, messages.model_states)


def experiments(name: str) -> Call[list[ExperimentReport]]:
    request = ensemerge_pb2.ListExperimentsRequest(name=name)
    return Call(f"{_OWN}ListExperiments", request, ensemerge_pb2.ListExperimentsResponse, messages.experiment_reports)
