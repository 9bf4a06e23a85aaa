"""Bring the units of one network into the order of another's, or those of several into one order.

Space by space the second network's units are matched to the first's, all other spaces being as they are, until
nothing changes any more (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1). Where spaces lie within others, heads
are matched by the best that the units inside them allow. What comes out depends on where it begins: it begins at
several places, and the best end is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemerge.align.assignment import assign, assign_groups
from ensemerge.align.similarity import Pair, Similarity
from ensemerge.errors import InvalidData
from ensemerge.graph.permute import Weights, compose, move, random_permutations
from ensemerge.graph.symmetry import Permutations, Space, Symmetry
from ensemerge.progress import Notify, silent

# Beyond that many rounds over all spaces nothing is gained that one would see.
MOST_SWEEPS = 100
# So many orders of the spaces are tried before the search gives up.
PATIENCE = 5


@dataclass(frozen=True)
class Search:
    """How long to look. Every start is followed to its end, the orders of spaces being drawn from `seed`."""

    random_starts: int = 0
    sweeps: int = MOST_SWEEPS
    seed: int = 0


@dataclass(frozen=True)
class Matching:
    """Where the second network's units go, how alike the networks are then, and how it was found."""

    permutations: Permutations
    similarity: float
    sweeps: int
    start: str


def match(
    symmetry: Symmetry,
    first: Weights,
    second: Weights,
    similarity: Similarity,
    start: Similarity | None = None,
    search: Search = Search(),
    notify: Notify = silent,
) -> Matching:
    """The permutations that bring `second` into the order of `first`.

    Begins with the units as they are, as `start` matches each space by itself, and in random orders. Raises
    InvalidData where weights are not finite.
    """
    refuse_not_finite(first, second)
    whole = Pair(symmetry, first, second)
    begun = list(_starts(whole, start, search))
    found = []
    for number, (name, pair) in enumerate(begun):
        found.append(_followed(pair, similarity, search, name))
        notify("match units", number + 1, len(begun))
    return max(found, key=lambda matching: matching.similarity)


def refuse_not_finite(*networks: Weights) -> None:
    """Raises InvalidData."""
    for number, weights in enumerate(networks):
        for name, array in weights.items():
            if not np.isfinite(array).all():
                raise InvalidData(
                    f"weight '{name}' of network {number + 1} holds NaN or infinity; expected finite numbers"
                )


def _starts(whole: Pair, start: Similarity | None, search: Search) -> Iterator[tuple[str, Pair]]:
    yield "as it is", whole
    if start is not None:
        alone = {name: order for family in families(whole.symmetry) for name, order in _solved(whole, family, start)}
        yield "each space by itself", moved_pair(whole, alone)
    generator = np.random.default_rng(search.seed)
    for number in range(search.random_starts):
        yield f"random order {number + 1}", moved_pair(whole, random_permutations(whole.symmetry, generator))


def moved_pair(pair: Pair, update: Permutations) -> Pair:
    """The same with the second network moved on."""
    if not update:
        return pair
    return replace(
        pair,
        second=move(pair.symmetry, pair.second, update),
        permutations=compose(pair.symmetry, pair.permutations, update),
    )


def families(symmetry: Symmetry) -> list[list[Space]]:
    """The free spaces that are matched at once: one, and those that lie within it alone.

    Those that lie within a family's first space are matched once more by themselves, with the first in its place.
    """
    free = symmetry.free
    inner = {space.name: [other for other in free if other.within == (space.name,)] for space in free}
    whole = [[space, *inner[space.name]] for space in free if not space.within]
    return [*whole, *([space] for space in free if space.within)]


def _followed(pair: Pair, similarity: Similarity, search: Search, start: str) -> Matching:
    """Sweep over all spaces until nothing changes, or several orders of them in a row make nothing better."""
    generator = np.random.default_rng(search.seed)
    order = families(pair.symmetry)
    best_value, sweeps, failed = similarity.total(pair), 0, 0
    while failed < PATIENCE and sweeps < search.sweeps:
        sweeps += 1
        swept, changed = _swept(pair, similarity, [order[at] for at in generator.permutation(len(order))])
        if not changed:
            break
        value = similarity.total(swept)
        if value > best_value:
            pair, best_value, failed = swept, value, 0
        else:
            failed += 1
    return Matching(pair.permutations, best_value, sweeps, start)


