"""How alike the units of two networks are: by their weights, by their activations, or by both at once.

A similarity gives, for one space, a table of all units of the first network against all of the second, as the second
lies now. Units of a space within others are counted together with those: unit u of head h has number h·units + u.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ensemerge.graph.permute import Weights, moved, outer_place
from ensemerge.graph.symmetry import Axis, Block, Permutations, Space, Symmetry

# So much variance counts as none, next to the mean square: a unit that does not vary correlates with no other.
NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Pair:
    """Two networks of one architecture: `first` stays, `second` has been moved by `permutations` so far.

    `before` is how the first had been moved, from how it was when similarities were measured.
    """

    symmetry: Symmetry
    first: Weights
    second: Weights
    permutations: Permutations = field(default_factory=dict)
    before: Permutations = field(default_factory=dict)

    def units(self, space: Space) -> int:
        """How many units a space has, all those within which it lies counted."""
        return space.size * math.prod(self.symmetry.spaces[outer].size for outer in space.within)


class Similarity(Protocol):
    """A measure of how alike units are."""

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        """`(units, units) float64`, larger for units that are more alike.

        What belongs to the spaces `without` as well is left out: their own tables hold it.
        """
        ...

    def total(self, pair: Pair) -> float:
        """How alike the two networks are as they lie."""
        ...


def mean_matched(similarity: Similarity, pair: Pair) -> float:
    """How alike the units are that lie in the same place, averaged over the units of a space, then over free spaces."""
    free = pair.symmetry.free
    matched = [np.trace(similarity.table(pair, space)) / pair.units(space) for space in free]
    return float(np.mean(matched)) if matched else 0.0


@dataclass(frozen=True)
class WeightProducts:
    """Inner products of all weights of two units (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1).

    Their sum over matched units is, but for a constant, how near the two networks are. `ignored` names weights that
    do not count, such as running statistics.
    """

    ignored: Collection[str] = ()

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        total = np.zeros((pair.units(space),) * 2)
        for ours, theirs in unit_vectors(pair, space, self.ignored, without):
            total += ours @ theirs.T
        return total

    def total(self, pair: Pair) -> float:
        """The inner product of all weights, which every step of a search makes larger."""
        counted = [name for name in pair.symmetry.weights if name not in self.ignored]
        return float(sum(np.vdot(pair.first[name].astype(np.float64), pair.second[name]) for name in counted))


@dataclass(frozen=True)
class WeightCorrelations:
    """Pearson's correlation of all weights of two units, as in MuDSC (Xu et al. 2024, arXiv 2403.01753).

    A unit whose weights are all equal correlates with none: 0.
    """

    ignored: Collection[str] = ()

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        moments = Moments(pair.units(space), pair.units(space))
        for ours, theirs in unit_vectors(pair, space, self.ignored, without):
            moments.add(ours, theirs)
        return moments.correlations()

    def total(self, pair: Pair) -> float:
        return mean_matched(self, pair)


@dataclass(frozen=True)
class SortedWeights:
    """Inner products of each unit's weights in sorted order: they do not depend on the order of any other units.

    Two networks that are the same but for the order of units are told apart by it at once, so it makes a good start.
    """

    ignored: Collection[str] = ()

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        total = np.zeros((pair.units(space),) * 2)
        for ours, theirs in unit_vectors(pair, space, self.ignored, without, sort=True):
            total += ours @ theirs.T
        return total

    def total(self, pair: Pair) -> float:
        return mean_matched(self, pair)


@dataclass(frozen=True)
class Tables:
    """Similarities that were measured beforehand, `(units, units)` by space, both networks as they were at first."""

    tables: Mapping[str, np.ndarray]

    @property
    def transposed(self) -> Tables:
        """The same with the networks exchanged."""
        return Tables({space: table.T for space, table in self.tables.items()})

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        known = self.tables.get(space.name)
        if known is None or without:
            return np.zeros((pair.units(space),) * 2)
        # Re-indexing a network re-indexes its activations.
        axis: Axis = ((*space.within, space.name),)
        numbers = np.arange(len(known))
        rows, columns = (moved(pair.symmetry, numbers, [axis], by) for by in (pair.before, pair.permutations))
        table: np.ndarray = known[np.ix_(rows, columns)]
        return table

    def total(self, pair: Pair) -> float:
        return mean_matched(self, pair)


@dataclass(frozen=True)
class Balanced:
    """`alpha·S_w + (1 − alpha)·S_a` (Xu et al. 2024, arXiv 2403.01753): alike in weights and in activations."""

    alpha: float
    weights: Similarity
    activations: Similarity

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        table = self.alpha * self.weights.table(pair, space, without)
        table += (1 - self.alpha) * self.activations.table(pair, space, without)
        return table

    def total(self, pair: Pair) -> float:
        return mean_matched(self, pair)


def unit_vectors(
    pair: Pair, space: Space, ignored: Collection[str], without: Collection[str], *, sort: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights of each unit in both networks, `(units, weights) float32` twice, part by part.

    With `sort` those that may move are sorted, so that their order does not matter.
    """
    for name, axes in pair.symmetry.weights.items():
        if name in ignored:
            continue
        for block in pair.symmetry.blocks(axes):
            if space.name not in block.spaces or any(other in without for other in block.spaces):
                continue
            for at in (at for at, one in enumerate(block.spaces) if one == space.name):
                yield tuple(
                    _vectors(pair.symmetry, weights[name][block.region], block, at, sort=sort)
                    for weights in (pair.first, pair.second)
                )  # type: ignore[misc]  # of two


