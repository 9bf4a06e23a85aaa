"""Merge units within networks as well as across them, in all spaces at once: ZipIt and MuDSC's zip.

A zip gives every network two maps per space: M averages units into merged ones, U copies a merged unit to where its
members were. A weight that writes a space is averaged, one that reads it is copied: `W* = Σ_k M_kᵀ W_k U_k` (Stoica et
al. 2023, arXiv 2305.03053, section 4.2). Nothing here keeps a network's function; what it costs must be measured.

Spaces whose units lie within those of others on another axis (grouped convolutions) are left to an assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemerge.align.similarity import Moments, Tables
from ensemerge.align.zip import Zipped, zip_groups, zip_units
from ensemerge.graph.permute import Weights
from ensemerge.graph.symmetry import Block, Product, Space, Symmetry

# Correlations of all units of all networks with each other, `(networks·units, networks·units)`.
Correlations = Callable[[Space], np.ndarray]


@dataclass(frozen=True)
class Mixing:
    """What a zip does with one network: for each product of spaces how its units are averaged and copied.

    Both are `(units, merged) float64`; averaging sums to one over the units of all networks.
    """

    averaged: Mapping[Product, np.ndarray]
    copied: Mapping[Product, np.ndarray]


@dataclass(frozen=True)
class ZipSettings:
    """Of the greedy zip, and how long to go on: the share of similarity by weights, and the most sweeps."""

    damping: float = 0.5
    budget: float = 1.0
    alpha: float = 0.0
    sweeps: int = 100
    patience: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Zip:
    """The maps of every network, and how alike the units are that were merged, on average over spaces."""

    mixings: Sequence[Mixing]
    similarity: float
    sweeps: int


def zip_networks(
    symmetry: Symmetry,
    networks: Sequence[Weights],
    activations: Correlations,
    settings: ZipSettings = ZipSettings(),
    ignored: frozenset[str] = frozenset(),
) -> Zip:
    """Zip by activations; with an `alpha` go on by both, as in MuDSC (Xu et al. 2024, arXiv 2403.01753).

    Then every space is zipped again, in random order, by the share `alpha` of similarity by weights, which the maps of
    all other spaces carry along, while the average similarity of what is merged grows.
    """
    zipper = _Zipper(symmetry, networks, activations, settings, ignored)
    zipper.zip_all(range(len(zipper.families)), 0.0)
    best, best_value, failed, sweeps = zipper.state(), zipper.value(settings.alpha), 0, 0
    generator = np.random.default_rng(settings.seed)
    while settings.alpha > 0 and failed < settings.patience and sweeps < settings.sweeps:
        sweeps += 1
        zipper.zip_all(generator.permutation(len(zipper.families)), settings.alpha)
        value = zipper.value(settings.alpha)
        if value > best_value:
            best, best_value, failed = zipper.state(), value, 0
        else:
            zipper.restore(best)
            failed += 1
    return Zip(zipper.mixings(), best_value, sweeps)


def zippable(symmetry: Symmetry) -> list[list[Space]]:
    """The families of spaces that are zipped at once: one alone, or one and those that lie within it on its axes."""
    inner = {space.name: [other for other in symmetry.free if other.within == (space.name,)] for space in symmetry.free}
    families = [[space, *inner[space.name]] for space in symmetry.free if not space.within]
    return [family for family in families if _lies_together(symmetry, family)]


def _lies_together(symmetry: Symmetry, family: Sequence[Space]) -> bool:
    """Whether everything within the first space stands right behind it wherever it occurs."""
    outer, names = family[0].name, {space.name for space in family[1:]}
    deeper = any(set(space.within) & (names | {outer}) and space not in family for space in symmetry.free)
    products = [factors for axes in symmetry.weights.values() for axis in axes for factors in axis]
    return not deeper and all(
        at > 0 and factors[at - 1] == outer for factors in products for at, name in enumerate(factors) if name in names
    )


class _Zipper:
    """A zip in progress: for each family the merged unit of every unit of every network."""

    def __init__(
        self,
        symmetry: Symmetry,
        networks: Sequence[Weights],
        activations: Correlations,
        settings: ZipSettings,
        ignored: frozenset[str],
    ) -> None:
        self.families = zippable(symmetry)
        self._symmetry = symmetry
        self._networks = networks
        self._activations = activations
        self._settings = settings
        self._ignored = ignored
        self._zipped: dict[Product, Zipped] = {}

    def state(self) -> dict[Product, Zipped]:
        return dict(self._zipped)

    def restore(self, state: Mapping[Product, Zipped]) -> None:
        self._zipped = dict(state)

    def zip_all(self, order: Sequence[int] | range | np.ndarray, alpha: float) -> None:
        for at in order:
            family = self.families[int(at)]
            tables = [self._similarity(space, alpha) for space in family]
            self._zipped |= self._solved(family, tables)

    def _solved(self, family: Sequence[Space], tables: Sequence[np.ndarray]) -> dict[Product, Zipped]:
        outer, *inner = family
        models, settings = len(self._networks), self._settings
        if not inner:
            return {(outer.name,): zip_units(tables[0], models, damping=settings.damping, budget=settings.budget)}
        zips = zip_groups(
            tables[1:], models, outer.size, own=tables[0], damping=settings.damping, budget=settings.budget
        )
        found: dict[Product, Zipped] = {(outer.name, space.name): one for space, one in zip(inner, zips, strict=True)}
        groups = zips[0].groups.reshape(models * outer.size, -1)[:, 0] // inner[0].size
        return {(outer.name,): Zipped(groups, outer.size), **found}

    def value(self, alpha: float) -> float:
        """The similarity of units that were merged with each other, averaged over units, then over spaces."""
        values = []
        for family in self.families:
            for space in family[1:] or family:
                together = np.equal.outer(*(self._zipped[_product(family, space)].groups,) * 2)
                np.fill_diagonal(together, False)
                if together.any():
                    values.append(float(self._similarity(space, alpha)[together].mean()))
        return float(np.mean(values)) if values else 0.0

    def _similarity(self, space: Space, alpha: float) -> np.ndarray:
        table = self._activations(space)
        if alpha > 0:
            table = alpha * self._weight_correlations(space) + (1 - alpha) * table
        return (table + table.T) / 2

    def _weight_correlations(self, space: Space) -> np.ndarray:
        """Of all units of all networks, their weights carried into merged coordinates by the maps of other spaces."""
        mixings = self.mixings()
        units = self._units(space)
        moments = Moments(len(self._networks) * units, len(self._networks) * units)
        for name, axes in self._symmetry.weights.items():
            if name in self._ignored:
                continue
            for block in self._symmetry.blocks(axes):
                for axis in (axis for axis, factors in enumerate(block.factors) if space.name in factors):
                    seen = [
                        self._vectors(weights, name, block, axis, mixing, space)
                        for weights, mixing in zip(self._networks, mixings, strict=True)
                    ]
                    stacked = np.concatenate(seen)
                    moments.add(stacked, stacked)
        return moments.correlations()

    def _units(self, space: Space) -> int:
        return space.size * self._symmetry.size(space.within)

    def _vectors(
        self, weights: Weights, name: str, block: Block, axis: int, mixing: Mixing, space: Space
    ) -> np.ndarray:
        """`(units, coordinates)`: the reverse of what merging will do to the other axes."""
        part = weights[name][block.region].astype(np.float32, copy=False)
        for other, factors in enumerate(block.factors):
            if other != axis:
                maps = mixing.averaged if (name, other) in self._symmetry.inputs else mixing.copied
                part = apply(self._symmetry, part, other, factors, maps)
        sizes = [self._symmetry.spaces[factor].size for factor in block.factors[axis]]
        part = np.moveaxis(part, axis, 0).reshape(*sizes, -1)
        wanted = [block.factors[axis].index(one) for one in (*space.within, space.name)]
        return np.moveaxis(part, wanted, range(len(wanted))).reshape(self._units(space), -1)

    def mixings(self) -> list[Mixing]:
        """The maps of each network."""
        found = []
        for k in range(len(self._networks)):
            averaged, copied = {}, {}
            for product, zipped in self._zipped.items():
                rows = slice(k * self._symmetry.size(product), (k + 1) * self._symmetry.size(product))
                averaged[product], copied[product] = zipped.merge[rows], zipped.unmerge[rows]
            found.append(Mixing(averaged, copied))
        return found


def _product(family: Sequence[Space], space: Space) -> Product:
    return (space.name,) if space is family[0] else (family[0].name, space.name)


def mixed(symmetry: Symmetry, name: str, array: np.ndarray, mixing: Mixing, networks: int) -> np.ndarray:
    """A network's share of a merged weight, times the number of networks: the merged weight is the mean of all."""
    axes = symmetry.weights[name]
    result = np.empty(array.shape, np.float64)
    scaled = {product: table * networks for product, table in mixing.averaged.items()}
    for block in symmetry.blocks(axes):
        part = array[block.region].astype(np.float64)
        for axis, factors in enumerate(block.factors):
            part = apply(symmetry, part, axis, factors, mixing.copied if (name, axis) in symmetry.inputs else scaled)
        result[block.region] = part
    return result


