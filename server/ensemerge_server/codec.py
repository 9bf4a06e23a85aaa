"""Between the protocol's messages and requests and replies: what a client sent is checked here, and nowhere else.

The texts of the errors contain what Triton's say, since clients and their test suites match on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np

from ensemerge.errors import InvalidRequest, Unsupported
from ensemerge_protos import inference_pb2 as pb
from ensemerge_protos.datatypes import NAMES, NUMPY, pack_strings, unpack_strings
from ensemerge_server.servable import Parameter, Reply, Signature, TensorSpec

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
Inputs = Sequence["pb.ModelInferRequest.InferInputTensor"]


def decode_inputs(message: pb.ModelInferRequest, model: str, signature: Signature) -> dict[str, np.ndarray]:
    """The arrays of a request, checked against the model's signature. Raises InvalidRequest."""
    expected = {spec.name: spec for spec in signature.inputs}
    _check_names(message.inputs, expected, model)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"expected {len(message.inputs)} raw_input_contents, one for each input, got {len(raw)} for model '{model}'"
        )
    arrays = {}
    for position, tensor in enumerate(message.inputs):
        _refuse_tensor_parameters(tensor.parameters, tensor.name)
        _check_tensor(tensor, expected[tensor.name], model)
        if raw:
            arrays[tensor.name] = _from_raw(tensor, raw[position], model)
        else:
            arrays[tensor.name] = _from_contents(tensor, model)
    if signature.batched:
        _check_batch(arrays, model)
    return arrays


def _check_batch(arrays: Mapping[str, np.ndarray], model: str) -> None:
    rows = next(iter(arrays.values())).shape[0]
    for name, array in arrays.items():
        if array.shape[0] != rows:
            raise InvalidRequest(
                f"input '{name}' batch size does not match other inputs for '{model}': "
                f"expected {rows}, got {array.shape[0]}"
            )


def decode_outputs(message: pb.ModelInferRequest, model: str, signature: Signature) -> tuple[str, ...]:
    """The names of the outputs that a request wants; empty for all. Raises InvalidRequest."""
    known = {spec.name for spec in signature.outputs}
    names = tuple(output.name for output in message.outputs)
    for position, name in enumerate(names):
        if name not in known:
            raise InvalidRequest(
                f"unexpected inference output '{_cut(name)}' for model '{model}'; expected: {', '.join(sorted(known))}"
            )
        if name in names[:position]:
            raise InvalidRequest(f"output '{name}' already exists in request; expected each output once")
    for output in message.outputs:
        _refuse_tensor_parameters(output.parameters, output.name)
    return names


def _refuse_tensor_parameters(parameters: Mapping[str, pb.InferParameter], tensor: str) -> None:
    """What would change the meaning of a tensor must not be passed over in silence. Others mean nothing to us."""
    if "shared_memory_region" in parameters:
        raise Unsupported(f"Client shared memory is disabled; send and read '{tensor}' inside the message")
    if "classification" in parameters:
        raise Unsupported(f"classification of '{tensor}' is not offered; ask for the output and sort it")


def decode_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    """The parameters of a request as Python values; one without a value is left out. Raises Unsupported."""
    if any(name.startswith("sequence_") for name in parameters):
        raise Unsupported("sequences are not offered: every request stands for itself")
    decoded: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            decoded[name] = getattr(parameter, choice)
    return decoded


def encode_reply(model: str, request_id: str, reply: Reply, extra: Mapping[str, Parameter]) -> pb.ModelInferResponse:
    """A reply as the protocol's message: outputs raw, one entry each; the reply's parameters and the `extra` ones."""
    response = pb.ModelInferResponse(model_name=model, model_version=reply.version, id=request_id)
    for name, value in (*reply.parameters.items(), *extra.items()):
        _set_parameter(response.parameters[name], value)
    for name, array in reply.outputs.items():
        response.outputs.add(name=name, datatype=NAMES[array.dtype], shape=array.shape)
        response.raw_output_contents.append(_to_raw(array))
    return response


