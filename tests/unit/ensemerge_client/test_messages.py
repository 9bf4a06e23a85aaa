import numpy as np
import pytest

from ensemerge_client import InvalidArgument, InvalidReply, Label, LabelStatus
from ensemerge_client.messages import infer_request, label_requests, label_results, result
from ensemerge_protos import ensemerge_pb2, inference_pb2


def test_arrays_travel_raw_in_row_major_order() -> None:
    request = infer_request("m", {"x": np.arange(6, dtype=">f4").reshape(2, 3).T}, id="7", parameters={"u": "a"})
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("x", "FP32", [3, 2])
    assert np.frombuffer(request.raw_input_contents[0], "<f4").tolist() == [0, 3, 1, 4, 2, 5]
    assert (request.id, request.parameters["u"].string_param) == ("7", "a")


def test_parameters_keep_their_type() -> None:
    parameters = infer_request("m", {}, parameters={"b": True, "i": -3, "f": 0.5, "s": "x"}).parameters
    choices = {name: parameters[name].WhichOneof("parameter_choice") for name in "bifs"}
    assert choices == {"b": "bool_param", "i": "int64_param", "f": "double_param", "s": "string_param"}


def test_strings_have_lengths() -> None:
    request = infer_request("m", {"s": np.array(["é", "ab"])})
    assert request.inputs[0].datatype == "BYTES"
    assert request.raw_input_contents[0] == b"\x02\x00\x00\x00\xc3\xa9\x02\x00\x00\x00ab"


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="input 'x' is complex128"):
        infer_request("m", {"x": np.zeros(2, complex)})


def response(raw: bytes, datatype: str = "FP32", shape: tuple[int, ...] = (1, 2)) -> inference_pb2.ModelInferResponse:
    message = inference_pb2.ModelInferResponse(model_name="m", model_version="3", id="7")
    message.outputs.add(name="y", datatype=datatype, shape=shape)
    message.raw_output_contents.append(raw)
    return message


def test_an_answer_is_read() -> None:
    message = response(np.array([1.5, 2.5], np.float32).tobytes())
    message.parameters["arm"].string_param = "merged"
    message.parameters["members"].string_param = "a:1,b:1"
    message.parameters["compute_seconds"].double_param = 0.25
    answer = result(message)
    assert answer["y"].tolist() == [[1.5, 2.5]]
    assert (answer.model, answer.version, answer.id, answer.arm) == ("m", "3", "7", "merged")
    assert answer.members == ("a:1", "b:1")
    assert answer.timings is not None
    assert answer.timings.compute_seconds == 0.25
    assert result(response(bytes(8))).timings is None


@pytest.mark.parametrize(
    "message", [response(b"\x00" * 7), response(b"", "BF16"), response(b"\x09\x00\x00\x00", "BYTES")]
)
def test_an_answer_that_does_not_fit_itself_is_refused(message: inference_pb2.ModelInferResponse) -> None:
    with pytest.raises(InvalidReply, match="output 'y'"):
        result(message)


def test_an_answer_without_raw_outputs_is_refused() -> None:
    message = response(b"")
    del message.raw_output_contents[:]
    with pytest.raises(InvalidReply, match="expected 1 raw outputs, got 0"):
        result(message)


def test_many_labels_go_in_several_messages() -> None:
    labels = [Label(f"p{number}", 0, "cat" if number % 2 else 3) for number in range(25_000)]
    sizes = [len(request.labels) for request in label_requests(labels)]
    assert sizes == [10_000, 10_000, 5_000]
    first = next(iter(label_requests(labels))).labels
    assert (first[0].class_index, first[1].class_name) == (3, "cat")


def test_results_come_as_words() -> None:
    message = ensemerge_pb2.SendLabelsResponse(results=[ensemerge_pb2.LabelResult(status="PENDING", message="waits")])
    (answer,) = label_results(message)
    assert (answer.status, answer.message) == (LabelStatus.PENDING, "waits")


def test_numbers_from_a_data_frame_are_parameters_too() -> None:
    parameters = {"i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True)}
    sent = infer_request("m", {}, parameters=parameters).parameters  # type: ignore[arg-type]
    assert (sent["i"].int64_param, sent["f"].double_param, sent["b"].bool_param) == (3, 0.5, True)


@pytest.mark.parametrize("value", [None, 2**63, object()])
def test_a_parameter_that_cannot_travel_is_named(value: object) -> None:
    with pytest.raises(InvalidArgument, match="parameter 'user_id' cannot be sent"):
        infer_request("m", {}, parameters={"user_id": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("label", [Label("p", -1, 1), Label("p", 0, 2**64), Label("p", 0, 3.7), Label("p", 0, None)])  # type: ignore[arg-type]
def test_a_label_that_cannot_travel_is_named(label: Label) -> None:
    with pytest.raises(InvalidArgument, match=r"Label\(prediction_id='p'.* cannot be sent"):
        list(label_requests([label]))


def test_an_output_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(KeyError, match="no output 'z'; the answer has y"):
        result(response(bytes(8)))["z"]