def apply(
    symmetry: Symmetry, values: np.ndarray, axis: int, factors: Product, maps: Mapping[Product, np.ndarray]
) -> np.ndarray:
    """Carry one axis of a tensor, made of these factors, into merged units."""
    shape, at = values.shape, 0
    while at < len(factors):
        together = next((n for n in (2, 1) if factors[at : at + n] in maps and at + n <= len(factors)), 0)
        if together:
            before = symmetry.size(factors[:at])
            joined = factors[at : at + together]
            size = symmetry.size(joined)
            split = values.reshape(*shape[:axis], before, size, -1, *shape[axis + 1 :])
            carried = np.tensordot(split, maps[joined].astype(values.dtype, copy=False), axes=(axis + 1, 0))
            values = np.moveaxis(carried, -1, axis + 1).reshape(shape)
        at += together or 1
    return values


def correlations_of(symmetry: Symmetry, tables: Mapping[tuple[int, int], Tables], networks: int) -> Correlations:
    """All networks' activations against all others': the tables of pairs, put together."""

    def together(space: Space) -> np.ndarray:
        units = space.size * symmetry.size(space.within)
        rows = [[_table(tables, space, i, j, units) for j in range(networks)] for i in range(networks)]
        return np.block(rows)

    return together


def _table(tables: Mapping[tuple[int, int], Tables], space: Space, i: int, j: int, units: int) -> np.ndarray:
    known = tables[min(i, j), max(i, j)].tables.get(space.name)
    if known is None:
        return np.zeros((units, units))
    return known if i <= j else known.T
