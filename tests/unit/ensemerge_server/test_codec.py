import numpy as np
import pytest

from ensemerge.errors import InvalidRequest, Unsupported
from ensemerge_protos import inference_pb2 as pb
from ensemerge_server import codec
from ensemerge_server.servable import Reply, Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 3)),), True)
TWO = Signature((TensorSpec("a", "INT64", (-1,)), TensorSpec("b", "BYTES", (-1, 1))), SIGNATURE.outputs, True)
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def message(raw: bytes | None = X.tobytes(), **changes: object) -> pb.ModelInferRequest:
    fields: dict[str, object] = {"name": "x", "datatype": "FP32", "shape": [2, 4], **changes}
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(**fields)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def decode(request: pb.ModelInferRequest, signature: Signature = SIGNATURE) -> dict[str, np.ndarray]:
    return codec.decode_inputs(request, "m", signature)


def test_raw_bytes_become_an_array_without_a_copy() -> None:
    array = decode(message())["x"]
    assert np.array_equal(array, X)
    assert not array.flags.owndata


def test_typed_contents_are_read_as_well() -> None:
    request = message(None)
    request.inputs[0].contents.fp32_contents.extend(X.ravel().tolist())
    assert np.array_equal(decode(request)["x"], X)


# Texts as in Triton's own suites, where they match by substring.
@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.ModelInferRequest(), "expected 1 inputs but got 0 inputs for model 'm'"),
        (message(name="z"), "unexpected inference input 'z' for model 'm'; expected: x"),
        (message(datatype="FP64"), "inference input 'x' data-type is 'FP64', but model 'm' expects 'FP32'"),
        (message(datatype=""), "data-type is '', but model 'm' expects 'FP32'"),
        (message(shape=[2, 5]), "unexpected shape for input 'x' for model 'm'. Expected [-1,4], got [2,5]"),
        (message(shape=[8]), "Expected [-1,4], got [8]"),
        (message(shape=[-2, 4]), "Expected [-1,4], got [-2,4]"),
        (message(shape=[2**62, 4]), f"Expected {2**66}, got 32"),
        (message(X.tobytes()[:-3]), "input byte size mismatch for input 'x' for model 'm'. Expected 32, got 29"),
        (message(None), "unable to find data for input tensor 'x'"),
    ],
)
def test_what_does_not_fit_says_what_was_expected(request_: pb.ModelInferRequest, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(request_)
    assert text in str(caught.value)


def test_raw_and_typed_data_exclude_each_other() -> None:
    request = message()
    request.inputs[0].contents.fp32_contents.append(1.0)
    with pytest.raises(InvalidRequest, match="contents field must not be specified when using raw_input_contents"):
        decode(request)


def test_typed_data_in_the_field_of_another_dtype_is_refused() -> None:
    request = message(None)
    request.inputs[0].contents.fp64_contents.extend(X.ravel().tolist())
    with pytest.raises(InvalidRequest, match=r"unexpected explicit tensor data for input tensor 'x'.*fp32_contents"):
        decode(request)


def test_every_raw_entry_belongs_to_an_input() -> None:
    request = message()
    request.raw_input_contents.append(b"more")
    with pytest.raises(InvalidRequest, match="expected 1 raw_input_contents, one for each input, got 2"):
        decode(request)


def test_an_input_given_twice_is_refused() -> None:
    request = pb.ModelInferRequest()
    for _ in range(2):
        request.inputs.add(name="a", datatype="INT64", shape=[1])
    with pytest.raises(InvalidRequest, match="input 'a' already exists in request"):
        decode(request, TWO)


def two(strings: bytes, rows: int = 1) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest()
    request.inputs.add(name="a", datatype="INT64", shape=[1])
    request.inputs.add(name="b", datatype="BYTES", shape=[rows, 1])
    request.raw_input_contents.extend([np.array([7]).tobytes(), strings])
    return request


def test_strings_have_their_length_before_them() -> None:
    arrays = decode(two(b"\x03\x00\x00\x00\xc3\xa9a"), TWO)
    assert arrays["b"].tolist() == [["éa"]]


@pytest.mark.parametrize(
    ("strings", "text"),
    [
        (b"\x03\x00", "incomplete string length indicator for input 'b' for model 'm'"),
        (b"\x09\x00\x00\x00ab", "incomplete string data: expected 9 bytes, got 2"),
        (b"\xff\xff\xff\xffab", "expected 4294967295 bytes, got 2"),
        (b"\x00\x00\x00\x00" * 2, "unexpected number of string elements 2 for input 'b' for model 'm'; expected 1"),
        (b"\x01\x00\x00\x00\xff", "is not UTF-8"),
    ],
)
def test_strings_that_lie_about_their_length_are_refused(strings: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(two(strings), TWO)
    assert text in str(caught.value)


def test_inputs_of_different_batches_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="batch size does not match other inputs for 'm'"):
        decode(two(b"\x00\x00\x00\x00" * 2, rows=2), TWO)


def test_integers_out_of_range_are_refused() -> None:
    signature = Signature((TensorSpec("x", "UINT8", (-1,)),), (), True)
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype="UINT8", shape=[1])
    tensor.contents.uint_contents.append(300)
    with pytest.raises(InvalidRequest, match="values that do not fit UINT8"):
        decode(request, signature)


