"""What may change places in a network without changing what it computes: the symmetry of its weights.

A *space* is a set of units that must move together wherever they occur: the output channels of a convolution, the
bias and the normalisation on them, and the input channels of all that read them. An axis of a weight is made of
spaces: as a product (heads × units of a head) or as a concatenation of such products (the inputs of a DenseNet
layer). Units of a space move by one permutation, or, where the space lies *within* others, by one for each of their
units: the units of each head have an order of their own, and move with the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

# Outer to inner: the axis counts through the last space fastest.
Product = tuple[str, ...]
# A concatenation of products, in order.
Axis = tuple[Product, ...]


@dataclass(frozen=True)
class Space:
    """Units that move together.

    `within` names the spaces for each of whose units the permutation may be another one. `frozen` says why the units
    must stay where they are; None where they may move.
    """

    name: str
    size: int
    within: tuple[str, ...] = ()
    frozen: str | None = None

    @property
    def is_free(self) -> bool:
        return self.frozen is None and self.size > 1


@dataclass(frozen=True)
class Block:
    """A part of a weight (or of a value) in which every axis is one product of spaces.

    `region` cuts it out of the whole; `factors` names the spaces of each axis, outer to inner.
    """

    region: tuple[slice, ...]
    factors: tuple[Product, ...]

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces of all axes in order: the axes of the block when every factor gets an axis of its own."""
        return tuple(name for factors in self.factors for name in factors)


@dataclass(frozen=True)
class Symmetry:
    """The spaces of a network, and of which of them the axes of its weights are made.

    `weights` gives the axes of each weight by its name, `values` those of what operators compute from them; `inputs`
    are the axes of weights over which an operator sums, as pairs of name and axis. `probes` names, for each space,
    what the last matrix product or convolution reads that sums over it, or over others beside it: there the
    activations of its units are seen. `without_rule` counts the operators for which there is no rule: all that they
    touch is frozen.
    """

    spaces: Mapping[str, Space]
    weights: Mapping[str, tuple[Axis, ...]]
    values: Mapping[str, tuple[Axis, ...]]
    inputs: frozenset[tuple[str, int]]
    probes: Mapping[str, tuple[str, ...]]
    without_rule: Mapping[str, int]

    @cached_property
    def free(self) -> list[Space]:
        """The spaces of weights whose units may move."""
        names = {name for axes in self.weights.values() for axis in axes for factors in axis for name in factors}
        return [space for name, space in self.spaces.items() if name in names and space.is_free]

    def blocks(self, axes: Sequence[Axis]) -> Iterator[Block]:
        """The parts of a tensor with these axes."""
        cuts = [list(self._cut(axis)) for axis in axes]
        for chosen in product(*cuts):
            yield Block(tuple(part for part, _ in chosen), tuple(factors for _, factors in chosen))

    def size(self, factors: Product) -> int:
        return math.prod(self.spaces[name].size for name in factors)

    def _cut(self, axis: Axis) -> Iterator[tuple[slice, Product]]:
        start = 0
        for factors in axis:
            stop = start + self.size(factors)
            yield slice(start, stop), factors
            start = stop


# An element of the group: for each space an array of whole numbers `(sizes of its within…, size)`, which says what
# comes to each place: entry `i` holds the old number of the unit that is number `i` now. Where a space lies within
# others, the leading axes count their units as they are now. A space that is not named stays as it is.
Permutations = Mapping[str, np.ndarray]
