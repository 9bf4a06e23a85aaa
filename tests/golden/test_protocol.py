"""The wire contract: every field of ours has the number and type that Triton's own client has."""

from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as triton

from ensemerge_protos import ensemerge_pb2, health_pb2, inference_pb2


def fields(descriptor: Any) -> dict[str, tuple[int, int, bool]]:
    return {
        field.full_name: (field.number, field.type, field.is_repeated)
        for message in [descriptor, *descriptor.nested_types]
        for field in message.fields
    }


@pytest.mark.parametrize("name", sorted(inference_pb2.DESCRIPTOR.message_types_by_name))
def test_messages_agree_with_tritons(name: str) -> None:
    ours = fields(inference_pb2.DESCRIPTOR.message_types_by_name[name])
    theirs = fields(triton.DESCRIPTOR.message_types_by_name[name])
    assert {field: theirs.get(field) for field in ours} == ours


def test_methods_agree_with_tritons() -> None:
    (service,) = inference_pb2.DESCRIPTOR.services_by_name.values()
    (theirs,) = triton.DESCRIPTOR.services_by_name.values()
    assert service.full_name == theirs.full_name
    for method in service.methods:
        other = theirs.methods_by_name[method.name]
        assert (method.input_type.full_name, method.output_type.full_name) == (
            other.input_type.full_name,
            other.output_type.full_name,
        )


def test_a_message_of_theirs_is_one_of_ours() -> None:
    request = triton.ModelInferRequest(model_name="m", model_version="2", id="7", raw_input_contents=[b"abcd"])
    request.parameters["priority"].uint64_param = 3
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1]).parameters["k"].double_param = 0.5
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    read = inference_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert read.SerializeToString(deterministic=True) == request.SerializeToString(deterministic=True)
    assert (read.inputs[0].parameters["k"].double_param, read.parameters["priority"].uint64_param) == (0.5, 3)


def test_the_health_protocol_has_its_numbers() -> None:
    assert health_pb2.HealthCheckRequest(service="x").SerializeToString() == b"\x0a\x01x"
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    assert serving.SerializeToString() == b"\x08\x01"


def test_our_own_messages_have_frozen_bytes() -> None:
    label = ensemerge_pb2.Label(prediction_id="p", row=2, class_index=7, time_seconds=1.0)
    assert label.SerializeToString().hex() == "0a01701002180729000000000000f03f"
    named = ensemerge_pb2.Label(class_name="cat")
    assert named.SerializeToString().hex() == "2203636174"
    result = ensemerge_pb2.LabelResult(status="AMBIGUOUS", message="m")
    assert result.SerializeToString().hex() == "080512016d"
