"""Derive the symmetry of a network from its graph.

The walk finds out which axes consist of the same units. What is left to see is how units depend on one another: a
space lies within another when the two occur together everywhere, while the other also occurs alone. Each unit of a
head belongs to its head; a head is also an axis of the attention scores, where its units are summed up.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import onnx_ir as ir

from ensemerge.graph.files import named
from ensemerge.graph.rules import apply_rule
from ensemerge.graph.run import Arrays
from ensemerge.graph.surgery import constant_nodes, held
from ensemerge.graph.symmetry import Axis, Product, Space, Symmetry
from ensemerge.graph.trace import trace
from ensemerge.graph.units import Units
from ensemerge.graph.walk import Walk

Leaves = frozenset[Units]
UNUSED = "no operator with a rule reads it"


def derive_symmetry(
    model: ir.Model, feeds: Arrays | None = None, fixed: Collection[str] = (), *, is_trunk: bool = False
) -> Symmetry:
    """The spaces of a network. It is run once, on `feeds` or on made-up inputs, to learn the shapes of its values.

    `fixed` names weights that are tables rather than learned, such as the frequencies of rotary positions: their axes
    stay in place. The outputs of a trunk may move: heads will read them in whatever order they are. Raises
    InvalidModel where the network does not run.
    """
    walk = Walk(model, trace(model, feeds), fixed)
    for node in model.graph:
        apply_rule(walk, node)
    for value in model.graph.outputs:
        if walk.knows(value):
            walk.probe(value) if is_trunk else walk.freeze(value, "it is an output")
    return _Reading(walk).symmetry()


class _Reading:
    """Names for what a walk found."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._weights = _weights(walk)
        self._values = _values(walk)
        self._names: dict[Units, str] = {}

    def symmetry(self) -> Symmetry:
        """The spaces, named after the first weight in which they occur."""
        for units in self._everywhere():
            for unit in units:
                _freeze_sums_in_products(unit)
        weights = {name: self._axes(name, units) for name, units in self._weights.items()}
        values = {name: self._axes(name, units) for name, units in self._values.items()}
        within = self._within()
        spaces = {
            name: Space(name, unit.size, tuple(self._names[outer] for outer in within.get(unit, [])), _reason(unit))
            for unit, name in self._names.items()
        }
        inputs = {(named(value), axis) for value, axis in self._walk.summed if named(value) in weights}
        return Symmetry(
            spaces, weights, values, frozenset(inputs), self._probes(values, spaces), dict(self._walk.without_rule)
        )

    def _everywhere(self) -> list[Sequence[Units]]:
        return [*self._weights.values(), *self._values.values(), *self._walk.meetings]

    def _axes(self, tensor: str, units: Sequence[Units]) -> tuple[Axis, ...]:
        return tuple(self._axis(f"{tensor}:{at}", unit) for at, unit in enumerate(units))

    def _axis(self, name: str, units: Units) -> Axis:
        terms = units.terms
        return tuple(self._product(name if len(terms) == 1 else f"{name}+{at}", term) for at, term in enumerate(terms))

    def _product(self, name: str, units: Units) -> Product:
        factors = units.factors or [units.root]
        many = len(factors) > 1
        return tuple(
            self._names.setdefault(factor.root, f"{name}*{at}" if many else name) for at, factor in enumerate(factors)
        )

    def _within(self) -> dict[Units, list[Units]]:
        """For each space whose units may move those within which it lies, outer ones first."""
        together: dict[Units, Leaves] = {}
        for units in self._everywhere():
            for block in itertools.product(*(_distinct_terms(unit) for unit in units)):
                for part, others in _told_apart(block):
                    together[part] = together[part] & others if part in together else others
        found = {unit: together.get(unit, frozenset()) for unit in self._names}
        outer = {
            unit: [other for other in found[unit] if other in found and _is_outer(unit, other, found)]
            for unit in self._names
            if _reason(unit) is None
        }
        order = {unit: at for at, unit in enumerate(self._names)}
        return {
            unit: sorted(others, key=lambda other: (len(outer.get(other, [])), order[other]))
            for unit, others in outer.items()
        }

    def _probes(
        self, values: Mapping[str, tuple[Axis, ...]], spaces: Mapping[str, Space]
    ) -> dict[str, tuple[str, ...]]:
        """What the last operator reads that sums over a space, or over others beside it; the better ones if there are.

        The better ones are those in which nothing else may move, but for that within which the space lies.
        """
        any_, better = (self._last_read(values, spaces, seen) for seen in (_seen, _seen_alone))
        return {**any_, **better}

    def _last_read(
        self, values: Mapping[str, tuple[Axis, ...]], spaces: Mapping[str, Space], see: Seen
    ) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for read in self._walk.read:
            seen: dict[str, list[str]] = defaultdict(list)
            for name in (named(value) for value in read):
                for space in see(values.get(name, ()), spaces):
                    seen[space].append(name)
            found |= {space: tuple(dict.fromkeys(names)) for space, names in seen.items()}
        return found


