"""The RPCs that the clients call: their names and messages, written down once for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from ensemerge_protos import ensemerge_pb2, inference_pb2

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

# Messages are as large as their tensors; the server has a limit of its own.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Rpc(Generic[Q, A]):
    """One unary RPC: its full name, and what goes there and comes back."""

    name: str
    request: type[Q]
    answer: type[A]


_INFERENCE = "/inference.GRPCInferenceService/"
_OWN = "/ensemerge.v1.Ensemerge/"

SERVER_LIVE = Rpc(f"{_INFERENCE}ServerLive", inference_pb2.ServerLiveRequest, inference_pb2.ServerLiveResponse)
SERVER_READY = Rpc(f"{_INFERENCE}ServerReady", inference_pb2.ServerReadyRequest, inference_pb2.ServerReadyResponse)
MODEL_READY = Rpc(f"{_INFERENCE}ModelReady", inference_pb2.ModelReadyRequest, inference_pb2.ModelReadyResponse)
SERVER_METADATA = Rpc(
    f"{_INFERENCE}ServerMetadata", inference_pb2.ServerMetadataRequest, inference_pb2.ServerMetadataResponse
)
MODEL_METADATA = Rpc(
    f"{_INFERENCE}ModelMetadata", inference_pb2.ModelMetadataRequest, inference_pb2.ModelMetadataResponse
)
MODEL_INFER = Rpc(f"{_INFERENCE}ModelInfer", inference_pb2.ModelInferRequest, inference_pb2.ModelInferResponse)
REPOSITORY_INDEX = Rpc(
    f"{_INFERENCE}RepositoryIndex", inference_pb2.RepositoryIndexRequest, inference_pb2.RepositoryIndexResponse
)
SEND_LABELS = Rpc(f"{_OWN}SendLabels", ensemerge_pb2.SendLabelsRequest, ensemerge_pb2.SendLabelsResponse)
LIST_EXPERIMENTS = Rpc(
    f"{_OWN}ListExperiments", ensemerge_pb2.ListExperimentsRequest, ensemerge_pb2.ListExperimentsResponse
)
