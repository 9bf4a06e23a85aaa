"""The Open Inference Protocol and the health protocol, without a transport."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ensemerge import __version__
from ensemerge.errors import (
    Cancelled,
    DeadlineExceeded,
    EnsemergeError,
    InvalidRequest,
    NotFound,
    ShuttingDown,
    Unavailable,
)
from ensemerge_protos import health_pb2, inference_pb2
from ensemerge_server import codec
from ensemerge_server.catalogue import Catalogue, Deployed
from ensemerge_server.lifecycle import Lifecycle
from ensemerge_server.recording import Recorder
from ensemerge_server.rpc import Call, Deliver, Finish, Method, at_once, expected, failing, parse, status_of
from ensemerge_server.servable import Parameter, Reply, Request

PLATFORMS = {"onnx": "onnxruntime_onnx", "merge": "onnxruntime_onnx", "ensemble": "onnxruntime_onnx"}


@dataclass(frozen=True)
class Limits:
    """How large a client's id may be, and what the server calls itself."""

    server_name: str
    id_bytes: int


class InferenceService:
    """The Open Inference Protocol."""

    def __init__(self, catalogue: Catalogue, recorder: Recorder, lifecycle: Lifecycle, limits: Limits) -> None:
        self._catalogue = catalogue
        self._recorder = recorder
        self._lifecycle = lifecycle
        self._limits = limits

    def methods(self) -> Mapping[str, Method]:
        pb = inference_pb2
        methods: dict[str, Method] = {
            "ServerLive": at_once(pb.ServerLiveRequest, lambda message: pb.ServerLiveResponse(live=True)),
            "ServerReady": at_once(pb.ServerReadyRequest, lambda message: pb.ServerReadyResponse(ready=self.ready)),
            "ModelReady": at_once(pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": at_once(pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": at_once(pb.ModelMetadataRequest, self._model_metadata),
            "RepositoryIndex": at_once(pb.RepositoryIndexRequest, self._repository_index),
            "ModelInfer": self.infer,
        }
        return {f"/inference.GRPCInferenceService/{name}": method for name, method in methods.items()}

    @property
    def ready(self) -> bool:
        """Every model of the repository can answer, and the server is not stopping."""
        return self._catalogue.ready and not self._lifecycle.stopping

    def infer(self, message: bytes, call: Call, deliver: Deliver) -> None:
        """ModelInfer. The answer is made on the transport's thread: the model's own has the next batch to run."""
        started = time.monotonic()
        known = ""
        self._lifecycle.enter()
        try:
            parsed = parse(inference_pb2.ModelInferRequest, message)
            deployed = self._find(parsed.model_name, parsed.model_version)
            known = deployed.name
            request = self._request(parsed, deployed, call)
        except Exception as error:  # one that nobody foresaw must not leave the request in flight for ever
            deliver(self._refusal(known, expected(error)))
            return
        deployed.servable.submit(
            request, lambda outcome: deliver(lambda: self._finish(deployed, request, outcome, started))
        )

    def _finish(self, deployed: Deployed, request: Request, outcome: Reply | EnsemergeError, started: float) -> bytes:
        self._lifecycle.leave()
        outcome = _if_still_wanted(request, outcome)
        if isinstance(outcome, EnsemergeError):
            self._recorder.metrics.refused(deployed.name, status_of(outcome).name, outcome.parameters)
            raise outcome
        prediction_id = self._recorder.answered(deployed, request, outcome, time.monotonic() - started)
        told: dict[str, Parameter] = {
            "prediction_id": prediction_id,
            "queue_seconds": outcome.timings.queue_seconds,
            "compute_seconds": outcome.timings.compute_seconds,
            "batch_rows": outcome.timings.batch_rows,
        }
        return codec.encode_reply(deployed.name, request.id, outcome, told).SerializeToString()

    def _refusal(self, known: str, error: EnsemergeError) -> Finish:
        self._lifecycle.leave()
        self._recorder.metrics.refused(known, status_of(error).name, {})
        return failing(error)

    def _request(self, message: inference_pb2.ModelInferRequest, deployed: Deployed, call: Call) -> Request:
        if len(message.id.encode()) > self._limits.id_bytes:
            raise InvalidRequest(
                f"the request's id has {len(message.id.encode())} bytes; expected at most {self._limits.id_bytes}"
            )
        signature = deployed.servable.signature
        return Request(
            id=message.id,
            inputs=codec.decode_inputs(message, deployed.name, signature),
            parameters=codec.decode_parameters(message.parameters),
            outputs=codec.decode_outputs(message, deployed.name, signature),
            deadline=call.deadline,
            cancelled=call.cancelled,
        )

    def _find(self, name: str, version: str) -> Deployed:
        if self._lifecycle.stopping:
            raise ShuttingDown("GRPC server is shutting down and takes no more requests; try another replica")
        try:
            return self._catalogue.get(name, version)
        except ValueError as error:
            raise InvalidRequest(
                f"failed to get model version from specified version string '{version[:80]}'; expected a number like 1"
            ) from error

    def _model_ready(self, message: inference_pb2.ModelReadyRequest) -> inference_pb2.ModelReadyResponse:
        return inference_pb2.ModelReadyResponse(ready=self.is_model_ready(message.name, message.version))

    def is_model_ready(self, name: str, version: str) -> bool:
        """Whether a model can answer; an unknown one cannot. Raises InvalidRequest for a version that is no number."""
        try:
            self._find(name, version)
        except (NotFound, Unavailable):
            return False
        return True

    def _server_metadata(self, message: inference_pb2.ServerMetadataRequest) -> inference_pb2.ServerMetadataResponse:
        return inference_pb2.ServerMetadataResponse(
            name=self._limits.server_name,
            version=__version__,
            extensions=["binary_tensor_data", "model_repository", "parameters"],
        )

    def _model_metadata(self, message: inference_pb2.ModelMetadataRequest) -> inference_pb2.ModelMetadataResponse:
        deployed = self._find(message.name, message.version)
        signature = deployed.servable.signature
        return inference_pb2.ModelMetadataResponse(
            name=deployed.name,
            versions=[str(deployed.version)],
            platform=PLATFORMS.get(deployed.kind, f"ensemerge_{deployed.kind}"),
            inputs=codec.encode_specs(signature.inputs),
            outputs=codec.encode_specs(signature.outputs),
        )

    def _repository_index(self, message: inference_pb2.RepositoryIndexRequest) -> inference_pb2.RepositoryIndexResponse:
        entries = [entry for entry in self._catalogue.index() if entry.state == "READY" or not message.ready]
        models = [
            inference_pb2.RepositoryIndexResponse.ModelIndex(
                name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
            )
            for entry in entries
        ]
        return inference_pb2.RepositoryIndexResponse(models=models)


def _if_still_wanted(request: Request, outcome: Reply | EnsemergeError) -> Reply | EnsemergeError:
    """An answer that nobody gets must not be counted, nor stand in the way of a retry under the same id."""
    if isinstance(outcome, EnsemergeError) or not request.cancelled():
        return outcome
    late = request.deadline < time.monotonic()
    gone = (
        DeadlineExceeded("Request timeout expired while the model ran") if late else Cancelled("the caller went away")
    )
    gone.parameters = outcome.parameters
    return gone


class HealthService:
    """The gRPC health protocol: the server as a whole (readiness), or a model by its name."""

    def __init__(self, inference: InferenceService, catalogue: Catalogue) -> None:
        self._inference = inference
        self._catalogue = catalogue

    def methods(self) -> Mapping[str, Method]:
        return {"/grpc.health.v1.Health/Check": at_once(health_pb2.HealthCheckRequest, self._check)}

    def _check(self, message: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse.ServingStatus
        if message.service in ("", "inference.GRPCInferenceService"):
            serving = self._inference.ready
        else:
            serving = self._model_serves(message.service)
        return health_pb2.HealthCheckResponse(status=status.SERVING if serving else status.NOT_SERVING)

    def _model_serves(self, name: str) -> bool:
        """Whether a model answers. Raises NotFound, as the protocol wants, for one that is not in the repository."""
        if name not in {entry.name for entry in self._catalogue.index()}:
            self._catalogue.get(name)
        return self._inference.is_model_ready(name, "")
