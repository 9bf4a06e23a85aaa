"""Readers that give a network's weights moved or mixed, window by window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.zoo import exported

from ensemerge.align.prepare import MixedWeights, MovedWeights, axis_maps
from ensemerge.align.proof import weights_of
from ensemerge.align.zipping import Mixing, mixed
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.permute import move, random_permutations
from ensemerge.graph.symmetry import Symmetry
from ensemerge.weights.onnx import OnnxWeights
from ensemerge.weights.reader import read


def derived(name: str) -> tuple[Symmetry, OnnxWeights]:
    model = exported(name)
    return derive_symmetry(model), OnnxWeights(model, None)


@pytest.mark.parametrize("name", ["resnet", "resnext", "vit", "densenet", "llama", "gru both ways"])
def test_a_moved_reader_gives_moved_weights(name: str) -> None:
    symmetry, reader = derived(name)
    drawn = random_permutations(symmetry, np.random.default_rng(0))
    expected = move(symmetry, weights_of(exported(name), symmetry), drawn)
    prepared = MovedWeights(reader, symmetry, drawn)
    for weight in symmetry.weights:
        whole = read(prepared, weight).numpy()
        assert np.array_equal(whole, expected[weight])
        middle = prepared.window(weight, whole.size // 3, 2 * whole.size // 3).numpy()
        assert np.array_equal(middle, whole.reshape(-1)[whole.size // 3 : 2 * whole.size // 3])
        assert prepared.info(weight) == reader.info(weight)
        assert prepared.window_bytes(weight, 1) >= 0


def test_inner_units_on_another_axis_than_their_groups_need_the_whole_tensor() -> None:
    symmetry, reader = derived("resnext")
    drawn = random_permutations(symmetry, np.random.default_rng(0))
    grouped = [name for name in symmetry.weights if axis_maps(symmetry, name, drawn) is None]
    assert grouped == ["stages.0.second.weight", "stages.1.second.weight"]
    prepared = MovedWeights(reader, symmetry, drawn)
    assert prepared.window_bytes(grouped[0], 1) >= reader.info(grouped[0]).nbytes


def test_what_does_not_move_is_not_copied() -> None:
    symmetry, reader = derived("resnet")
    prepared = MovedWeights(reader, symmetry, {})
    assert prepared.names == reader.names
    assert prepared.ties == reader.ties
    assert all(torch.equal(read(prepared, name), read(reader, name)) for name in reader.names)


def test_a_mixed_reader_gives_a_networks_share() -> None:
    symmetry, reader = derived("mlp")
    space = symmetry.free[0]
    table = np.linspace(0, 1, space.size**2).reshape(space.size, space.size)
    mixing = Mixing({(space.name,): table}, {(space.name,): table.T})
    prepared = MixedWeights(reader, symmetry, mixing, 2)
    for name, array in weights_of(exported("mlp"), symmetry).items():
        share = mixed(symmetry, name, array, mixing, 2)
        assert np.abs(read(prepared, name).numpy() - share).max() < 1e-6
    bias = weights_of(exported("mlp"), symmetry)["0.bias"]
    assert np.abs(read(prepared, "0.bias").numpy() - 2 * table.T @ bias).max() < 1e-5
