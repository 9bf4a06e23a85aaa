"""Zips of whole networks: exact where they are assignments, averages within networks where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from support.zoo import exported

from ensemerge.align.proof import weights_of
from ensemerge.align.zipping import ZipSettings, apply, mixed, zip_networks, zippable
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import Weights, move, moved, random_permutations
from ensemerge.graph.symmetry import Space, Symmetry

BUDGETLESS = ZipSettings(budget=0.0)


def network(name: str) -> tuple[Symmetry, dict[str, np.ndarray]]:
    model = exported(name)
    symmetry = derive_symmetry(model)
    return symmetry, weights_of(model, symmetry)


def merged(symmetry: Symmetry, networks: list[dict[str, np.ndarray]], settings: ZipSettings, seed: int) -> Weights:
    """Zip networks of which the second is the first, shuffled, by activations that say so."""
    drawn = random_permutations(symmetry, np.random.default_rng(seed))

    def alike(space: Space) -> np.ndarray:
        units = space.size * symmetry.size(space.within)
        order = moved(symmetry, np.arange(units), [((*space.within, space.name),)], drawn)
        noise = np.random.default_rng(1).random((units, units)) * 0.3
        cross = (np.eye(units) + noise)[:, order]
        return np.block([[np.eye(units), cross], [cross.T, np.eye(units)]])

    found = zip_networks(symmetry, networks, alike, settings)
    shares = [
        {name: mixed(symmetry, name, array, mixing, len(networks)) for name, array in weights.items()}
        for weights, mixing in zip(networks, found.mixings, strict=True)
    ]
    return {name: np.mean([share[name] for share in shares], axis=0) for name in networks[0]}


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet", "densenet", "vit", "attention", "lstm"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_network_zipped_with_itself_is_itself(name: str, alpha: float) -> None:
    symmetry, weights = network(name)
    other = move(symmetry, weights, random_permutations(symmetry, np.random.default_rng(3)))
    result = merged(symmetry, [weights, other], ZipSettings(budget=0.0, alpha=alpha), 3)
    # The merged units are in the order of the first network's.
    assert all(np.abs(result[name] - weights[name]).max() < 1e-6 for name in weights)


def test_units_of_one_network_may_be_merged() -> None:
    symmetry, weights = network("mlp")
    space = symmetry.free[0]

    def alike(asked: Space) -> np.ndarray:
        table = np.eye(2 * asked.size)
        if asked.name == space.name:
            table[0, 1] = table[1, 0] = 0.9  # two units of the first network are nearly one
        return table

    found = zip_networks(symmetry, [weights, weights], alike, ZipSettings())
    copied = found.mixings[0].copied[(space.name,)]
    assert np.array_equal(copied[0], copied[1])
    averaged = [mixing.averaged[(space.name,)] for mixing in found.mixings]
    assert np.allclose(sum(table.sum(axis=0) for table in averaged), 1)


def test_what_lies_on_another_axis_than_its_groups_is_left_out() -> None:
    symmetry, _ = network("resnext")
    zipped = {space.name for family in zippable(symmetry) for space in family}
    # Both stages are grouped throughout.
    assert zipped == set()
    symmetry, _ = network("vit")
    assert {space.name for family in zippable(symmetry) for space in family} == {s.name for s in symmetry.free}


def test_maps_are_applied_to_the_factors_that_they_are_of() -> None:
    symmetry, weights = network("vit")
    heads = next(space for space in symmetry.free if space.size == 3)
    product = next(
        factors for axes in symmetry.weights.values() for a in axes for factors in a if heads.name in factors
    )
    units = symmetry.size(product)
    table = np.random.default_rng(0).random((units, units))
    values = np.random.default_rng(1).random((5, units, 2))
    expected = np.einsum("aub,uv->avb", values, table)
    assert np.allclose(apply(symmetry, values, 1, product, {product: table}), expected)
    turned = np.eye(3)[[2, 0, 1]]
    expected = np.einsum("ahub,hk->akub", values.reshape(5, 3, -1, 2), turned).reshape(values.shape)
    assert np.allclose(apply(symmetry, values, 1, product, {(heads.name,): turned}), expected)
    assert set(weights)
