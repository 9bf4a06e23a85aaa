"""The symmetry of every network of the zoo: which spaces it has, and that moving their units changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text
from support.zoo import ZOO, exported, feeds

from ensemerge.align.proof import prove_symmetry, weights_of
from ensemerge.errors import CheckFailed, InvalidModel
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import move, random_permutations
from ensemerge.graph.symmetry import Product, Symmetry


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
