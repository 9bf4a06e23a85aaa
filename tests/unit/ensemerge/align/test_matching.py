"""Units of one network found again in another: planted permutations, local optima, several networks."""

from __future__ import annotations

import numpy as np
import pytest
from support.zoo import ZOO, exported

from ensemerge.align.matching import Search, match, match_all
from ensemerge.align.proof import weights_of
from ensemerge.align.similarity import (
    Balanced,
    Moments,
    Pair,
    Similarity,
    SortedWeights,
    Tables,
    WeightCorrelations,
    WeightProducts,
)
from ensemerge.errors import InvalidData
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import Weights, inverse, move, moved, random_permutations
from ensemerge.graph.symmetry import Space, Symmetry

Arrays = dict[str, np.ndarray]


def network(name: str) -> tuple[Symmetry, Arrays]:
    model = exported(name)
    symmetry = derive_symmetry(model)
    return symmetry, weights_of(model, symmetry)


def shuffled(symmetry: Symmetry, weights: Weights, seed: int) -> Arrays:
    return move(symmetry, weights, random_permutations(symmetry, np.random.default_rng(seed)))


def equal(ours: Weights, theirs: Weights) -> bool:
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ZOO)
def test_a_planted_permutation_is_found_exactly(name: str) -> None:
    symmetry, weights = network(name)
    for seed in range(3):
        other = shuffled(symmetry, weights, seed)
        found = match(symmetry, weights, other, WeightProducts(), SortedWeights())
        assert equal(move(symmetry, other, found.permutations), weights)


def residual(seed: int) -> tuple[Symmetry, Arrays]:
    """A residual stream of 30 units with blocks of 50, hardly held by its input and output."""
    spaces = {space.name: space for space in (Space("stream", 30), Space("a", 50), Space("b", 50))}
    spaces |= {"in": Space("in", 1, frozen="it is an input"), "out": Space("out", 1, frozen="it is an output")}
    pairs = [("stream", "in"), ("a", "stream"), ("stream", "a"), ("b", "stream"), ("stream", "b"), ("out", "stream")]
    axes = {f"{one} of {other}": (((one,),), ((other,),)) for one, other in pairs}
    generator = np.random.default_rng(seed)
    sizes = {name: [spaces[part[0][0]].size for part in parts] for name, parts in axes.items()}
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    return Symmetry(spaces, axes, {}, frozenset(), {}, {}), weights


def test_residual_networks_are_found_where_plain_descent_is_not() -> None:
    plain = whole = 0
    for seed in range(100):
        symmetry, weights = residual(seed)
        other = shuffled(symmetry, weights, seed)
        for start in (None, SortedWeights()):
            found = match(symmetry, weights, other, WeightProducts(), start)
            right = equal(move(symmetry, other, found.permutations), weights)
            plain, whole = plain + (right and start is None), whole + (right and start is not None)
    assert whole >= 99
    assert plain < 50  # or the networks would show nothing


def test_random_starts_help_as_well() -> None:
    hits = 0
    for seed in range(20):
        symmetry, weights = residual(seed)
        other = shuffled(symmetry, weights, seed)
        found = match(symmetry, weights, other, WeightProducts(), search=Search(random_starts=10, seed=seed))
        hits += equal(move(symmetry, other, found.permutations), weights)
    assert hits >= 10


def test_each_step_brings_the_networks_nearer() -> None:
    symmetry, weights = network("resnet")
    other = {name: array + 0.5 for name, array in shuffled(symmetry, weights, 1).items()}
    found = match(symmetry, weights, other, WeightProducts())
    aligned = move(symmetry, other, found.permutations)

    def distance(those: Weights) -> float:
        return float(sum(((weights[name] - those[name]) ** 2).sum() for name in weights))

    assert distance(aligned) < distance(other)


def measured(symmetry: Symmetry, noise: float = 0.0) -> Tables:
    """Correlations of a network's activations with its own: each unit is most alike to itself."""
    generator = np.random.default_rng(0)
    tables = {}
    for space in symmetry.free:
        units = space.size * symmetry.size(space.within)
        tables[space.name] = np.eye(units) + noise * generator.random((units, units))
    return Tables(tables)


