"""How heads that were trained with a network's own order of units read a trunk in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ensemerge.errors import InvalidSpec
from ensemerge.graph.permute import moved
from ensemerge.graph.symmetry import Axis, Permutations, Product, Symmetry


def head_orders(
    symmetry: Symmetry, axes: Sequence[Axis], permutations: Permutations, copied: Mapping[Product, np.ndarray]
) -> dict[int, np.ndarray]:
    """For each axis of the trunk's output, for each of the network's own units the number of the trunk's.

    The network was moved by `permutations`, then its units were copied from merged ones, `(units, merged)` for each
    product of spaces. Axes that are as they were are left out. Raises InvalidSpec where units on one axis have an
    order for each unit of another, which no Gather gives back.
    """
    orders = {}
    for number, axis in enumerate(axes):
        size = sum(symmetry.size(factors) for factors in axis)
        _refuse_dependent(symmetry, axis, permutations)
        back = np.argsort(moved(symmetry, np.arange(size), [axis], permutations))
        order = _merged(symmetry, axis, copied)[back]
        if not np.array_equal(order, np.arange(size)):
            orders[number] = order
    return orders


def _refuse_dependent(symmetry: Symmetry, axis: Axis, permutations: Permutations) -> None:
    for factors in axis:
        for name in (name for name in factors if name in permutations):
            if not set(symmetry.spaces[name].within) <= set(factors):
                raise InvalidSpec(
                    "`trunk`: units of this value are ordered within groups on another axis; choose a value before "
                    "they are split, or after they are joined"
                )


def _merged(symmetry: Symmetry, axis: Axis, copied: Mapping[Product, np.ndarray]) -> np.ndarray:
    """For each place of an axis, as the zip saw it, the place of the merged unit."""
    parts, start = [], 0
    for factors in axis:
        size = symmetry.size(factors)
        parts.append(start + _merged_product(symmetry, factors, copied))
        start += size
    return np.concatenate(parts)


def _merged_product(symmetry: Symmetry, factors: Product, copied: Mapping[Product, np.ndarray]) -> np.ndarray:
    places, at = np.arange(symmetry.size(factors)), 0
    while at < len(factors):
        together = next((n for n in (2, 1) if factors[at : at + n] in copied and at + n <= len(factors)), 0)
        if together:
            joined = factors[at : at + together]
            split = places.reshape(symmetry.size(factors[:at]), symmetry.size(joined), -1)
            places = np.take(split, copied[joined].argmax(axis=1), axis=1).reshape(-1)
        at += together or 1
    return places
