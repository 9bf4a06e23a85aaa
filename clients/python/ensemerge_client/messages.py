"""Between numpy and the protocol's messages; shared by the synchronous and the asyncio client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import index

import numpy as np

from ensemerge_client.errors import InvalidArgument, InvalidReply
from ensemerge_client.results import (
    ArmReport,
    ExperimentReport,
    Label,
    LabelResult,
    LabelStatus,
    ModelMetadata,
    ModelState,
    Parameter,
    Result,
    ServerMetadata,
    TensorMetadata,
)
from ensemerge_protos import ensemerge_pb2, inference_pb2
from ensemerge_protos.datatypes import NAMES, NUMPY, pack_strings, unpack_strings

LABELS_PER_CALL = 10_000


def infer_request(
    model: str,
    inputs: Mapping[str, np.ndarray],
    *,
    version: str = "",
    outputs: Sequence[str] = (),
    id: str = "",
    parameters: Mapping[str, Parameter] | None = None,
) -> inference_pb2.ModelInferRequest:
    """A request, its arrays raw. Raises InvalidArgument for what the protocol has no form for."""
    with _named("the request"):
        request = inference_pb2.ModelInferRequest(model_name=model, model_version=version, id=id)
        for name in outputs:
            request.outputs.add(name=name)
    for name, value in inputs.items():
        array = np.asarray(value)
        request.inputs.add(name=name, datatype=_datatype(name, array), shape=array.shape)
        request.raw_input_contents.append(_to_raw(array))
    for name, parameter in (parameters or {}).items():
        with _named(f"parameter '{name}'"):
            _set_parameter(request.parameters[name], parameter)
    return request


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn protobuf's complaint about a value into one that says which value it was."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{what} cannot be sent: {error}") from error


def result(response: inference_pb2.ModelInferResponse) -> Result:
    """An answer with its arrays. Raises InvalidReply."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise InvalidReply(
            f"expected {len(response.outputs)} raw outputs, got {len(response.raw_output_contents)}; "
            "the server answers in a form that this client does not read"
        )
    outputs = {
        tensor.name: _from_raw(tensor, raw)
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    return Result(outputs, response.model_name, response.model_version, response.id, _parameters(response.parameters))


def label_requests(labels: Iterable[Label]) -> Iterable[ensemerge_pb2.SendLabelsRequest]:
    """The labels in messages of a bearable size."""
    rest = iter(labels)
    while chunk := list(islice(rest, LABELS_PER_CALL)):
        yield ensemerge_pb2.SendLabelsRequest(labels=[_label(label) for label in chunk])


def label_results(response: ensemerge_pb2.SendLabelsResponse) -> list[LabelResult]:
    return [LabelResult(LabelStatus(entry.status), entry.message) for entry in response.results]


def model_metadata(response: inference_pb2.ModelMetadataResponse) -> ModelMetadata:
    return ModelMetadata(
        response.name,
        tuple(response.versions),
        response.platform,
        _tensors(response.inputs),
        _tensors(response.outputs),
    )


def server_metadata(response: inference_pb2.ServerMetadataResponse) -> ServerMetadata:
    return ServerMetadata(response.name, response.version, tuple(response.extensions))


def model_states(response: inference_pb2.RepositoryIndexResponse) -> list[ModelState]:
    return [ModelState(model.name, model.version, model.state, model.reason) for model in response.models]


def experiment_reports(response: ensemerge_pb2.ListExperimentsResponse) -> list[ExperimentReport]:
    return [
        ExperimentReport(experiment.name, experiment.unit, tuple(_arm(arm) for arm in experiment.arms))
        for experiment in response.experiments
    ]


def _arm(arm: ensemerge_pb2.Arm) -> ArmReport:
    return ArmReport(
        name=arm.name,
        model=arm.model,
        share=arm.share,
        predictions=arm.predictions,
        labelled=arm.labelled,
        correct=arm.correct,
        log_loss_sum=arm.log_loss_sum,
        scored=arm.scored,
    )


def _tensors(tensors: Iterable[inference_pb2.ModelMetadataResponse.TensorMetadata]) -> tuple[TensorMetadata, ...]:
    return tuple(TensorMetadata(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors)


def _label(label: Label) -> ensemerge_pb2.Label:
    with _named(str(label)):
        message = ensemerge_pb2.Label(prediction_id=label.prediction_id, row=label.row, time_seconds=label.time_seconds)
        if isinstance(label.truth, str):
            message.class_name = label.truth
        else:
            message.class_index = index(label.truth)
    return message


def _datatype(name: str, array: np.ndarray) -> str:
    if array.dtype.kind in "SU":
        return "BYTES"
    datatype = NAMES.get(array.dtype.newbyteorder("<") if array.dtype.kind in "iufb" else array.dtype)
    if datatype is None:
        raise InvalidArgument(f"input '{name}' is {array.dtype}; expected one of {', '.join(map(str, NAMES))}")
    return datatype


def _to_raw(array: np.ndarray) -> bytes:
    if array.dtype.kind in "SUO":
        return pack_strings(_encoded(value) for value in array.ravel())
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _encoded(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _from_raw(tensor: inference_pb2.ModelInferResponse.InferOutputTensor, raw: bytes) -> np.ndarray:
    dtype = NUMPY.get(tensor.datatype)
    if dtype is None:
        raise InvalidReply(f"output '{tensor.name}' is {tensor.datatype}; expected one of {', '.join(NUMPY)}")
    try:
        if tensor.datatype == "BYTES":
            return np.array(list(unpack_strings(raw)), dtype=object).reshape(tuple(tensor.shape))
        return np.frombuffer(raw, dtype).reshape(tuple(tensor.shape))
    except ValueError as error:
        raise InvalidReply(f"output '{tensor.name}' {list(tensor.shape)} does not fit its bytes: {error}") from error


def _set_parameter(parameter: inference_pb2.InferParameter, value: Parameter) -> None:
    # A user id from a data frame is a numpy number.
    match value.item() if isinstance(value, np.generic) else value:
        case bool() as value:
            parameter.bool_param = value
        case int() as value:
            parameter.int64_param = value
        case float() as value:
            parameter.double_param = value
        case str() as value:
            parameter.string_param = value
        case other:
            raise TypeError(f"expected a bool, a number or a string, got {type(other).__name__}")


def _parameters(parameters: Mapping[str, inference_pb2.InferParameter]) -> dict[str, Parameter]:
    choices = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in choices.items() if choice is not None}
