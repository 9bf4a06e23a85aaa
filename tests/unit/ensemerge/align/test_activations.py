"""Units compared by what they answer."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import from_text
from support.zoo import ZOO, exported, feeds

from ensemerge.align.activations import Observed, correlate
from ensemerge.align.proof import permuted, prove_same
from ensemerge.align.similarity import Tables
from ensemerge.errors import CheckFailed, ExecutionFailed, InvalidData
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import random_permutations
from ensemerge.graph.run import Runner
from ensemerge.graph.surgery import up_to, with_weights


@pytest.mark.parametrize("name", ZOO)
def test_a_unit_is_most_alike_to_itself_wherever_it_lies(name: str) -> None:
    model = exported(name)
    symmetry = derive_symmetry(model)
    drawn = random_permutations(symmetry, np.random.default_rng(0))
    names = {value: value for value in symmetry.values}
    networks = [Observed(model, names), Observed(permuted(model, symmetry, drawn), names)]
    tables = correlate(symmetry, networks, feeds(name, rows=70), [(0, 1), (0, 0)])
    for space in symmetry.free:
        if space.name not in symmetry.probes:
            continue
        cross, own = tables[0, 1].tables[space.name], tables[0, 0].tables[space.name]
        units = space.size * symmetry.size(space.within)
        assert cross.shape == own.shape == (units, units)
        alive = np.diag(own) > 0.5
        assert alive.any()
        # Each living unit is found again: some unit of the other network answers exactly as it does.
        assert np.abs(cross.max(axis=1)[alive] - 1).max() < 1e-3
        assert np.abs(np.diag(own)[alive] - 1).max() < 1e-3


def test_correlations_are_those_of_the_activations() -> None:
    model = exported("mlp")
    symmetry = derive_symmetry(model)
    space = symmetry.free[0]
    (value,) = symmetry.probes[space.name]
    given = feeds("mlp", rows=100)
    found = correlate(symmetry, [Observed(model, {v: v for v in symmetry.values})], given, [(0, 0)])
    seen = Runner(up_to(model, [value])).run(given)[value]
    varies = seen.std(axis=0) > 0
    expected = np.corrcoef(seen.T[varies])
    assert np.abs(found[0, 0].tables[space.name][np.ix_(varies, varies)] - expected).max() < 1e-5


def test_one_row_tells_nothing_of_features_but_something_of_places() -> None:
    model = exported("mlp")
    symmetry = derive_symmetry(model)
    with pytest.raises(InvalidData, match="no unit varies on the 1 rows"):
        correlate(symmetry, [Observed(model, {v: v for v in symmetry.values})], feeds("mlp", rows=1), [(0, 0)])
    model = exported("resnet")
    symmetry = derive_symmetry(model)
    found = correlate(symmetry, [Observed(model, {v: v for v in symmetry.values})], feeds("resnet", rows=1), [(0, 0)])
    assert found[0, 0].tables["stem.0.weight:0"].any()


def test_data_that_do_not_fit() -> None:
    model = exported("mlp")
    symmetry = derive_symmetry(model)
    observed = [Observed(model, {v: v for v in symmetry.values})]
    with pytest.raises(InvalidData, match="expected arrays for"):
        correlate(symmetry, observed, {"other": np.zeros((4, 6), np.float32)}, [(0, 0)])
    with pytest.raises(ExecutionFailed, match="rows 0 and up"):
        correlate(symmetry, observed, {"features": np.zeros((4, 7), np.float32)}, [(0, 0)])
    with pytest.raises(InvalidData, match="not finite"):
        correlate(symmetry, observed, {"features": np.full((4, 6), np.nan, np.float32)}, [(0, 0)])


def test_a_network_that_changed_is_found_out() -> None:
    model = exported("mlp")
    bias = model.graph.initializers["0.bias"].const_value
    assert bias is not None
    other = with_weights(model, {"0.bias": bias.numpy() + np.float32(0.01)})
    with pytest.raises(CheckFailed, match="expected at most 1e-05"):
        prove_same(model, other, [feeds("mlp")])


def test_units_within_tokens_that_stay_in_place() -> None:
    """A matrix of its own for each of three tokens: the units of each are compared among themselves, and all."""
    model = from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[batch, 3, 2] x) => (float[batch, 3, 1] y)
        <float[3, 2, 2] a = {1,2,-3,1,2,-1,1,1,-2,1,2,3}, float[3, 2, 1] c = {1,2,3,4,5,6}>
        { h = Einsum<equation="btf,tfu->btu">(x, a) t = Tanh(h) y = Einsum<equation="btu,tuk->btk">(t, c) }
        """
    )
    symmetry = derive_symmetry(model)
    (space,) = symmetry.free
    assert [symmetry.spaces[outer].size for outer in space.within] == [3]
    given = {"x": np.random.default_rng(0).standard_normal((50, 3, 2)).astype(np.float32)}
    found = correlate(symmetry, [Observed(model, {v: v for v in symmetry.values})], given, [(0, 0)])
    seen = Runner(up_to(model, ["t"])).run(given)["t"].reshape(50, 6)
    assert np.abs(found[0, 0].tables[space.name] - np.corrcoef(seen.T)).max() < 1e-5


def test_a_network_in_which_nothing_may_move() -> None:
    model = exported("mlp")
    symmetry = derive_symmetry(model, fixed=set(model.graph.initializers))
    found = correlate(symmetry, [Observed(model, {})], feeds("mlp"), [(0, 0)])
    assert found == {(0, 0): Tables({})}


def test_texts_are_the_same_or_not() -> None:
    model = from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (string[batch] x) => (string[batch] y) <string one = {"a"}>
        { y = StringConcat(x, one) }
        """
    )
    given = {"x": np.array(["b", "c"], dtype=object)}
    assert prove_same(model, model, [given]).difference == 0
    other = from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (string[batch] x) => (string[batch] y) { y = Identity(x) }
        """
    )
    with pytest.raises(CheckFailed):
        prove_same(model, other, [given])
