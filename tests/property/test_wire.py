"""Client and server agree on every array, and no bytes at all bring the decoder down."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ensemerge.errors import InvalidRequest
from ensemerge_client import messages
from ensemerge_protos import inference_pb2
from ensemerge_protos.datatypes import NUMPY
from ensemerge_server import codec
from ensemerge_server.rpc import parse
from ensemerge_server.servable import Reply, Signature, TensorSpec

NUMERIC = sorted(set(NUMPY) - {"BYTES"})
SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


def signature(datatype: str, rank: int) -> Signature:
    spec = TensorSpec("x", datatype, (-1,) * rank)
    return Signature((spec,), (spec,), False)


@given(st.data(), st.sampled_from(NUMERIC), SHAPES)
def test_arrays_arrive_and_return_bit_for_bit(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    array = data.draw(arrays.arrays(NUMPY[datatype], shape))
    request = messages.infer_request("m", {"x": array}, id="7")
    read = codec.decode_inputs(request, "m", signature(datatype, len(shape)))["x"]
    assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    back = messages.result(codec.encode_reply("m", "7", Reply({"x": read}, "1"), {}))["x"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(st.lists(st.text(max_size=20), max_size=8))
def test_strings_arrive_and_return(values: list[str]) -> None:
    array = np.array(values, dtype=object)
    read = codec.decode_inputs(messages.infer_request("m", {"x": array}), "m", signature("BYTES", 1))["x"]
    assert read.tolist() == values
    back = messages.result(codec.encode_reply("m", "", Reply({"x": read}, "1"), {}))["x"]
    assert [value.decode() for value in back] == values


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error_of_ours(body: bytes) -> None:
    try:
        message = parse(inference_pb2.ModelInferRequest, body)
        codec.decode_inputs(message, "m", signature("FP32", 2))
    except InvalidRequest:
        return
    assert message.inputs


SHAPED = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)


@settings(max_examples=300)
@given(shape=SHAPED, raw=st.binary(max_size=64), datatype=st.sampled_from(["FP32", "BYTES", "INT8", "FP99", ""]))
def test_shapes_that_lie_are_refused(shape: list[int], raw: bytes, datatype: str) -> None:
    message = inference_pb2.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    known = datatype if datatype in NUMPY else "FP32"
    try:
        array = codec.decode_inputs(message, "m", signature(known, len(shape)))["x"]
    except InvalidRequest:
        return
    assert list(array.shape) == shape
    assert datatype in NUMPY
