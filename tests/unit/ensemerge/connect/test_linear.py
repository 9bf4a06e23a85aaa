"""The line between two networks, one of them the other with its hidden units in another order."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import from_text, linear_text

from ensemerge.connect.labelled import Labelled, Scores, read_labelled
from ensemerge.connect.linear import Curve, Line, Point, as_it_is, barrier
from ensemerge.errors import InvalidData, StructureMismatch
from ensemerge.graph.run import Runner
from ensemerge.repository import Task
from ensemerge.restore.choose import restore

TASK = Task("classification", "logits", "logits", ("0", "1", "2"))
HIDDEN = 24
X = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
TEXT = """
    <ir_version: 10, opset_import: ["" : 20]>
    mlp (float[batch, 6] x) => (float[batch, 3] logits)
    {
        h = Gemm(x, w1, b1)
        r = Relu(h)
        logits = Gemm(r, w2)
    }
"""


def mlp(seed: int, order: np.ndarray | None = None) -> ir.Model:
    """One hidden layer, its units in this order."""
    generator = np.random.default_rng(seed)
    order = np.arange(HIDDEN) if order is None else order
    w1, b1, w2 = (generator.standard_normal(shape) for shape in ((6, HIDDEN), (HIDDEN,), (HIDDEN, 3)))
    proto = onnx.parser.parse_model(TEXT)
    weights = {"w1": w1[:, order], "b1": b1[order], "w2": w2[order]}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    return ir.from_proto(proto)


def answers(model: ir.Model) -> np.ndarray:
    return Runner(model).run({"x": X})["logits"]


A = mlp(0)
PERMUTED = mlp(0, np.random.default_rng(1).permutation(HIDDEN))
# What A answers is the truth, so that A and its permuted copy make no error.
DATA = Labelled({"x": X}, answers(A).argmax(axis=-1))


def score(model: ir.Model) -> Scores:
    return DATA.score(model, TASK)


def test_a_permuted_copy_is_the_same_network_behind_a_barrier() -> None:
    assert answers(PERMUTED) == pytest.approx(answers(A), abs=1e-4)
    curve = barrier(A, PERMUTED, 5, score, as_it_is)
    assert [point.t for point in curve.points] == [0, 0.25, 0.5, 0.75, 1]
    assert (curve.points[0].accuracy, curve.points[-1].accuracy) == (1, 1)
    assert curve.loss_barrier > 0.25
    assert curve.error_barrier > 0.1
    assert curve.error_barrier == pytest.approx(1 - min(point.accuracy for point in curve.points))


def test_every_network_of_the_line_is_prepared_before_it_is_scored() -> None:
    def prepare(model: ir.Model, t: float) -> ir.Model:
        return restore(model, [A, PERMUTED], {"x": X}, shares=[1 - t, t]).model

    curve = barrier(A, PERMUTED, 3, score, prepare)
    middle = score(prepare(Line(A, PERMUTED).at(0.5), 0.5))
    assert (curve.points[1].loss, curve.points[1].accuracy) == (middle.loss, middle.accuracy)
    assert middle.loss != score(Line(A, PERMUTED).at(0.5)).loss
    # Each end is restored to itself.
    for end in (curve.points[0], curve.points[-1]):
        assert end.loss == pytest.approx(score(A).loss, abs=1e-4)


def test_a_network_has_no_barrier_to_itself() -> None:
    curve = barrier(A, A, 5, score, as_it_is)
    assert (curve.loss_barrier, curve.error_barrier) == (0, 0)


def test_every_point_is_reported() -> None:
    told: list[tuple[str, int, int]] = []
    barrier(A, PERMUTED, 3, score, as_it_is, lambda *words: told.append(words))
    assert told == [("barrier", 1, 3), ("barrier", 2, 3), ("barrier", 3, 3)]


def test_the_ends_of_a_line_are_the_networks() -> None:
    line = Line(A, PERMUTED)
    for t, end in ((0.0, A), (1.0, PERMUTED)):
        assert np.array_equal(answers(line.at(t)), answers(end))
    middle = line.at(0.25).graph.initializers["b1"].const_value
    ours, theirs = (model.graph.initializers["b1"].const_value for model in (A, PERMUTED))
    assert middle is not None and ours is not None and theirs is not None
    assert middle.numpy() == pytest.approx(0.75 * ours.numpy() + 0.25 * theirs.numpy(), rel=1e-6)
    assert middle.numpy().dtype == np.float32


def test_what_is_infinite_in_both_stays() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 3] x) => (float[batch, 3] y)
        <float[3] mask = {MASK}, float w = {W}>
        { m = Mul(x, w) y = Add(m, mask) }
    """
    first, second = (from_text(text.replace("MASK", "0, 0, 0").replace("{W}", f"{{{w}}}")) for w in (1, 3))
    for model in (first, second):
        mask = np.array([0, -np.inf, 0], np.float32)
        model.graph.initializers["mask"].const_value = ir.tensor(mask, name="mask")
    found = Runner(Line(first, second).at(0.5)).run({"x": np.ones((1, 3), np.float32)})["y"]
    assert found.tolist() == [[2, -np.inf, 2]]