def seen_by(symmetry: Symmetry, tables: Tables, seed: int) -> Tables:
    """The same when the second network's units lie elsewhere."""
    drawn = random_permutations(symmetry, np.random.default_rng(seed))
    found = {}
    for name, table in tables.tables.items():
        axis = ((*symmetry.spaces[name].within, name),)
        found[name] = table[:, moved(symmetry, np.arange(len(table)), [axis], drawn)]
    return Tables(found)


@pytest.mark.parametrize("name", ["resnet", "vit", "resnext", "gru both ways"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_activations_lead_to_the_same(name: str, alpha: float) -> None:
    symmetry, weights = network(name)
    other = shuffled(symmetry, weights, 4)
    tables = seen_by(symmetry, measured(symmetry, noise=0.3), 4)
    similarity: Similarity = Balanced(alpha, WeightCorrelations(), tables) if alpha else tables
    found = match(symmetry, weights, other, similarity)
    assert equal(move(symmetry, other, found.permutations), weights)


def test_several_networks_come_into_one_order() -> None:
    symmetry, weights = network("resnet")
    generator = np.random.default_rng(0)
    networks = [weights]
    for seed in range(3):
        noisy = {name: array + generator.normal(0, 0.02, array.shape) for name, array in weights.items()}
        networks.append(shuffled(symmetry, noisy, seed))
    found = match_all(symmetry, networks, lambda i, j: WeightProducts(), SortedWeights())
    assert found[0].permutations == {}
    for seed, matching in enumerate(found[1:]):
        back = inverse(symmetry, random_permutations(symmetry, np.random.default_rng(seed)))
        assert all(np.array_equal(order, matching.permutations[name]) for name, order in back.items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    symmetry, weights = network("mlp")
    broken = {**weights, "0.bias": np.full_like(weights["0.bias"], value)}
    with pytest.raises(InvalidData, match=r"weight '0.bias' of network 2 holds NaN or infinity"):
        match(symmetry, weights, broken, WeightProducts())


def test_units_that_do_not_vary_correlate_with_none() -> None:
    moments = Moments(2, 2)
    samples = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], np.float32)
    moments.add(samples, samples[::-1].copy())
    assert moments.correlations().round(6).tolist() == [[0, 1], [0, 0]]


def test_correlations_are_numpys() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(3, 1, (4, 50)), generator.normal(-2, 5, (3, 50))
    moments = Moments(4, 3)
    for part in range(0, 50, 10):
        moments.add(first[:, part : part + 10].astype(np.float32), second[:, part : part + 10].astype(np.float32))
    expected = np.corrcoef(first, second)[:4, 4:]
    assert np.abs(moments.correlations() - expected).max() < 1e-5
    assert np.array_equal(Moments(2, 3).correlations(), np.zeros((2, 3)))


def test_ignored_weights_do_not_count() -> None:
    symmetry, weights = network("mlp")
    pair = Pair(symmetry, weights, {**weights, "0.bias": weights["0.bias"] * 100})
    space = symmetry.free[0]
    with_all, without = (WeightProducts(ignored).table(pair, space) for ignored in ((), ("0.bias",)))
    expected = with_all - np.outer(weights["0.bias"], weights["0.bias"] * 100)
    assert np.abs(without - expected).max() < 1e-3


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_correlations_around_a_large_mean(mean: float) -> None:
    generator = np.random.default_rng(0)
    samples = (mean + generator.standard_normal((3, 4000))).astype(np.float32)
    samples[2] = mean
    moments = Moments(3, 3)
    for part in range(0, 4000, 500):
        moments.add(samples[:, part : part + 500], samples[:, part : part + 500])
    expected = np.zeros((3, 3))
    expected[:2, :2] = np.corrcoef(samples[:2].astype(np.float64))
    assert np.abs(moments.correlations() - expected).max() < 1e-4
