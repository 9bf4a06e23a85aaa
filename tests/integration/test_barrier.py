"""`ensemerge barrier` on files and on models of a repository."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import from_text, images, linear_text, publish_tiny, write_linear

from ensemerge.cli.barrier import main
from ensemerge.graph.run import Runner
from ensemerge.repository import Repository

HIDDEN = 24
TEXT = """
    <ir_version: 10, opset_import: ["" : 20]>
    mlp (float[batch, 6] x) => (float[batch, 3] logits)
    { h = Gemm(x, w1, b1) r = Relu(h) logits = Gemm(r, w2) }
"""

VECTOR = """
    <ir_version: 10, opset_import: ["" : 20]>
    absolute (float[batch] x) => (float[batch] y) { y = Abs(x) }
"""


def write_mlp(path: Path, order: np.ndarray) -> None:
    """One hidden layer, its units in this order; the same network whatever the order is."""
    generator = np.random.default_rng(0)
    w1, b1, w2 = (generator.standard_normal(shape) for shape in ((6, HIDDEN), (HIDDEN,), (HIDDEN, 3)))
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in {"w1": w1[:, order], "b1": b1[order], "w2": w2[order]}.items()
    )
    onnx.save(proto, path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: `a.onnx`, `b.onnx` in another order, `aligned.onnx` in the order of `a`, and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name, order in (("a", np.arange(HIDDEN)), ("b", np.random.default_rng(1).permutation(HIDDEN))):
        write_mlp(tmp_path / f"{name}.onnx", order)
    write_mlp(tmp_path / "aligned.onnx", np.arange(HIDDEN))
    x = np.random.default_rng(2).standard_normal((200, 6)).astype(np.float32)
    labels = Runner(tmp_path / "a.onnx").run({"x": x})["logits"].argmax(axis=1)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    np.savez(tmp_path / "unlabelled.npz", x=x[::2])
    return tmp_path


def test_a_barrier_before_and_none_after_alignment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a.onnx", "b.onnx", "--aligned", "aligned.onnx", "--data", "data.npz", "--points", "5", "--json"]
    assert main([*words, "--no-restore", "--plot", "line.png"]) == 0
    before, after = json.loads(capsys.readouterr().out)
    assert (before["from"], before["to"], after["to"]) == ("a.onnx", "b.onnx", "aligned.onnx")
    assert [point["t"] for point in before["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert before["loss_barrier"] > 0.25
    assert before["error_barrier"] > 0.1
    assert (after["loss_barrier"], after["error_barrier"], after["restored"]) == (0, 0, [])
    assert (folder / "line.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_what_was_restored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a.onnx", "b.onnx", "--data", "data.npz", "--calibration", "unlabelled.npz", "--points", "3"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "a.onnx → b.onnx" in shown
    assert "restored at every point: REPAIR (layers: 1, dead channels: 0)" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("%")] == ["0.00", "0.50", "1.00"]
    assert "barrier: loss 0." in shown


def test_models_of_a_repository_are_found_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = Repository(folder / "models", create=True)
    for name, seed in (("first", 1), ("second", 2)):
        publish_tiny(repository, name, seed)
    np.savez(folder / "images.npz", image=images(60), labels=np.arange(60) % 3)
    words = ["first", "second:1", "--repository", "models", "--data", "images.npz", "--points", "3", "--json"]
    assert main(words) == 0
    (curve,) = json.loads(capsys.readouterr().out)
    assert (curve["from"], curve["to"]) == ("first:1", "second:1")
    assert curve["restored"] == ["statistics estimated anew (BatchNormalization layers: 2)"]


def test_networks_with_other_classes_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, classes in (("first", ["x", "y", "z"]), ("second", ["y", "x", "z"])):
        write_linear(folder / "models", name)
        task = {"output": "logits", "classes": classes}
        Repository(folder / "models").write_spec(name, {"task": task})
    assert main(["first", "second", "--repository", "models", "--data", "data.npz"]) == 1
    assert "'first:1' and 'second:1' name other classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.onnx", "nowhere.onnx"], "no ONNX model at nowhere.onnx"),
        (["a", "b.onnx"], "'a' is no .onnx file; expected one, or --repository"),
        (["a.onnx", "linear.onnx"], "got 3 and 2 nodes"),
        (["linear.onnx", "linear.onnx"], "no layer to repair"),
        (["linear.onnx", "linear.onnx"], "with --no-restore"),
        (["a.onnx", "b.onnx", "--points", "2"], "expected at least 3 points"),
        (["a.onnx", "b.onnx", "--data", "unlabelled.npz"], "unlabelled.npz has no 'labels'"),
        (["a.onnx", "b.onnx", "--calibration", "no.npz"], "no.npz is no .npz of plain arrays"),
        (["vector.onnx", "vector.onnx"], "'vector.onnx' is no classifier"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    ir.save(from_text(linear_text()), "linear.onnx")
    ir.save(from_text(VECTOR), "vector.onnx")
    data = [] if "--data" in words else ["--data", "data.npz"]
    assert main([*words, *data]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "message"), [("line.txt", "ends in .png, .svg, .pdf"), ("no/line.png", "there is no folder no")]
)
def test_a_picture_that_cannot_be_written_is_refused_first(
    folder: Path, capsys: pytest.CaptureFixture[str], picture: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["a.onnx", "b.onnx", "--data", "missing.npz", "--plot", picture])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
