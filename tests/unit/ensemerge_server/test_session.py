import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text, write_linear

from ensemerge.errors import ExecutionFailed, InvalidModel, InvalidSpec
from ensemerge_server.servable import Signature, TensorSpec
from ensemerge_server.session import Session, available_device, open_session
from ensemerge_server.settings import Settings, usable_cores


def session(tmp_path: Path, text: str) -> Session:
    path = tmp_path / "model.onnx"
    ir.save(from_text(f'<ir_version: 10, opset_import: ["" : 20]> {text}'), path)
    return Session(path, "cpu", threads=1)


def test_the_signature_is_read_from_the_file(tmp_path: Path) -> None:
    loaded = open_session(write_linear(tmp_path, "plain"), Settings())
    assert loaded.signature == Signature(
        (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("logits", "FP32", (-1, 3)),), True
    )
    (logits,) = loaded.run({"x": np.zeros((2, 4), np.float32)}, ["logits"])
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }",
        "g (float[a, 4] x, float[b, 4] z) => (float[a, 4] y) { y = Add(x, z) }",
        "g (float[n, 4] x) => (float[m] y) <int64[1] axis = {1}> { y = ReduceSum<keepdims=0>(x, axis) }",
        "g (float x) => (float y) { y = Relu(x) }",
    ],
)
def test_only_one_symbol_on_every_first_axis_is_a_batch(tmp_path: Path, text: str) -> None:
    assert not session(tmp_path, text).signature.batched


def test_a_quick_model_runs_on_one_thread_unless_told_otherwise(tmp_path: Path) -> None:
    path = write_linear(tmp_path, "plain")
    assert open_session(path, Settings()).threads == 1
    assert open_session(path, Settings(threads=2)).threads == 2


def test_strings_go_through(tmp_path: Path) -> None:
    loaded = session(tmp_path, "g (string[n] x) => (string[n] y) { y = Identity(x) }")
    assert loaded.signature.inputs[0].datatype == "BYTES"
    (answer,) = loaded.run({"x": np.array(["é", ""], object)}, ["y"])
    assert answer.tolist() == ["é", ""]


def test_a_dtype_that_cannot_travel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"'x' is a tensor\(bfloat16\); expected one of"):
        session(tmp_path, "g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }")


def test_a_model_that_fails_says_so_and_a_missing_one_too(tmp_path: Path) -> None:
    loaded = session(tmp_path, "g (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) { y = Add(x, z) }")
    with pytest.raises(ExecutionFailed, match="the model failed while it ran"):
        loaded.run({"x": np.zeros((2, 4), np.float32), "z": np.zeros((3, 4), np.float32)}, ["y"])
    with pytest.raises(InvalidModel, match=r"there is no .*nowhere\.onnx"):
        Session(tmp_path / "nowhere.onnx", "cpu", threads=1)


@pytest.mark.skipif(available_device() == "cuda", reason="this machine has CUDA")
def test_cuda_is_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="device is cuda, but"):
        open_session(write_linear(tmp_path, "plain"), Settings(device="cuda"))


def test_the_runtime_does_not_report_to_its_maker() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_rows_that_influence_each_other_are_never_batched(tmp_path: Path) -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y) <int64[1] axis = {0}> { m = ReduceMean(x, axis)  y = Sub(x, m) }"
    session(tmp_path, text)
    assert not open_session(tmp_path / "model.onnx", Settings()).signature.batched


def test_zeros_of_an_unknown_size_say_nothing_about_speed(tmp_path: Path) -> None:
    session(tmp_path, "g (float[n, length] x) => (float[n, length] y) { y = Relu(x) }")
    loaded = open_session(tmp_path / "model.onnx", Settings())
    assert (loaded.threads, loaded.signature.batched) == (usable_cores(), True)