def _swept(pair: Pair, similarity: Similarity, order: Sequence[list[Space]]) -> tuple[Pair, bool]:
    changed = False
    for family in order:
        update = {name: moved for name, moved in _solved(pair, family, similarity) if not _stays(moved)}
        pair, changed = moved_pair(pair, update), changed or bool(update)
    return pair, changed


def _stays(order: np.ndarray) -> bool:
    return bool((order == np.arange(order.shape[-1])).all())


def _solved(pair: Pair, family: Sequence[Space], similarity: Similarity) -> Iterator[tuple[str, np.ndarray]]:
    """For each space of a family its best new order, as the second network lies now."""
    space, *inner = family
    if inner:
        yield from _solved_groups(pair, space, inner, similarity)
        return
    table = similarity.table(pair, space)
    if not space.within:
        yield space.name, assign(table)
        return
    outer = len(table) // space.size
    places = table.reshape(outer, space.size, outer, space.size)
    orders = np.stack([assign(places[at, :, at]) for at in range(outer)])
    yield space.name, orders.reshape(*(pair.symmetry.spaces[name].size for name in space.within), space.size)


def _solved_groups(
    pair: Pair, space: Space, inner: Sequence[Space], similarity: Similarity
) -> Iterator[tuple[str, np.ndarray]]:
    """Groups such as heads, and the units within them."""
    own = similarity.table(pair, space, [other.name for other in inner])
    tables = []
    for at, other in enumerate(inner):
        # What belongs to two of the inner spaces counts for the groups once.
        table = similarity.table(pair, other, [earlier.name for earlier in inner[:at]])
        tables.append(table.reshape(space.size, other.size, space.size, other.size))
    groups, orders = assign_groups(own, tables)
    yield space.name, groups
    for other, order in zip(inner, orders, strict=True):
        yield other.name, order


@dataclass(frozen=True)
class Others:
    """Similarity to several networks at once: the sum over all that lie in one order already."""

    networks: Sequence[tuple[Pair, Similarity]]

    def table(self, pair: Pair, space: Space, without: Collection[str] = ()) -> np.ndarray:
        tables = [similarity.table(_beside(other, pair), space, without) for other, similarity in self.networks]
        total: np.ndarray = sum(tables[1:], start=tables[0])
        return total

    def total(self, pair: Pair) -> float:
        return sum(similarity.total(_beside(other, pair)) for other, similarity in self.networks)


def _beside(other: Pair, pair: Pair) -> Pair:
    return replace(pair, first=other.second, before=other.permutations)


def match_all(
    symmetry: Symmetry,
    networks: Sequence[Weights],
    similarity: Callable[[int, int], Similarity],
    start: Similarity | None = None,
    search: Search = Search(),
    notify: Notify = silent,
) -> list[Matching]:
    """Permutations that bring several networks into the order of the first; `similarity(i, j)` is that of two of them.

    Each network in turn is matched to all others as they lie, until none moves any more. All lie in one order, so
    maps from network to network lead back to where they began around every cycle (Crisostomi et al. 2024, arXiv
    2405.17897). Raises InvalidData where weights are not finite.
    """
    refuse_not_finite(*networks)
    placed = [Pair(symmetry, weights, weights) for weights in networks]
    found = [Matching({}, 0.0, 0, "the first")] * len(networks)
    for turn in range(search.sweeps):
        moved = False
        for k in range(1, len(networks)):
            others = range(k) if turn == 0 else (j for j in range(len(networks)) if j != k)
            beside = Others([(placed[j], similarity(j, k)) for j in others])
            found[k] = _matched_again(placed[k], beside, start if turn == 0 else None, search)
            moved = moved or not _equal(found[k].permutations, placed[k].permutations)
            placed[k] = _placed(symmetry, networks[k], found[k].permutations)
        done = not moved or len(networks) == 2
        notify("match networks", turn + 1, turn + 1 if done else turn + 2)
        if done:
            break
    return found


def _matched_again(pair: Pair, beside: Others, start: Similarity | None, search: Search) -> Matching:
    pair = replace(pair, first=beside.networks[0][0].second)
    begun = _starts(pair, start, search if start else Search(sweeps=search.sweeps, seed=search.seed))
    found = [_followed(one, beside, search, name) for name, one in begun]
    return max(found, key=lambda matching: matching.similarity)


def _placed(symmetry: Symmetry, weights: Weights, permutations: Permutations) -> Pair:
    return Pair(symmetry, weights, move(symmetry, weights, permutations), permutations)


def _equal(ours: Permutations, theirs: Permutations) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
