"""The symmetry of every network of the zoo: which spaces it has, and that moving their units changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import from_text
from support.zoo import ZOO, exported, feeds

from ensemerge.align.proof import prove_symmetry, weights_of
from ensemerge.errors import CheckFailed, InvalidData, InvalidModel
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import move, random_permutations
from ensemerge.graph.run import Runner
from ensemerge.graph.symmetry import Product, Symmetry
from ensemerge.graph.trace import inputs_that_run


def sizes(symmetry: Symmetry) -> list[tuple[int, ...]]:
    """Each free space's size after the sizes of those it lies within."""
    return sorted((*(symmetry.spaces[outer].size for outer in s.within), s.size) for s in symmetry.free)


@pytest.mark.parametrize("name", ZOO)
def test_spaces_are_found_and_the_network_does_not_change(name: str) -> None:
    model = exported(name)
    symmetry = derive_symmetry(model)
    assert not symmetry.without_rule
    assert sizes(symmetry) == sorted(ZOO[name].spaces)
    for seed in range(3):
        check = prove_symmetry(model, symmetry, [feeds(name, seed=seed)], seed)
        assert check.difference <= 1e-5
    drawn = random_permutations(symmetry, np.random.default_rng(0))
    weights = weights_of(model, symmetry)
    assert any(not np.array_equal(weights[key], array) for key, array in move(symmetry, weights, drawn).items())


def test_a_wrong_group_is_found_out() -> None:
    """Heads of values that move without those of queries and keys: what hand-written tables got wrong."""
    model = exported("attention")
    symmetry = derive_symmetry(model)
    values = next(space for space in symmetry.free if space.size == 6)
    heads = values.within[0]
    spaces = {**symmetry.spaces, "heads of values": replace(symmetry.spaces[heads], name="heads of values")}
    spaces[values.name] = replace(values, within=("heads of values",))
    weights = {
        name: tuple(tuple(_with_own_heads(factors, heads, values.name) for factors in axis) for axis in axes)
        for name, axes in symmetry.weights.items()
    }
    with pytest.raises(CheckFailed, match="symmetry"):
        prove_symmetry(model, replace(symmetry, spaces=spaces, weights=weights), [feeds("attention")])


def _with_own_heads(factors: Product, heads: str, values: str) -> Product:
    return tuple("heads of values" if name == heads and values in factors else name for name in factors)


def test_an_operator_without_a_rule_freezes_what_it_touches_and_says_so() -> None:
    model = from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 3] x) => (float[batch, 2] y)
        <float[3, 4] a = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4, 4] b = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7},
         float[4, 2] c = {1,2,3,4,5,6,7,8}, int64[2] k = {4, 4}>
        { h = MatMul(x, a) z = Hardmax(h) g = MatMul(z, b) r = Relu(g) y = MatMul(r, c) }
        """
    )
    symmetry = derive_symmetry(model)
    assert symmetry.without_rule == {"Hardmax": 1}
    assert sizes(symmetry) == [(4,)]  # behind the second matrix
    frozen = symmetry.spaces[symmetry.weights["a"][1][0][0]]
    assert frozen.frozen == "there is no rule for Hardmax here"


@pytest.mark.parametrize(
    ("step", "free"),
    [
        ("z = Relu(h)", True),
        ("z = Softmax(h)", True),
        ("z = Slice(h, zero, four, one, two)  ", False),
        ("z = CumSum(h, axis)", False),
        ("s = Sin(h) z = Add(s, h)", True),
    ],
)
def test_what_keeps_units_in_place(step: str, free: bool) -> None:
    width = 2 if "Slice" in step else 4
    values = ", ".join(str(number) for number in range(1, width * 2 + 1))
    model = from_text(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 3] x) => (float[batch, 2] y)
        <float[3, 4] a = {{1,2,3,4,5,6,7,8,9,10,11,12}}, float[{width}, 2] c = {{{values}}}, int64 axis = {{1}},
         int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] one = {{1}}, int64[1] two = {{2}}>
        {{ h = MatMul(x, a) {step} y = MatMul(z, c) }}
        """
    )
    assert bool(derive_symmetry(model).free) == free


