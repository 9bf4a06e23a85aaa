"""Networks of other widths carried over by optimal transport."""

from __future__ import annotations

import numpy as np
import pytest
from support.zoo import exported

from ensemerge.align.fusion import Network, carry, fuse
from ensemerge.align.proof import weights_of
from ensemerge.errors import InvalidSpec, StructureMismatch
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import move, random_permutations
from ensemerge.graph.symmetry import Axis, Space, Symmetry

Arrays = dict[str, np.ndarray]


def one(*names: str) -> Axis:
    return (names,)


def perceptron(hidden: int, deep: int, outputs: int = 2) -> Symmetry:
    spaces = [Space("input", 3, frozen="it is an input"), Space("hidden", hidden), Space("deep", deep)]
    spaces.append(Space("output", outputs, frozen="it is an output"))
    weights = {
        "first": (one("hidden"), one("input")),
        "bias": (one("hidden"),),
        "second": (one("deep"), one("hidden")),
        "last": (one("output"), one("deep")),
    }
    inputs = frozenset({("first", 1), ("second", 1), ("last", 1)})
    return Symmetry({space.name: space for space in spaces}, weights, {}, inputs, {}, {})


def drawn(hidden: int, deep: int, seed: int = 0) -> Network:
    generator = np.random.default_rng(seed)
    shapes = {"first": (hidden, 3), "bias": (hidden,), "second": (deep, hidden), "last": (2, deep)}
    return Network(perceptron(hidden, deep), {name: generator.standard_normal(s) for name, s in shapes.items()})


def answers(weights: Arrays) -> np.ndarray:
    given = np.random.default_rng(9).standard_normal((20, 3))
    hidden = np.maximum(given @ weights["first"].T + weights["bias"], 0)
    result: np.ndarray = np.maximum(hidden @ weights["second"].T, 0) @ weights["last"].T
    return result


def doubled(network: Network) -> Network:
    """Every hidden unit twice, each copy read half."""
    first, bias = (np.repeat(network.weights[name], 2, axis=0) for name in ("first", "bias"))
    second = np.repeat(np.repeat(network.weights["second"], 2, axis=0), 2, axis=1) / 2
    last = np.repeat(network.weights["last"], 2, axis=1) / 2
    hidden, deep = first.shape[0], second.shape[0]
    return Network(perceptron(hidden, deep), {"first": first, "bias": bias, "second": second, "last": last})


def carried(first: Network, second: Network, regularization: float = 0.0) -> Arrays:
    plans = fuse(first, second, regularization)
    return {name: carry(first.symmetry, second, name, plans) for name in first.weights}


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "mobilenet", "densenet", "convnext", "unet"])
def test_a_shuffled_network_is_carried_back(name: str) -> None:
    model = exported(name)
    symmetry = derive_symmetry(model)
    weights = weights_of(model, symmetry)
    other = move(symmetry, weights, random_permutations(symmetry, np.random.default_rng(0)))
    result = carried(Network(symmetry, weights), Network(symmetry, other))
    assert all(np.abs(result[weight] - weights[weight]).max() < 1e-6 for weight in weights)


def test_a_network_goes_into_more_units_and_computes_what_it_did() -> None:
    narrow = drawn(6, 4)
    result = carried(doubled(narrow), narrow)
    assert result["second"].shape == (8, 12)
    assert np.abs(answers(result) - answers(dict(narrow.weights))).max() < 1e-9


def test_copies_go_into_fewer_units() -> None:
    narrow = drawn(6, 4)
    result = carried(narrow, doubled(narrow))
    assert all(np.abs(result[name] - narrow.weights[name]).max() < 1e-9 for name in result)


def test_widths_that_have_little_in_common() -> None:
    first, second = drawn(7, 5), drawn(9, 6, seed=1)
    result = carried(first, second)
    assert {name: array.shape for name, array in result.items()} == {n: a.shape for n, a in first.weights.items()}
    # A weighted mean: the mean of a bias is kept.
    assert result["bias"].mean() == pytest.approx(second.weights["bias"].mean())


def test_a_small_regularization_comes_near_the_exact_plan() -> None:
    narrow = drawn(6, 4)
    exact, soft = carried(doubled(narrow), narrow), carried(doubled(narrow), narrow, 1e-3)
    assert all(np.abs(exact[name] - soft[name]).max() < 1e-3 for name in exact)
    vague = carried(doubled(narrow), narrow, 100.0)
    assert np.ptp(vague["bias"]) < 0.1 * np.ptp(exact["bias"])  # everything is nearly everything's mean


def test_heads_and_groups_are_refused() -> None:
    model = exported("vit")
    symmetry = derive_symmetry(model)
    network = Network(symmetry, weights_of(model, symmetry))
    with pytest.raises(InvalidSpec, match="heads, groups or directions"):
        fuse(network, network)


def test_other_structures_are_refused() -> None:
    other = Network(perceptron(6, 4, outputs=5), drawn(6, 4).weights)
    with pytest.raises(StructureMismatch, match="widths of hidden layers alone"):
        fuse(drawn(6, 4), other)