def test_an_empty_batch_is_legal() -> None:
    assert decode(message(b"", shape=[0, 4]))["x"].shape == (0, 4)
    assert decode(message(None, shape=[0, 4]))["x"].shape == (0, 4)


def test_wanted_outputs_are_checked() -> None:
    request = pb.ModelInferRequest()
    assert codec.decode_outputs(request, "m", SIGNATURE) == ()
    request.outputs.add(name="y")
    assert codec.decode_outputs(request, "m", SIGNATURE) == ("y",)
    request.outputs.add(name="y")
    with pytest.raises(InvalidRequest, match="output 'y' already exists in request"):
        codec.decode_outputs(request, "m", SIGNATURE)
    request.outputs[1].name = "q"
    with pytest.raises(InvalidRequest, match="unexpected inference output 'q' for model 'm'; expected: y"):
        codec.decode_outputs(request, "m", SIGNATURE)


def test_a_reply_is_raw_and_carries_its_parameters() -> None:
    reply = Reply({"y": np.ones((1, 3), np.float32), "s": np.array(["é"], object)}, "2", {"arm": "merged", "n": 3})
    response = codec.encode_reply("m", "id-1", reply, {"seconds": 0.5, "ok": True})
    assert (response.model_name, response.model_version, response.id) == ("m", "2", "id-1")
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in response.outputs] == [
        ("y", "FP32", [1, 3]),
        ("s", "BYTES", [1]),
    ]
    assert list(response.raw_output_contents) == [np.ones(3, np.float32).tobytes(), b"\x02\x00\x00\x00\xc3\xa9"]
    told = codec.decode_parameters(response.parameters)
    assert told == {"arm": "merged", "n": 3, "seconds": 0.5, "ok": True}


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0]])
def test_a_shape_that_no_memory_holds_is_refused(shape: list[int]) -> None:
    wide = Signature((TensorSpec("x", "FP32", (-1, -1)),), (), False)
    for raw in (b"", None):
        with pytest.raises(InvalidRequest, match="unexpected shape"):
            decode(message(raw, shape=shape), wide)


def test_what_is_not_offered_is_refused_and_not_passed_over() -> None:
    request = message()
    request.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    with pytest.raises(Unsupported, match="Client shared memory is disabled"):
        decode(request)
    wanted = pb.ModelInferRequest()
    wanted.outputs.add(name="y").parameters["classification"].int64_param = 3
    with pytest.raises(Unsupported, match="classification of 'y' is not offered"):
        codec.decode_outputs(wanted, "m", SIGNATURE)
    request.parameters["sequence_id"].int64_param = 1
    with pytest.raises(Unsupported, match="sequences are not offered"):
        codec.decode_parameters(request.parameters)