Seen = Callable[[Sequence[Axis], Mapping[str, Space]], set[str]]


def _seen(axes: Sequence[Axis], spaces: Mapping[str, Space]) -> set[str]:
    return {name for axis in axes for factors in axis for name in factors if spaces[name].is_free}


def _seen_alone(axes: Sequence[Axis], spaces: Mapping[str, Space]) -> set[str]:
    """The free spaces of a value in which nothing else may move, but for those within which they lie."""
    found = set()
    for products in itertools.product(*axes):
        free = {name for factors in products for name in factors if spaces[name].is_free}
        found |= {name for name in free if free <= {name, *spaces[name].within}}
    return found


def _weights(walk: Walk) -> dict[str, list[Units]]:
    """The axes of all floats that the graph holds. What no rule has looked at stays in place."""
    constants = [node.outputs[0] for node in constant_nodes(walk.model).values()]
    found = {}
    for value in (*walk.model.graph.initializers.values(), *constants):
        tensor = held(value)
        if tensor is None or not tensor.dtype.is_floating_point() or not len(tensor.shape):
            continue
        if not value.uses() or value not in walk.dims:
            walk.freeze(value, UNUSED)
        found[named(value)] = walk.units(value)
    return found


def _values(walk: Walk) -> dict[str, list[Units]]:
    """The axes of all values that are computed, but for those that are still packed."""
    found = {}
    for value, dims in walk.dims.items():
        units = [dim for dim in dims if isinstance(dim, Units)]
        if held(value) is None and len(units) == len(dims):
            found[named(value)] = units
    return found


def _freeze_sums_in_products(units: Units) -> None:
    """A concatenation inside a product has no form as an axis: its units stay in place, and count as one space."""
    for term in units.terms:
        for factor in term.factors:
            if factor is not term.root and not factor.is_leaf:
                factor.freeze("it is a concatenation inside a product")


def _reason(unit: Units) -> str | None:
    return next((leaf.frozen for leaf in unit.leaves if leaf.frozen), None)


def _distinct_terms(units: Units) -> list[tuple[Units, ...]]:
    """The terms of an axis by their factors; those that consist of the same spaces once."""
    return list(dict.fromkeys(tuple(factor.root for factor in term.factors) for term in units.terms))


def _told_apart(block: Sequence[tuple[Units, ...]]) -> Iterator[tuple[Units, Leaves]]:
    """Each space of a block, and the others of which it is clear where they are counted.

    That is on the space's own axis, or else on the only one that has them; what is a concatenation elsewhere may be on
    yet another one in parts.
    """
    everywhere = [factor for factors in block for factor in factors]
    for factors in block:
        counts = {one: (factors if one in factors else everywhere).count(one) for one in everywhere if one.is_leaf}
        clear = frozenset(one for one, count in counts.items() if count == 1)
        for part in factors:
            yield part, clear


def _is_outer(unit: Units, other: Units, together: Mapping[Units, Leaves]) -> bool:
    """Whether `unit`, which never occurs without `other`, may have an order of its own for each unit of it."""
    if other is unit or other.size == 1:
        return False
    return unit not in together[other] or _reason(other) is not None
