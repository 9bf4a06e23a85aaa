"""Whatever comes in, the answer is a status and a sentence, and the next good request is answered."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.graphs import images
from support.servers import RunningServer, running

from ensemerge_client import Client, ClientError, InvalidArgument, NotFound
from ensemerge_client.messages import infer_request
from ensemerge_protos import inference_pb2

X = images(2)


@pytest.fixture(autouse=True)
def the_next_good_request_is_answered(client: Client) -> Iterator[None]:
    yield
    assert client.infer("a", {"image": X})["logits"].shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ({"model": "nobody"}, NotFound, "Request for unknown model: 'nobody' is not found"),
        ({"model": ""}, NotFound, "Request for unknown model: '' is not found"),
        ({"model": "../a"}, NotFound, "Request for unknown model: '../a' is not found"),
        ({"version": "99"}, NotFound, "version 99 is not found; 1 is loaded"),
        ({"version": "latest"}, InvalidArgument, "failed to get model version from specified version string 'latest'"),
        ({"inputs": {"img": X}}, InvalidArgument, "unexpected inference input 'img' for model 'a'; expected: image"),
        ({"inputs": {"image": X[:, :, :5]}}, InvalidArgument, "Expected [-1,1,6,6], got [2,1,5,6]"),
        ({"inputs": {"image": X[0]}}, InvalidArgument, "Expected [-1,1,6,6], got [1,6,6]"),
        ({"inputs": {"image": X.astype(np.float64)}}, InvalidArgument, "data-type is 'FP64', but model 'a' expects"),
        ({"inputs": {"image": X.astype(str)}}, InvalidArgument, "data-type is 'BYTES', but model 'a' expects 'FP32'"),
        ({"inputs": {}}, InvalidArgument, "expected 1 inputs but got 0 inputs for model 'a'"),
        ({"inputs": {"image": X, "extra": X}}, InvalidArgument, "expected 1 inputs but got 2 inputs"),
        ({"outputs": ["scores"]}, InvalidArgument, "unexpected inference output 'scores' for model 'a'"),
        ({"id": "x" * 5_000_000}, InvalidArgument, "the request's id has 5000000 bytes; expected at most 1024"),
    ],
)
def test_a_wrong_request_is_told_what_was_expected(
    client: Client, call: dict[str, object], error: type[ClientError], text: str
) -> None:
    with pytest.raises(error) as caught:
        client.infer(**{"model": "a", "inputs": {"image": X}, **call})  # type: ignore[arg-type]
    assert text in str(caught.value)


def send(server: RunningServer, body: bytes, method: str = "ModelInfer") -> grpc.RpcError:
    """Send bytes as they are and return the error that comes back."""
    with grpc.insecure_channel(server.grpc) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}"
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(body, timeout=20)
    return caught.value


def test_a_wrong_byte_count_is_told(server: RunningServer) -> None:
    request = infer_request("a", {"image": X})
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    error = send(server, request.SerializeToString())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "input byte size mismatch for input 'image' for model 'a'. Expected 288, got 287" in (error.details() or "")


def test_bytes_that_are_no_message_are_told(server: RunningServer) -> None:
    for body in (b"\xff\xff\xff\xff", infer_request("a", {"image": X}).SerializeToString()[:-5]):
        error = send(server, body)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the message is no inference.ModelInferRequest" in (error.details() or "")


def test_an_empty_request_names_no_model(server: RunningServer) -> None:
    error = send(server, b"")
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "unknown model: '' is not found" in (error.details() or "")


def test_an_unknown_rpc_is_unimplemented(server: RunningServer) -> None:
    assert send(server, b"", "CudaSharedMemoryStatus").code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused(server: RunningServer) -> None:
    request = inference_pb2.ModelInferRequest(model_name="a", raw_input_contents=[bytes(65 << 20)])
    assert send(server, request.SerializeToString()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_garbage_on_the_ports_harms_nobody(server: RunningServer) -> None:
    for address in (server.grpc, server.http, server.metrics):
        host, port = address.split(":")
        for garbage in (b"\x00" * 100, b"GET " + b"/" * 70_000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff"):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(garbage)


@pytest.fixture(scope="module")
def broken(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose repository holds one good model and many broken ones."""
    root = tmp_path_factory.mktemp("broken") / "models"
    shutil.copytree(repository / "a", root / "a")
    shutil.copytree(repository / "plain", root / "garbage")
    (root / "garbage" / "1" / "model.onnx").write_bytes(b"\x08\x07 these are not weights")
    shutil.copytree(repository / "plain", root / "truncated")
    whole = (root / "truncated" / "1" / "model.onnx").read_bytes()
    (root / "truncated" / "1" / "model.onnx").write_bytes(whole[: len(whole) // 2])
    shutil.copytree(repository / "a", root / "changed")
    with (root / "changed" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\x00")
    for name, text in {
        "typo": "kind: ensemble\nmembres: [a, b]\n",
        "unknown-key": "kind: onnx\ntaks: {output: logits}\n",
        "unknown-kind": "kind: ensembel\n",
        "not-yaml": "kind: [\n",
        "unbuilt": "kind: ensemble\nmembers: [a]\n",
        "orphan": "kind: experiment\nunit: u\narms: {x: {model: a}, y: {model: nobody}}\n",
        "wrong-task": "task: {kind: classification, output: logit}\n",
    }.items():
        (root / name).mkdir()
        (root / name / "model.yaml").write_text(text)
    for name in ("unknown-key", "wrong-task"):
        shutil.copytree(repository / "a" / "1", root / name / "1")
    with running(root, tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("garbage", "ONNX Runtime cannot load"),
        ("truncated", "ONNX Runtime cannot load"),
        ("changed", "is not the file that its manifest describes"),
        ("typo", "'members' is missing; there is 'membres', did you mean that?"),
        ("unknown-key", "unknown-key/model.yaml: unknown key 'taks'; did you mean 'task'?"),
        ("unknown-kind", "unknown kind 'ensembel'; did you mean 'ensemble'?"),
        ("not-yaml", "cannot be read"),
        ("unbuilt", "has no version: expected unbuilt/1/model.onnx; `ensemerge build` makes one"),
        ("orphan", "no model 'nobody'"),
        ("wrong-task", "output 'logit' is unknown; did you mean 'logits'?"),
    ],
)
def test_a_broken_model_says_why_and_the_others_answer(broken: RunningServer, model: str, text: str) -> None:
    with Client(broken.grpc) as client:
        with pytest.raises(NotFound) as caught:
            client.infer(model, {"image": X})
        assert f"'{model}' has no available versions" in str(caught.value)
        assert text in str(caught.value)
        assert text in {state.name: state.reason for state in client.models()}[model]
        assert not client.is_model_ready(model)
        assert client.infer("a", {"image": X})["logits"].shape == (2, 3)


def test_the_health_protocol_tells_a_broken_model_from_an_unknown_one(broken: RunningServer) -> None:
    assert {name: broken.health(name) for name in ("a", "garbage")} == {"a": "SERVING", "garbage": "NOT_SERVING"}


def test_a_server_with_a_broken_model_is_live_but_not_ready(broken: RunningServer) -> None:
    with Client(broken.grpc) as client:
        assert (client.is_live(), client.is_ready()) == (True, False)
    assert broken.get("/healthz")[0] == 200
    assert broken.get("/readyz") == (503, "not ready\n")
    assert broken.metric("ensemerge_model_ready", model="garbage") == 0
    assert broken.metric("ensemerge_model_ready", model="a") == 1
