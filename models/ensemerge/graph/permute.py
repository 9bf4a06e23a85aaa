"""Apply elements of a network's symmetry: weights re-indexed, permutations composed and inverted, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ensemerge.errors import InvalidData
from ensemerge.graph.symmetry import Axis, Block, Permutations, Space, Symmetry

Weights = Mapping[str, np.ndarray]


def move(symmetry: Symmetry, weights: Weights, permutations: Permutations) -> dict[str, np.ndarray]:
    """The weights with their units in new places; those that no permutation touches are the same arrays.

    Raises InvalidData for a permutation that the space does not have.
    """
    check(symmetry, permutations)
    return {
        name: moved(symmetry, array, symmetry.weights[name], permutations) if name in symmetry.weights else array
        for name, array in weights.items()
    }


def moved(symmetry: Symmetry, array: np.ndarray, axes: Sequence[Axis], permutations: Permutations) -> np.ndarray:
    """One tensor with these axes, its units in new places."""
    blocks = list(symmetry.blocks(axes))
    if not any(space in permutations for block in blocks for space in block.spaces):
        return array
    result = np.empty_like(array)
    for block in blocks:
        result[block.region] = _moved_block(symmetry, array[block.region], block, permutations)
    return result


def _moved_block(symmetry: Symmetry, part: np.ndarray, block: Block, permutations: Permutations) -> np.ndarray:
    """Outer units first: what comes to a place within a head is counted in the head that came there."""
    values = part.reshape([symmetry.spaces[name].size for name in block.spaces])
    places = [at for at, name in enumerate(block.spaces) if name in permutations]
    for at in sorted(places, key=lambda at: len(symmetry.spaces[block.spaces[at]].within)):
        space = symmetry.spaces[block.spaces[at]]
        order = permutations[space.name]
        if order.ndim == 1:
            values = np.take(values, order, axis=at)
            continue
        axes = [*(outer_place(block, at, outer) for outer in space.within), at]
        values = np.take_along_axis(values, _spread(order, axes, values.ndim), axis=at)
    return values.reshape(part.shape)


def outer_place(block: Block, at: int, outer: str) -> int:
    """Where the units are counted within which those at `at` lie: on the same axis, or on the one that has them."""
    start = 0
    for factors in block.factors:
        if start <= at < start + len(factors) and outer in factors:
            return start + factors.index(outer)
        start += len(factors)
    return block.spaces.index(outer)


def _spread(order: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """An array whose axes are those of a tensor of that rank, in any order, with size 1 for those that it lacks."""
    sizes = [1] * rank
    for axis, size in zip(axes, order.shape, strict=True):
        sizes[axis] = size
    return np.transpose(order, np.argsort(axes)).reshape(sizes)


def check(symmetry: Symmetry, permutations: Permutations) -> None:
    """Raises InvalidData where a permutation has another shape than its space, is none, or moves what is frozen."""
    for name, order in permutations.items():
        space = symmetry.spaces.get(name)
        if space is None:
            raise InvalidData(f"there is no space '{name}'; expected one of {sorted(symmetry.spaces)}")
        expected = shape(symmetry, space)
        if order.shape != expected or not np.issubdtype(order.dtype, np.integer):
            raise InvalidData(f"space '{name}': expected whole numbers {expected}, got {order.dtype} {order.shape}")
        if not np.array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(space.size), expected)):
            raise InvalidData(f"space '{name}': expected each of 0 to {space.size - 1} once")
        if space.frozen and not np.array_equal(order, np.arange(space.size)):
            raise InvalidData(f"space '{name}' must stay in place: {space.frozen}")


def shape(symmetry: Symmetry, space: Space) -> tuple[int, ...]:
    """The shape of a permutation of a space."""
    return (*(symmetry.spaces[outer].size for outer in space.within), space.size)


def identity(symmetry: Symmetry, space: Space) -> np.ndarray:
    return np.broadcast_to(np.arange(space.size), shape(symmetry, space)).copy()


def random_permutations(symmetry: Symmetry, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A random element of the group: every free space in an order of its own."""
    return {
        space.name: generator.permuted(identity(symmetry, space), axis=-1)
        for space in sorted(symmetry.free, key=lambda space: space.name)
    }


def compose(symmetry: Symmetry, first: Permutations, second: Permutations) -> dict[str, np.ndarray]:
    """What moves as `first` does and then `second`."""
    composed = {}
    for name in {**first, **second}:
        space = symmetry.spaces[name]
        before = first.get(name, identity(symmetry, space))
        composed[name] = moved(symmetry, before, _own_axes(space), second)
    return composed


def inverse(symmetry: Symmetry, permutations: Permutations) -> dict[str, np.ndarray]:
    """What takes everything back to where it came from."""
    inverted: dict[str, np.ndarray] = {}
    for space in sorted((symmetry.spaces[name] for name in permutations), key=lambda space: len(space.within)):
        outer = {name: order for name, order in inverted.items() if name in space.within}
        back = np.argsort(permutations[space.name], axis=-1)
        # The rows of an inner permutation go back with their outer units; the numbers in it are those of the unit.
        inverted[space.name] = moved(symmetry, back, _own_axes(space), outer)
    return inverted


def _own_axes(space: Space) -> list[Axis]:
    return [((name,),) for name in (*space.within, space.name)]
