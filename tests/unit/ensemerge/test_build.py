from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import from_text, images, linear_text, publish_tiny, tiny_net, write_linear

from ensemerge.build import build
from ensemerge.errors import EnsemergeError
from ensemerge.graph.files import load
from ensemerge.graph.run import Runner
from ensemerge.repository import Repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = Repository(tmp_path_factory.mktemp("models"))
    for name, seed in (("a", 1), ("b", 2)):
        publish_tiny(repository, name, seed)
    return repository


def test_a_merge_is_the_mean_of_the_torch_weights(repository: Repository) -> None:
    models = [{"model": "a"}, {"model": "b:1", "parameters": {"weight": 3}}]
    repository.write_spec("merged", {"kind": "merge", "merge_method": "linear", "models": models})
    version = build(repository, "merged")
    initializers = load(version.model_path).graph.initializers
    first, second = tiny_net(1).state_dict(), tiny_net(2).state_dict()
    for name in ("first.weight", "second.bias", "second_norm.running_var", "head.weight"):
        merged = initializers[name].const_value
        assert merged is not None
        assert merged.numpy() == pytest.approx((first[name] + 3 * second[name]).numpy() / 4, abs=1e-6)
    assert version.manifest is not None
    assert version.manifest.members == ("a:1", "b:1")
    assert set(version.manifest.inputs) == {"a:1/model.onnx", "b:1/model.onnx"}


def test_calibration_restores_statistics_and_records_it(repository: Repository) -> None:
    spec = {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}], "calibration": {"data": "calibration.npz"}}
    repository.write_spec("restored", spec)
    np.savez(repository.folder("restored") / "calibration.npz", image=images(64))
    manifest = build(repository, "restored").manifest
    assert manifest is not None
    assert "restored/calibration.npz" in manifest.inputs
    (check,) = manifest.checks
    assert (check.name, check.difference <= check.bound) == ("restored_batch_norm", True)


def test_an_ensemble_equals_its_members_and_says_so(repository: Repository) -> None:
    repository.write_spec("both", {"kind": "ensemble", "members": ["a", "b"]})
    version = build(repository, "both")
    assert version.manifest is not None
    assert version.manifest.checks[0].name == "equals_members"
    assert version.manifest.task is not None
    assert version.manifest.task.scale == "probabilities"
    answers = Runner(version.model_path).run({"image": images(5)})["probabilities"]
    assert answers.sum(axis=-1) == pytest.approx(np.ones(5), abs=1e-6)


def test_the_same_recipe_gives_the_same_bytes(repository: Repository) -> None:
    repository.write_spec("twice", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    first, second = build(repository, "twice"), build(repository, "twice")
    assert first.model_path.read_bytes() == second.model_path.read_bytes()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"kind": "ensemble", "members": ["a", "nobody"]}, "no model 'nobody'"),
        ({"kind": "ensemble", "members": ["a", "odd"]}, "'odd' names itself"),
        ({"kind": "ensemble", "members": []}, "'members' is empty"),
        ({"kind": "ensemble", "members": ["a", "other"]}, "expected input"),
        ({"kind": "merge", "models": [{"model": "a"}, {"model": "other"}]}, "expected graphs of one architecture"),
        (
            {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}], "out_dtype": "bfloat16"},
            "keeps the dtypes of its graph, expected float32",
        ),
        ({"kind": "merge", "models": []}, "'models' is empty; expected at least one"),
        ({"kind": "merge", "models": [{"model": "a"}], "calibration": {"data": "none.npz"}}, "is no .npz"),
        ({"kind": "ensembel", "members": ["a"]}, "did you mean 'ensemble'"),
        ({"kind": "onnx"}, "kind 'onnx' is not built"),
    ],
)
def test_what_cannot_be_built_says_why_and_publishes_nothing(
    repository: Repository, spec: dict[str, object], problem: str
) -> None:
    if "other" not in repository.names():
        write_linear(repository.root, "other")
    repository.write_spec("odd", spec)
    with pytest.raises(EnsemergeError, match=problem):
        build(repository, "odd")
    assert repository.versions("odd") == []


def write(repository: Repository, name: str, model: ir.Model, external: str | None = None) -> None:
    (repository.folder(name) / "1").mkdir(parents=True)
    ir.save(model, repository.folder(name) / "1" / "model.onnx", external_data=external, size_threshold_bytes=0)


