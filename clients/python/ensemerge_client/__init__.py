"""A light client for ensemerge, and for any server of the Open Inference Protocol over gRPC.

    with Client("localhost:8001") as client:
        result = client.infer("digits", {"image": image}, parameters={"user_id": "u-17"})
        result["probabilities"], result.arm, result.prediction_id
        client.send_labels([Label(result.prediction_id, row=0, truth=7)])

It needs grpcio, protobuf and numpy, and loads neither torch nor onnxruntime.
"""

from ensemerge_client.aio import AsyncClient
from ensemerge_client.client import Client
from ensemerge_client.errors import (
    ClientClosed,
    ClientError,
    DeadlineExceeded,
    InvalidArgument,
    InvalidReply,
    NotFound,
    PermissionDenied,
    ServerError,
    Unavailable,
)
from ensemerge_client.results import (
    ArmReport,
    ExperimentReport,
    Label,
    LabelResult,
    LabelStatus,
    ModelMetadata,
    ModelState,
    Result,
    ServerMetadata,
    TensorMetadata,
    Timings,
)

__all__ = [
    "ArmReport",
    "AsyncClient",
    "Client",
    "ClientClosed",
    "ClientError",
    "DeadlineExceeded",
    "ExperimentReport",
    "InvalidArgument",
    "InvalidReply",
    "Label",
    "LabelResult",
    "LabelStatus",
    "ModelMetadata",
    "ModelState",
    "NotFound",
    "PermissionDenied",
    "Result",
    "ServerError",
    "ServerMetadata",
    "TensorMetadata",
    "Timings",
    "Unavailable",
]
