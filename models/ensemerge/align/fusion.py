"""Optimal transport fusion: a network's units carried over to those of another, which may have more or fewer.

Layer after layer, beginning at what stays in place, each unit of the first network gets the weighted mean of the
second's units that are like it (Singh & Jaggi 2019, arXiv 1910.05653, section 4). What reads a unit that goes to
several places is divided among them, so that a network that is merely copied into more units computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemerge.align.transport import sinkhorn, transport
from ensemerge.errors import InvalidSpec, StructureMismatch
from ensemerge.graph.permute import Weights
from ensemerge.graph.symmetry import Axis, Block, Symmetry

# For each space of the first network the plan `(second's units, first's units) float64`, which sums to 1.
Plans = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """A network's weights and symmetry. Two networks that are fused call their weights alike."""

    symmetry: Symmetry
    weights: Weights


def fuse(first: Network, second: Network, regularization: float = 0.0) -> Plans:
    """The plans that carry the second network's units to the first's: exact, or Sinkhorn's with a regularization.

    The cost is the squared distance of weights, what they read and write being carried over already; the
    regularization is relative to the mean cost. Raises InvalidSpec for networks whose units lie within heads or
    groups, StructureMismatch for networks that differ in more than their widths.
    """
    _refuse_groups(first.symmetry)
    _refuse_other_structure(first.symmetry, second.symmetry)
    left = [space.name for space in first.symmetry.free]
    plans: dict[str, np.ndarray] = {}
    while left:
        name = next((name for name in left if any(True for _ in _vectors(first, second, name, plans))), left[0])
        left.remove(name)
        vectors = list(_vectors(first, second, name, plans))
        if not vectors:
            raise InvalidSpec(f"the units of '{name}' meet nothing that is carried over before them; use mudsc")
        plans[name] = _plan(vectors, regularization)
    return plans


def carry(first: Symmetry, second: Network, weight: str, plans: Plans) -> np.ndarray:
    """One weight of the second network in the shape that it has in the first."""
    values = second.weights[weight]
    axes = first.weights[weight]
    result = np.zeros([sum(first.size(factors) for factors in axis) for axis in axes])
    blocks = zip(first.blocks(axes), second.symmetry.blocks(second.symmetry.weights[weight]), strict=True)
    for ours, theirs in blocks:
        part = _carried(first, ours, _split(second.symmetry, theirs, values), weight, plans)
        result[ours.region] = part.reshape(result[ours.region].shape)
    return result


def _plan(vectors: list[tuple[np.ndarray, np.ndarray]], regularization: float) -> np.ndarray:
    cost = np.zeros((len(vectors[0][1]), len(vectors[0][0])))
    for ours, theirs in vectors:
        cost += (theirs**2).sum(axis=1)[:, None] + (ours**2).sum(axis=1) - 2 * theirs @ ours.T
    if regularization:
        return sinkhorn(-cost, regularization * (float(np.abs(cost).mean()) or 1.0))
    return transport(-cost)


def _vectors(first: Network, second: Network, name: str, plans: Plans) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights of each unit in both networks, `(units, weights) float64`, where all that they meet is carried over."""
    for weight, axes in first.symmetry.weights.items():
        theirs = second.symmetry.blocks(second.symmetry.weights[weight])
        for block, other in zip(first.symmetry.blocks(axes), theirs, strict=True):
            met = {space for space in block.spaces if space != name and first.symmetry.spaces[space].is_free}
            if block.spaces.count(name) != 1 or not met <= plans.keys():
                continue
            mine = _split(first.symmetry, block, first.weights[weight])
            carried = _split(second.symmetry, other, second.weights[weight])
            carried = _carried(first.symmetry, block, carried, weight, {space: plans[space] for space in met})
            yield _rows(mine, block.spaces.index(name)), _rows(carried, block.spaces.index(name))


def _split(symmetry: Symmetry, block: Block, values: np.ndarray) -> np.ndarray:
    """A part of a weight with an axis for each space."""
    sizes = [symmetry.spaces[name].size for name in block.spaces]
    return values[block.region].astype(np.float64).reshape(sizes)


def _carried(first: Symmetry, block: Block, part: np.ndarray, weight: str, plans: Plans) -> np.ndarray:
    """A part of the second network's weight with the first's units, an axis for each space."""
    at = 0
    for axis, factors in enumerate(block.factors):
        for name in factors:
            if name in plans:
                plan = plans[name]
                share = plan * plan.shape[0] if (weight, axis) in first.inputs else plan * plan.shape[1]
                part = np.moveaxis(np.tensordot(part, share, axes=(at, 0)), -1, at)
            at += 1
    return part


def _rows(values: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _refuse_groups(symmetry: Symmetry) -> None:
    for space in symmetry.free:
        if space.within:
            raise InvalidSpec(
                f"'ot_fusion' carries units one by one, but those of '{space.name}' lie within '{space.within[-1]}' "
                "(heads, groups or directions); use mudsc or weight_matching"
            )


def _refuse_other_structure(first: Symmetry, second: Symmetry) -> None:
    """Every space of the one is a space of the other, wherever it occurs; what stays in place has one size."""
    twins: dict[str, str] = {}
    for weight, axes in first.weights.items():
        others = second.weights.get(weight, ())
        forms = [[len(factors) for factors in axis] for axis in axes], [[len(f) for f in axis] for axis in others]
        if forms[0] != forms[1]:
            raise StructureMismatch(f"weight '{weight}' is made of other parts in the other network")
        pairs = zip(_names(axes), _names(others), strict=True)
        for name, other in pairs:
            ours, theirs = first.spaces[name], second.spaces[other]
            alike = ours.is_free == theirs.is_free and (ours.is_free or ours.size == theirs.size)
            if twins.setdefault(name, other) != other or not alike:
                raise StructureMismatch(
                    f"weight '{weight}': '{name}' has {ours.size} units in the first network, '{other}' {theirs.size} "
                    "in the other; expected networks that differ in the widths of hidden layers alone"
                )


def _names(axes: Sequence[Axis]) -> list[str]:
    return [name for axis in axes for factors in axis for name in factors]