def encode_specs(specs: Iterable[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    """A signature's tensors as the protocol's metadata."""
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        for spec in specs
    ]


def _check_names(inputs: Inputs, expected: Mapping[str, TensorSpec], model: str) -> None:
    names = [tensor.name for tensor in inputs]
    if len(names) != len(expected):
        missing = [name for name in expected if name not in names]
        raise InvalidRequest(
            f"expected {len(expected)} inputs but got {len(names)} inputs for model '{model}'. "
            f"Got [{', '.join(map(_cut, names[:20]))}], missing [{', '.join(missing)}]"
        )
    for position, name in enumerate(names):
        if name not in expected:
            raise InvalidRequest(
                f"unexpected inference input '{_cut(name)}' for model '{model}'; expected: {', '.join(expected)}"
            )
        if name in names[:position]:
            raise InvalidRequest(f"input '{name}' already exists in request; expected each input once")


def _check_tensor(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, model: str) -> None:
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            f"inference input '{spec.name}' data-type is '{_cut(tensor.datatype)}', "
            f"but model '{model}' expects '{spec.datatype}'"
        )
    shape = list(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(
        got >= 0 and want in (-1, got) for got, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{model}'. "
            f"Expected {_shown(spec.shape)}, got {_shown(shape)}"
        )


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes, model: str) -> np.ndarray:
    if tensor.HasField("contents"):
        raise InvalidRequest(
            "contents field must not be specified when using raw_input_contents "
            f"for '{tensor.name}' for model '{model}'"
        )
    if tensor.datatype == "BYTES":
        return _strings(_raw_strings(tensor.name, raw, model), tensor, model)
    dtype = NUMPY[tensor.datatype]
    expected = prod(tensor.shape) * dtype.itemsize
    if len(raw) != expected:
        raise InvalidRequest(
            f"input byte size mismatch for input '{tensor.name}' for model '{model}'. "
            f"Expected {expected}, got {len(raw)}"
        )
    return _shaped(np.frombuffer(raw, dtype), tensor, model)


def _shaped(array: np.ndarray, tensor: pb.ModelInferRequest.InferInputTensor, model: str) -> np.ndarray:
    """The array in the shape that the request states; numpy has no axis longer than memory could be."""
    try:
        return array.reshape(tuple(tensor.shape))
    except ValueError as error:
        shown = _shown(tensor.shape)
        raise InvalidRequest(
            f"unexpected shape {shown} for input '{tensor.name}' for model '{model}': {error}"
        ) from error


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, model: str) -> np.ndarray:
    if not tensor.HasField("contents"):
        if prod(tensor.shape) == 0:
            return _shaped(np.zeros(0, NUMPY[tensor.datatype]), tensor, model)
        raise InvalidRequest(
            f"unable to find data for input tensor '{tensor.name}' for model '{model}'; "
            "expected raw_input_contents, or contents"
        )
    field = _CONTENTS.get(tensor.datatype)
    used = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if used not in ([], [field]):
        raise InvalidRequest(
            f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{model}': "
            f"{tensor.datatype} goes into {field or 'raw_input_contents'}, got {', '.join(used)}"
        )
    values = getattr(tensor.contents, field) if field else []
    if tensor.datatype == "BYTES":
        return _strings(list(values), tensor, model)
    return _numbers(values, tensor, model)


def _numbers(values: Sequence[float], tensor: pb.ModelInferRequest.InferInputTensor, model: str) -> np.ndarray:
    expected = prod(tensor.shape)
    if len(values) != expected:
        raise InvalidRequest(
            f"input element count mismatch for input '{tensor.name}' for model '{model}'. "
            f"Expected {expected}, got {len(values)}"
        )
    dtype = NUMPY[tensor.datatype]
    array = np.array(values)
    if dtype.kind in "iu" and array.size and not np.array_equal(array, array.astype(dtype)):
        raise InvalidRequest(f"input '{tensor.name}' for model '{model}' has values that do not fit {tensor.datatype}")
    return _shaped(array.astype(dtype), tensor, model)


def _raw_strings(name: str, raw: bytes, model: str) -> list[bytes]:
    try:
        return list(unpack_strings(raw))
    except ValueError as error:
        raise InvalidRequest(f"{error} for input '{name}' for model '{model}'") from error


def _strings(values: Sequence[bytes], tensor: pb.ModelInferRequest.InferInputTensor, model: str) -> np.ndarray:
    expected = prod(tensor.shape)
    if len(values) != expected:
        raise InvalidRequest(
            f"unexpected number of string elements {len(values)} for input '{tensor.name}' for model '{model}'; "
            f"expected {expected}"
        )
    array = np.empty(expected, dtype=object)
    try:
        array[:] = [value.decode() for value in values]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input '{tensor.name}' for model '{model}' is not UTF-8: {error}") from error
    return _shaped(array, tensor, model)


def _to_raw(array: np.ndarray) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return pack_strings(str(value).encode() for value in array.ravel())


def _set_parameter(parameter: pb.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _cut(text: str) -> str:
    """A client's own text in a message of ours, at most a line of it."""
    return text if len(text) <= 80 else text[:77] + "…"


def _shown(shape: Sequence[int]) -> str:
    """A shape as Triton prints it: `[-1,16]`."""
    return f"[{','.join(map(str, shape))}]"