def test_other_architectures_are_refused() -> None:
    with pytest.raises(StructureMismatch):
        barrier(A, from_text(linear_text()), 3, score, as_it_is)


def test_a_line_needs_something_between_its_ends() -> None:
    with pytest.raises(InvalidData, match="expected at least 3 points"):
        barrier(A, PERMUTED, 2, score, as_it_is)


def test_a_barrier_is_measured_from_the_line_between_the_ends() -> None:
    def curve(*losses: float) -> Curve:
        t = np.linspace(0, 1, len(losses)).tolist()
        return Curve(tuple(Point(*numbers, 1 - numbers[1] / 10) for numbers in zip(t, losses, strict=True)))

    assert curve(1, 4, 3).loss_barrier == pytest.approx(2)
    assert curve(1, 4, 3).error_barrier == pytest.approx(0.2)
    assert curve(3, 1, 1).loss_barrier == 0


def test_scores_are_those_of_the_labels() -> None:
    model = from_text(linear_text(softmax=True))
    rows = np.random.default_rng(2).standard_normal((50, 4)).astype(np.float32)
    labels = np.arange(50) % 3
    probabilities = Runner(model).run({"x": rows})["logits"]
    scores = Labelled({"x": rows}, labels).score(model, Task("classification", "logits", "probabilities"))
    assert scores.loss == pytest.approx(-np.log(probabilities[np.arange(50), labels]).mean(), abs=1e-5)
    assert scores.accuracy == (probabilities.argmax(axis=1) == labels).mean()
    bare = Labelled({"x": rows}, labels).score(from_text(linear_text()), TASK)
    assert bare.loss == pytest.approx(scores.loss, abs=1e-5)


def test_labels_and_rows_that_do_not_fit_are_refused() -> None:
    for labels, message in [
        (np.full(400, 3), "expected labels from 0 to 2"),
        (np.full(400, -1), "got -1 to -1"),
        (np.zeros(7, int), "for each of 7 labels"),
    ]:
        with pytest.raises(InvalidData, match=message):
            Labelled({"x": X}, labels).score(A, TASK)
    with pytest.raises(InvalidData, match="not finite"):
        Labelled({"x": X * np.float32(np.nan)}, DATA.labels).score(A, TASK)


def test_files_without_usable_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({"x": X}, r"has no 'labels', only \['x'\]"),
        ({"x": X, "labels": np.zeros(400)}, r"whole numbers \(rows,\), got float64 \(400,\)"),
        ({"x": X, "labels": np.zeros((400, 3), int)}, r"got int64 \(400, 3\)"),
    ]
    for arrays, message in wrong:
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(InvalidData, match=message):
            read_labelled(path)
    np.savez(path, x=X, labels=DATA.labels.astype(np.uint8))
    read = read_labelled(path)
    assert list(read.feeds) == ["x"]
    assert read.labels.tolist() == DATA.labels.tolist()
