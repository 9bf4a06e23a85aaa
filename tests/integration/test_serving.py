"""What an application sees: answers that equal ONNX Runtime's, from every kind of model."""

import asyncio
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.graphs import images
from support.servers import RunningServer, running

from ensemerge.ensemble.combiners import mean_probability
from ensemerge.graph.run import Runner
from ensemerge.measures.scores import softmax
from ensemerge_client import (
    AsyncClient,
    Client,
    ClientClosed,
    DeadlineExceeded,
    InvalidArgument,
    TensorMetadata,
    Unavailable,
)
from ensemerge_client.messages import infer_request, result
from ensemerge_protos import inference_pb2

X = images(3)


def expected(repository: Path, model: str, x: np.ndarray = X) -> np.ndarray:
    """What the file says, run in this process."""
    (answer,) = Runner(repository / model / "1" / "model.onnx").run({"image": x}).values()
    return answer


def test_a_model_answers_as_in_process(client: Client, repository: Path) -> None:
    result = client.infer("a", {"image": X}, id="request-1")
    # The same file in the same runtime; the number of threads may differ.
    assert result["logits"] == pytest.approx(expected(repository, "a"), abs=1e-6)
    assert (result.model, result.version, result.id) == ("a", "1", "request-1")
    assert result.prediction_id
    assert result.timings is not None
    assert result.timings.compute_seconds > 0
    assert result.timings.batch_rows >= 3


def test_an_ensemble_is_the_mean_of_its_members(client: Client, repository: Path) -> None:
    members = np.stack([softmax(expected(repository, name)) for name in ("a", "b")])
    result = client.infer("ensemble", {"image": X})
    assert result["probabilities"] == pytest.approx(mean_probability(members), abs=1e-6)
    assert result.members == ("a:1", "b:1")


def test_a_merge_answers_from_merged_weights(client: Client, repository: Path) -> None:
    result = client.infer("merged", {"image": X}, outputs=["logits"])
    assert result["logits"] == pytest.approx(expected(repository, "merged"), abs=1e-6)
    assert result.members == ("a:1", "b:1")


def test_an_experiment_keeps_each_user_on_an_arm_and_answers_probabilities(client: Client, repository: Path) -> None:
    answers = {
        "ensemble": expected(repository, "ensemble"),
        "merged": softmax(expected(repository, "merged")),
    }
    arms = Counter[str]()
    for user in range(40):
        results = [client.infer("digits", {"image": X}, parameters={"user_id": f"u{user}"}) for _ in range(2)]
        assert results[0].arm == results[1].arm
        assert results[0].experiment == "digits"
        assert results[0].parameters["assignment"] == "unit"
        assert results[0]["probabilities"] == pytest.approx(answers[results[0].arm], abs=1e-6)
        arms[results[0].arm] += 1
    # 40 users on one arm: once in 5e11 salts.
    assert set(arms) == {"ensemble", "merged"}


def test_the_same_users_get_the_same_arms_from_another_server(repository: Path, tmp_path: Path, client: Client) -> None:
    users = [f"u{user}" for user in range(10)]
    here = [client.infer("digits", {"image": X}, parameters={"user_id": user}).arm for user in users]
    with running(repository, tmp_path) as other, Client(other.grpc) as second:
        there = [second.infer("digits", {"image": X}, parameters={"user_id": user}).arm for user in users]
    assert here == there


def test_many_at_once_form_batches_and_nobody_gets_anothers_rows(server: RunningServer, repository: Path) -> None:
    inputs = [images(1 + seed % 3, seed) for seed in range(120)]

    async def ask() -> list[tuple[np.ndarray, int]]:
        async with AsyncClient(server.grpc) as client:
            results = await asyncio.gather(*(client.infer("a", {"image": x}) for x in inputs))
        return [(result["logits"], result.timings.batch_rows if result.timings else 0) for result in results]

    answers = asyncio.run(ask())
    for x, (logits, _) in zip(inputs, answers, strict=True):
        # Rows are independent; a larger batch may round differently in float32.
        assert logits == pytest.approx(expected(repository, "a", x), abs=1e-5)
    assert max(rows for _, rows in answers) > 3


def test_metadata_tells_what_a_model_takes_and_gives(client: Client) -> None:
    metadata = client.model_metadata("ensemble")
    assert metadata.inputs == (TensorMetadata("image", "FP32", (-1, 1, 6, 6)),)
    assert metadata.outputs == (TensorMetadata("probabilities", "FP32", (-1, 3)),)
    assert (metadata.versions, metadata.platform) == (("1",), "onnxruntime_onnx")
    assert client.model_metadata("digits").outputs == metadata.outputs
    assert client.server_metadata().name == "ensemerge"


def test_live_ready_and_index(client: Client, server: RunningServer) -> None:
    assert client.is_live()
    assert client.is_ready()
    assert client.is_model_ready("digits")
    assert not client.is_model_ready("nobody")
    assert {state.name: state.state for state in client.models()} == dict.fromkeys(
        ("a", "b", "digits", "ensemble", "merged", "plain"), "READY"
    )
    assert server.get("/healthz") == (200, "ok\n")
    assert server.get("/readyz") == (200, "ready\n")
    assert server.get("/nowhere")[0] == 404


def test_the_health_protocol(server: RunningServer) -> None:
    assert [server.health(name) for name in ("", "a")] == ["SERVING"] * 2
    with pytest.raises(grpc.RpcError) as caught:
        server.health("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_clients_own_errors(server: RunningServer) -> None:
    with Client(server.grpc) as client, pytest.raises(DeadlineExceeded):
        client.infer("a", {"image": images(2000)}, timeout_seconds=0.001)
    with Client("127.0.0.1:1", timeout_seconds=5) as nobody, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        nobody.is_live()


def test_a_closed_client_says_so_and_a_message_too_large_is_the_callers_mistake(server: RunningServer) -> None:
    client = Client(server.grpc)
    with pytest.raises(InvalidArgument, match="larger than max"):
        client.infer("plain", {"x": np.zeros((1 << 22, 4), np.float32)})
    client.close()
    with pytest.raises(ClientClosed, match="is closed"):
        client.is_live()


def test_an_asyncio_client_may_be_made_before_its_loop(server: RunningServer) -> None:
    client = AsyncClient(server.grpc)

    async def ask() -> bool:
        async with client:
            return await client.is_live()

    assert asyncio.run(ask())


def test_compressed_requests_are_read(server: RunningServer, repository: Path) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )
        answer = result(infer(infer_request("a", {"image": X}), compression=grpc.Compression.Gzip))
    assert answer["logits"] == pytest.approx(expected(repository, "a"), abs=1e-6)
