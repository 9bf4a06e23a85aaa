from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text, linear_text

from ensemerge.ensemble.combiners import COMBINERS, combine, mean_probability
from ensemerge.ensemble.compiler import EMITTERS, Member, emit_mean, fuse, prove
from ensemerge.errors import CheckFailed, InvalidModel
from ensemerge.graph.run import Runner
from ensemerge.graph.tasks import infer_task

FEEDS = {"x": np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)}


def member(seed: int, *, softmax: bool = False, old: str = "", new: str = "") -> Member:
    model = from_text(linear_text(seed, softmax=softmax).replace(old, new))
    task = infer_task(model)
    assert task is not None
    return Member(f"m{seed}", model, task)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_fused_graph_equals_its_members(count: int) -> None:
    members = [member(seed, softmax=seed % 2 == 1) for seed in range(count)]
    fused = fuse(members, emit_mean)
    check = prove(members, fused, mean_probability, FEEDS)
    assert check.difference <= check.bound
    outputs = [Runner(one.model).run(FEEDS)["logits"] for one in members]
    expected = combine(outputs, [one.task.scale for one in members], mean_probability)
    # float32, three operations after the members.
    assert Runner(fused).run(FEEDS)["probabilities"] == pytest.approx(expected, abs=1e-6)


def test_the_fused_graph_has_one_input_and_takes_any_batch() -> None:
    fused = fuse([member(0), member(1)], emit_mean)
    assert [value.name for value in fused.graph.inputs] == ["x"]
    for rows in (1, 2, 19):
        assert Runner(fused).run({"x": FEEDS["x"][:rows]})["probabilities"].shape == (rows, 3)


def test_members_stay_as_they_were() -> None:
    one = member(0)
    before = ir.to_proto(one.model).SerializeToString()
    fuse([one, member(1)], emit_mean)
    assert ir.to_proto(one.model).SerializeToString() == before


def test_a_graph_that_does_not_equal_its_members_is_refused() -> None:
    members = [member(0), member(1)]
    with pytest.raises(CheckFailed, match="equals_members") as caught:
        prove(members, fuse([member(0), member(2)], emit_mean), mean_probability, FEEDS)
    assert caught.value.difference > caught.value.bound


def test_a_member_that_answers_nan_is_no_equal() -> None:
    good = member(0)
    broken = member(0)
    broken.model.graph.initializers["b"].const_value = ir.tensor(np.full(3, np.nan, np.float32), name="b")
    with pytest.raises(CheckFailed, match="is inf"):
        prove([good, good], fuse([good, broken], emit_mean), mean_probability, FEEDS)


def test_every_combiner_has_a_compiled_form() -> None:
    assert set(EMITTERS) == set(COMBINERS)


def test_an_input_called_as_the_output_is_refused() -> None:
    odd = member(1, old="x", new="probabilities").model
    with pytest.raises(InvalidModel, match="input is called 'probabilities'"):
        fuse([Member("odd", odd, member(0).task)], emit_mean)


def test_members_that_do_not_fit_are_named() -> None:
    first = member(0)
    other_input = member(1, old="float[batch, 4] x", new="double[batch, 4] x")
    with pytest.raises(InvalidModel, match="member 'm1': expected input"):
        fuse([first, other_input], emit_mean)
    other_classes = replace(member(1), task=replace(first.task, classes=("a", "b", "c")))
    with pytest.raises(InvalidModel, match="member 'm1': expected classes"):
        fuse([first, other_classes], emit_mean)
    regression = replace(member(1), task=replace(first.task, kind="regression"))
    with pytest.raises(InvalidModel, match="expected a classification"):
        fuse([first, regression], emit_mean)


def test_the_batch_must_vary() -> None:
    fixed = member(1, old="batch", new="7")
    with pytest.raises(InvalidModel, match="expected a first axis that varies"):
        fuse([fixed], emit_mean)
