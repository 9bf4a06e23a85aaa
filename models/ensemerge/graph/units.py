"""What the positions along an axis are made of, found out bit by bit.

At first an axis is one set of units of which nothing is known. Where an operator makes two axes meet, they are tied:
their units move together from then on. Where one is known to be a product (heads × units of a head) or a sum (the
concatenation of two layers' channels), the other becomes one as well, down to its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence


class Units:
    """The units along one axis. Equal ones are found through `root`; parts are looked up, never kept."""

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self._frozen = frozen  # of a leaf alone; parts know for themselves
        self._same: Units | None = None
        self._factors: tuple[Units, ...] = ()
        self._terms: tuple[Units, ...] = ()

    @property
    def root(self) -> Units:
        """The one that stands for all that are tied."""
        unit = self
        while unit._same is not None:
            unit = unit._same
        return unit

    @property
    def is_leaf(self) -> bool:
        """Whether nothing is known of its parts."""
        root = self.root
        return not root._factors and not root._terms

    @property
    def factors(self) -> list[Units]:
        """Outer to inner, none of which is a product; itself where it is none. Units of size 1 are left out."""
        root = self.root
        if root._factors:
            return [leaf for factor in root._factors for leaf in factor.factors]
        return [root] if root.size != 1 else []

    @property
    def terms(self) -> list[Units]:
        """In order, none of which is a concatenation; itself where it is none."""
        root = self.root
        return [leaf for term in root._terms for leaf in term.terms] if root._terms else [root]

    @property
    def leaves(self) -> Iterator[Units]:
        """All parts that have no parts."""
        root = self.root
        if root.is_leaf:
            yield root
        for part in (*root._factors, *root._terms):
            yield from part.leaves

    @property
    def frozen(self) -> str | None:
        """Why its units must stay in place; of a leaf."""
        return self.root._frozen

    def freeze(self, reason: str) -> None:
        """All of its units must stay in place. The first reason is kept."""
        for leaf in self.leaves:
            leaf._frozen = leaf._frozen or reason


def product_of(parts: Sequence[Units]) -> Units:
    """An axis that counts through the last part fastest."""
    large = [part for part in parts if part.size != 1]
    if len(large) == 1:
        return large[0]
    made = Units(math.prod(part.size for part in parts))
    made._factors = tuple(large)
    return made


def sum_of(parts: Sequence[Units]) -> Units:
    """An axis that is a concatenation."""
    there = [part for part in parts if part.size]
    if len(there) == 1:
        return there[0]
    made = Units(sum(part.size for part in there))
    made._terms = tuple(there)
    return made


def cut(units: Units, sizes: Sequence[int]) -> list[Units]:
    """The parts of an axis that is split into stretches of these sizes."""
    parts = [Units(size) for size in sizes]
    tie(units, sum_of(parts))
    return parts


def tie(a: Units, b: Units) -> None:
    """From now on the units of both are the same. What cannot be expressed, because their parts overlap, is frozen."""
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} units cannot be the same")
    if not a.is_leaf and b.is_leaf:
        a, b = b, a
    if a.is_leaf:
        if a._frozen:
            b.freeze(a._frozen)
    elif a._factors and b._factors:
        _tie_lists(a.factors, b.factors, _split_product)
    elif a._terms and b._terms:
        _tie_lists(a.terms, b.terms, _split_sum)
    else:
        _distribute(*((a, b) if a._factors else (b, a)))
    if a.root is not b.root:
        a.root._same = b.root


Split = Callable[[Units, int], bool]
OVERLAP = "its parts overlap with those of an axis that it meets"


def _tie_lists(ours: list[Units], theirs: list[Units], split: Split) -> None:
    """Tie two lists of parts, splitting the larger one where two do not end together."""
    while ours and theirs:
        a, b = ours[0].root, theirs[0].root
        if a.size == b.size:
            tie(ours.pop(0), theirs.pop(0))
            continue
        large, rest, size = (a, ours, b.size) if a.size > b.size else (b, theirs, a.size)
        if not split(large, size):
            for part in (*ours, *theirs):
                part.freeze(OVERLAP)
            return
        rest[:1] = large.factors if split is _split_product else large.terms


def _split_product(units: Units, first: int) -> bool:
    """Make units the product of `first` and the rest; whether that can be."""
    if not units.is_leaf or units.size % first:
        return False
    units._factors = (Units(first, units._frozen), Units(units.size // first, units._frozen))
    return True


def _split_sum(units: Units, first: int) -> bool:
    """Make units a concatenation of the `first` ones and the rest; whether that can be."""
    if units.is_leaf:
        units._terms = (Units(first, units._frozen), Units(units.size - first, units._frozen))
        return True
    if not units._factors:
        return False
    outer, *inner = units.factors
    each = math.prod(part.size for part in inner)
    if first % each or not _split_sum(outer, first // each):
        return False
    _spread(units, outer, inner)
    return True


def _spread(units: Units, outer: Units, inner: Sequence[Units]) -> None:
    """`(a | b) × c` is `(a × c | b × c)`."""
    units._factors = ()
    units._terms = tuple(product_of([term, *inner]) for term in outer.terms)


def _distribute(multiplied: Units, added: Units) -> None:
    """Tie a product to a concatenation: every term must be so many whole outer units of the product."""
    outer, *inner = multiplied.factors
    each = math.prod(part.size for part in inner)
    terms = added.terms
    if any(term.size % each for term in terms):
        multiplied.freeze(OVERLAP)
        added.freeze(OVERLAP)
        return
    tie(outer, sum_of([Units(term.size // each) for term in terms]))
    if outer.is_leaf or not outer.root._terms:
        multiplied.freeze(OVERLAP)
        added.freeze(OVERLAP)
        return
    _spread(multiplied, outer, inner)
    _tie_lists(multiplied.terms, added.terms, _split_sum)