def test_weights_in_files_of_their_own_are_read_and_brought_in(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        write(repository, name, from_text(linear_text(seed)), "model.onnx.data")
    repository.write_spec("both", {"kind": "ensemble", "members": ["a", "b"]})
    repository.write_spec("mean", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    for name in ("both", "mean"):
        version = build(repository, name)
        assert [path.name for path in sorted(version.folder.iterdir())] == ["manifest.json", "model.onnx"]
        assert version.manifest is not None
        assert "a:1/model.onnx.data" in version.manifest.inputs
        Runner(version.model_path).run({"x": np.ones((3, 4), np.float32)})


def test_tied_weights_in_files_of_their_own_stay_one(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y) <float[2, 2] w = {%s}, float[2, 2] v = {%s}>
        { h = MatMul(x, w)  y = MatMul(h, v) }
    """
    repository = Repository(tmp_path)
    for name, weights in (("a", "1, 2, 3, 4"), ("b", "3, 2, 1, 0")):
        write(repository, name, from_text(text % (weights, weights)), "model.onnx.data")
        path = repository.folder(name) / "1" / "model.onnx"
        proto = onnx.load(path, load_external_data=False)
        first, second = proto.graph.initializer
        del second.external_data[:]
        second.external_data.extend(first.external_data)
        path.write_bytes(proto.SerializeToString())
    repository.write_spec("mean", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    initializers = load(build(repository, "mean").model_path).graph.initializers
    for name in "wv":
        merged = initializers[name].const_value
        assert merged is not None
        assert merged.numpy().tolist() == [[2, 2], [2, 2]]


def test_weights_in_constant_nodes_are_merged(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y) { w = Constant<value = float[2] {%s}>()  y = Mul(x, w) }
    """
    repository = Repository(tmp_path)
    for name, weights in (("a", "1, 2"), ("b", "3, 6")):
        write(repository, name, from_text(text % weights))
    repository.write_spec("mean", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    answer = Runner(build(repository, "mean").model_path).run({"x": np.ones((1, 2), np.float32)})["y"]
    assert answer.tolist() == [[2, 4]]


SCALAR = """
    <ir_version: 10, opset_import: ["" : 20]>
    first (float[batch, 2, 3] x) => (float[batch, 3] logits) <int64 zero = {0}, float[3] w = {%s}>
    { row = Gather<axis=1>(x, zero)  logits = Mul(row, w) }
"""


def test_scalar_weights_stay_scalars(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    for name, weights in (("a", "1, 2, 3"), ("b", "3, 2, 1")):
        write(repository, name, from_text(SCALAR % weights))
    repository.write_spec("mean", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    answer = Runner(build(repository, "mean").model_path).run({"x": np.ones((2, 2, 3), np.float32)})["logits"]
    assert answer.tolist() == [[2.0, 2.0, 2.0]] * 2


def test_classes_in_another_order_are_not_merged(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    for name, classes in (("a", ["cat", "dog", "emu"]), ("b", ["emu", "cat", "dog"])):
        write(repository, name, from_text(linear_text(1)))
        repository.write_spec(name, {"task": {"output": "logits", "classes": classes}})
    repository.write_spec("mean", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    with pytest.raises(EnsemergeError, match="expected one task"):
        build(repository, "mean")


def test_integer_inputs_and_double_precision_make_ensembles_too(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        embed (int64[batch, 2] x) => (double[batch, 2] logits) <double[2, 2] table = {%s}, int64[1] axis = {1}>
        { rows = Gather(table, x)  logits = ReduceSum<keepdims=0>(rows, axis) }
    """
    for name, table in (("a", "0, 1, 2, 3"), ("b", "3, 1, 0, 2")):
        write(repository, name, from_text(text % table))
    repository.write_spec("both", {"kind": "ensemble", "members": ["a", "b"]})
    answer = Runner(build(repository, "both").model_path).run({"x": np.array([[0, 1]])})["probabilities"]
    assert answer.dtype == np.float64
    assert answer.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\x93NUMPY\x01\x00"])
def test_calibration_that_cannot_be_read_is_told(repository: Repository, spoil: Callable[[bytes], bytes]) -> None:
    spec = {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}], "calibration": {"data": "calibration.npz"}}
    repository.write_spec("spoilt", spec)
    path = repository.folder("spoilt") / "calibration.npz"
    np.savez(path, image=images(8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(EnsemergeError, match=r"is no \.npz of plain arrays"):
        build(repository, "spoilt")


def test_a_member_that_was_tampered_with_is_refused(repository: Repository, tmp_path: Path) -> None:
    version = publish_tiny(repository, "tampered", 5)
    version.model_path.write_bytes(version.model_path.read_bytes() + b"\x00")
    repository.write_spec("with-tampered", {"kind": "ensemble", "members": ["a", "tampered"]})
    with pytest.raises(EnsemergeError, match="is not the file that its manifest describes"):
        build(repository, "with-tampered")