def _vectors(symmetry: Symmetry, part: np.ndarray, block: Block, at: int, *, sort: bool) -> np.ndarray:
    space = symmetry.spaces[block.spaces[at]]
    values = part.astype(np.float32, copy=False).reshape([symmetry.spaces[name].size for name in block.spaces])
    leading = [*(outer_place(block, at, outer) for outer in space.within), at]
    rest = [axis for axis in range(values.ndim) if axis not in leading]
    free = [axis for axis in rest if symmetry.spaces[block.spaces[axis]].is_free]
    held = [axis for axis in rest if axis not in free]
    values = np.transpose(values, [*leading, *held, *free])
    units = math.prod(values.shape[: len(leading)])
    if not sort:
        return values.reshape(units, -1)
    kept = math.prod(values.shape[len(leading) : len(leading) + len(held)])
    return np.sort(values.reshape(units, kept, -1), axis=-1).reshape(units, -1)


class Moments:
    """Sums over samples of two sets of units, for their correlations.

    Kept in float64, of samples less the mean of the first ones: a large mean would drown the products in rounding.
    """

    def __init__(self, first: int, second: int) -> None:
        self._count = 0
        self._shifts = np.zeros((first, 1), np.float32), np.zeros((second, 1), np.float32)
        self._sums = np.zeros(first), np.zeros(second)
        self._squares = np.zeros(first), np.zeros(second)
        self._products = np.zeros((first, second))

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """More samples, `(units, samples) float32` of each."""
        if not self._count and first.shape[1]:
            self._shifts = first.mean(axis=1, keepdims=True), second.mean(axis=1, keepdims=True)
        self._count += first.shape[1]
        first, second = first - self._shifts[0], second - self._shifts[1]
        for values, sums, squares in zip((first, second), self._sums, self._squares, strict=True):
            sums += values.sum(axis=1, dtype=np.float64)
            squares += np.einsum("us,us->u", values, values, dtype=np.float64)
        self._products += first @ second.T

    def correlations(self) -> np.ndarray:
        """Pearson's correlation of all pairs, `(units, units) float64`; 0 for units that do not vary."""
        if not self._count:
            return self._products
        means = [sums / self._count for sums in self._sums]
        covariance = self._products / self._count - np.outer(*means)
        deviations = []
        for mean, squares, shift in zip(means, self._squares, self._shifts, strict=True):
            variance = squares / self._count - mean**2
            square = variance + (mean + shift[:, 0]) ** 2
            deviations.append(np.sqrt(np.where(variance > NO_VARIANCE * square, variance, np.inf)))
        return np.clip(covariance / np.outer(*deviations), -1, 1)
