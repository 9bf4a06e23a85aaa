"""Triton's own client, unmodified, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.graphs import images
from support.servers import RunningServer

from ensemerge.graph.run import Runner
from ensemerge.measures.scores import softmax

# Everything an application would do, with nothing of ours imported.
SCRIPT = """
import json, sys
import numpy
import tritonclient.grpc as triton

address, model, output = sys.argv[1:]
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
assert not client.is_model_ready("nobody")
metadata = client.get_model_metadata(model)
index = client.get_model_repository_index()
image = numpy.random.default_rng(0).standard_normal((3, 1, 6, 6)).astype(numpy.float32)
tensor = triton.InferInput(metadata.inputs[0].name, list(image.shape), metadata.inputs[0].datatype)
tensor.set_data_from_numpy(image)
wanted = [triton.InferRequestedOutput(output)]
result = client.infer(model, [tensor], outputs=wanted, request_id="7", parameters={"user_id": "u-1"})
try:
    client.infer("nobody", [tensor])
except triton.InferenceServerException as error:
    refusal = [error.status(), error.message()]
print(json.dumps({
    "inputs": [[t.name, t.datatype, list(t.shape)] for t in metadata.inputs],
    "outputs": [[t.name, t.datatype, list(t.shape)] for t in metadata.outputs],
    "models": [entry.name for entry in index.models],
    "id": result.get_response().id,
    "answer": result.as_numpy(output).tolist(),
    "ours": sorted(name for name in sys.modules if name.startswith("ensemerge")),
    "refusal": refusal,
    "parameters": sorted(result.get_response().parameters),
}))
"""


@pytest.mark.parametrize(
    ("model", "output"),
    [("a", "logits"), ("ensemble", "probabilities"), ("merged", "logits"), ("digits", "probabilities")],
)
def test_an_unmodified_client_gets_metadata_and_a_correct_answer(
    server: RunningServer, repository: Path, model: str, output: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, server.grpc, model, output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["inputs"] == [["image", "FP32", [-1, 1, 6, 6]]]
    assert told["outputs"] == [[output, "FP32", [-1, 3]]]
    assert (told["id"], told["ours"]) == ("7", [])
    assert told["models"] == ["a", "b", "digits", "ensemble", "merged", "plain"]
    assert told["refusal"][0] == "StatusCode.NOT_FOUND"
    assert "unknown model: 'nobody'" in told["refusal"][1]
    assert "prediction_id" in told["parameters"]
    candidates = [_in_process(repository, name) for name in (("ensemble", "merged") if model == "digits" else (model,))]
    if model == "digits":
        candidates = [candidates[0], softmax(candidates[1])]
    assert any(told["answer"] == pytest.approx(candidate, abs=1e-6) for candidate in candidates)


def _in_process(repository: Path, model: str) -> np.ndarray:
    (answer,) = Runner(repository / model / "1" / "model.onnx").run({"image": images(3)}).values()
    return answer