def test_weights_that_all_networks_share_stay_in_place() -> None:
    model = exported("mlp")
    assert sizes(derive_symmetry(model, fixed={"0.bias"})) == [(12,)]


def test_a_network_that_does_not_run() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (int64[batch, 3] x) => (float[batch, 3, 1] y) <float[1, 1] table = {1}>
        { y = Gather(table, x) }
    """
    with pytest.raises(InvalidModel, match="give calibration data"):
        derive_symmetry(from_text(text))


def test_a_graph_is_not_changed() -> None:
    model = exported("mlp")
    before = ir.to_proto(model).SerializeToString()
    derive_symmetry(model)
    assert ir.to_proto(model).SerializeToString() == before


ODD = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[ROWS, 3] x INPUTS) => (float[ROWS, 2] y OUTPUTS)
    <float[3, 4] a = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4, 2] c = {1,2,3,4,5,6,7,8}, int64 one = {1}>
    { h = MatMul(x, a) STEP r = Relu(h) y = MatMul(r, c) }
"""


def odd(rows: str = "batch", inputs: str = "", outputs: str = "", step: str = "") -> ir.Model:
    text = ODD.replace("ROWS", rows).replace("INPUTS", inputs).replace("OUTPUTS", outputs)
    return ir.from_proto(onnx.parser.parse_model(text.replace("STEP", step)))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_network_for_a_fixed_number_of_rows(rows: int) -> None:
    model = odd(str(rows))
    symmetry = derive_symmetry(model)
    assert sizes(symmetry) == [(4,)]
    given = {"x": np.ones((8, 3), np.float32)}
    assert prove_symmetry(model, symmetry, [given]).difference <= 1e-5
    assert sizes(derive_symmetry(model, given)) == [(4,)]
    assert Runner(model).run(given)["y"].shape == (8, 2)


def test_rows_that_are_no_multiple_of_a_fixed_number() -> None:
    with pytest.raises(InvalidData, match="takes 4 rows at once; expected a multiple, got 6 rows"):
        Runner(odd("4")).run({"x": np.ones((6, 3), np.float32)})


def test_inputs_that_are_single_numbers_or_none() -> None:
    model = odd(inputs=", float k", step="s = Mul(h, k)")
    with pytest.raises(InvalidModel, match=r"expected arrays with one number of rows.* 'k': \(\)"):
        derive_symmetry(model)
    with pytest.raises(InvalidData, match=r"expected arrays with one number of rows.* 'k': \(\)"):
        derive_symmetry(model, {"x": np.ones((2, 3), np.float32), "k": np.array(1, np.float32)})


def test_outputs_that_have_no_rows() -> None:
    model = odd(outputs=", float sum", step="sum = ReduceSum<keepdims=0>(h)")
    given = {"x": np.ones((5, 3), np.float32)}
    assert prove_symmetry(model, derive_symmetry(model), [given]).difference <= 1e-5
    with pytest.raises(InvalidModel, match="output 'sum' is one number for all rows of a batch"):
        Runner(model, batch_rows=2).run(given)
    model = odd(outputs=", seq(float[batch, 1]) parts", step="parts = SplitToSequence<axis=1>(h, one)")
    assert derive_symmetry(model).without_rule == {"SplitToSequence": 1}
    with pytest.raises(InvalidModel, match="output 'parts' is no tensor"):
        Runner(model).run(given)


def test_inputs_are_made_up_that_are_large_enough() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 1, height, width] image) => (float[batch, 1, h, w] y)
        { y = AveragePool<kernel_shape=[20, 20]>(image) }
    """
    assert inputs_that_run(from_text(text))["image"].shape == (2, 1, 32, 32)


def test_sums_over_letters_are_inputs_of_their_weights() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 2] x) => (float[batch, 2] y)
        <float[2, 3] a = {1,2,3,4,5,6}, float[2, 3] c = {6,5,4,3,2,1}>
        { h = Einsum<equation="bf,fu->bu">(x, a) r = Relu(h) y = Einsum<equation="bu,ku->bk">(r, c) }
    """
    symmetry = derive_symmetry(from_text(text))
    (space,) = symmetry.free
    assert symmetry.inputs == {("a", 0), ("c", 1)}
    assert symmetry.probes[space.name] == ("r",)
