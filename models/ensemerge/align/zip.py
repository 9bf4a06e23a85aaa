"""Which units to merge, within a model as well as across models: ZipIt (Stoica et al. 2023, arXiv 2305.03053).

An assignment gives every unit a partner in the other model, alike or not. A zip takes the most alike pair of all units,
merges it, and goes on until as many units are left as the merged network shall have.

Beyond the paper: similarities are damped only where they are positive, for a smaller negative one would be larger; a
merged unit belongs to every model that it holds units of; a budget is never overdrawn. For the last of these, no more
than `keep` merged units are open at any time, so that units which may not join others of their own model still find
a place. With two models and the usual `keep` there are never more, and the rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ensemerge.align.assignment import finite, match_cycle_consistent, score_groups
from ensemerge.errors import InvalidData

# How far from symmetric a table may be, relative to its largest entry: what float32 leaves.
ASYMMETRY = 1e-5


@dataclass(frozen=True)
class Zipped:
    """The merged unit that every unit went to, `groups`, `(models·units,) int64`; there are `keep` of them.

    Merged units are in the order of their first members, model after model.
    """

    groups: np.ndarray
    keep: int

    @property
    def merge(self) -> np.ndarray:
        """M, `(models·units, keep) float64`: a merged unit is the mean of its members."""
        return self.unmerge / np.bincount(self.groups, minlength=self.keep)

    @property
    def unmerge(self) -> np.ndarray:
        """U, `(models·units, keep) float64`: every member is a copy of its merged unit."""
        member: np.ndarray = self.groups[:, None] == np.arange(self.keep)
        return member.astype(np.float64)


def zip_units(
    similarity: np.ndarray, models: int, *, keep: int | None = None, damping: float = 0.5, budget: float = 1.0
) -> Zipped:
    """Merge the most alike units, pair by pair, until `keep` are left; without it, as many as one model has.

    `similarity` is `(models·units, models·units)`, symmetric, model after model. A merged unit is as similar to
    another as the less similar of its two parts, times `damping` if that is positive (0 to 1: the paper's alpha). Of
    `models·units − keep` merges each model may have an equal part, times `budget` (0 to 1: the paper's beta), within
    itself; 0 pairs units of different models only. Ties go to the units that come first. Raises InvalidData.
    """
    table = _symmetric(similarity, models)
    if not 0 <= damping <= 1:
        raise InvalidData(f"damping is {damping}; expected 0 to 1")
    keep = len(table) // models if keep is None else keep
    columns = _Columns(table, models, keep, _within(len(table), models, keep, budget))
    for _ in range(len(table) - keep):
        columns.merge(*columns.most_alike(), damping)
    return Zipped(np.unique(columns.home, return_inverse=True)[1].astype(np.int64), keep)


def zip_groups(
    tables: Sequence[np.ndarray],
    models: int,
    groups: int,
    *,
    own: np.ndarray | None = None,
    damping: float = 0.5,
    budget: float = 1.0,
) -> list[Zipped]:
    """Match groups of units, such as attention heads, across models, and zip the units of each matched set by itself.

    Each of `tables` is `(models·groups·units, models·groups·units)`, one for each kind of unit that the groups hold,
    and `own` is `(models·groups, models·groups)`, as in `assign_groups`. One zip for each table; all match the groups
    alike. Every set gives as many merged units as a group has, set after set in the order of the first model's
    groups, and has its own budget. Raises InvalidData.
    """
    symmetric = [_symmetric(table, models * groups) for table in tables]
    matched = _matched(symmetric, models, groups, None if own is None else _symmetric(own, models * groups))
    return [_zip_sets(table, matched, damping, budget) for table in symmetric]


def _matched(tables: Sequence[np.ndarray], models: int, groups: int, own: np.ndarray | None) -> np.ndarray:
    """The group of every model in every set, `(sets, models) int64`."""
    inner = [table.reshape(models, groups, -1, models, groups, len(table) // (models * groups)) for table in tables]
    outer = None if own is None else own.reshape(models, groups, models, groups)
    scores = {
        (a, b): score_groups(None if outer is None else outer[a, :, b], [table[a, :, :, b] for table in inner])[0]
        for a, b in combinations(range(models), 2)
    }
    return np.stack(match_cycle_consistent(scores, models), axis=1)


def _zip_sets(table: np.ndarray, matched: np.ndarray, damping: float, budget: float) -> Zipped:
    sets, models = matched.shape
    units = len(table) // matched.size
    merged = np.empty(len(table), np.int64)
    for number, groups in enumerate(matched):
        starts = (np.arange(models) * sets + groups) * units
        members = np.add.outer(starts, np.arange(units)).reshape(-1)
        zipped = zip_units(table[np.ix_(members, members)], models, damping=damping, budget=budget)
        merged[members] = number * units + zipped.groups
    return Zipped(merged, sets * units)


class _Columns:
    """What is merged so far, on a table that it overwrites.

    A merged unit stays where its first unit was; the other's row and column become -inf.

    Similarities only ever fall. So the best that a row held when it was last looked at bounds what it holds now, and
    only the row with the highest bound need be looked at again.
    """

    def __init__(self, table: np.ndarray, models: int, keep: int, budget: int) -> None:
        self.home = np.arange(len(table))
        self._table = table
        np.fill_diagonal(self._table, -np.inf)
        self._partner = self._table.argmax(axis=1)
        self._bound = self._table.max(axis=1)
        self._owners = np.repeat(np.eye(models, dtype=bool), len(table) // models, axis=0)
        self._left = np.full(models, budget)
        self._open = np.zeros(len(table), bool)
        self._keep = keep

    def most_alike(self) -> tuple[int, int]:
        """The most alike of all pairs that may be merged."""
        # With all merged units begun, a pair must hold one of them.
        full = np.count_nonzero(self._open) == self._keep
        rows = np.flatnonzero(self._open) if full else self.home
        while True:
            row = int(rows[self._bound[rows].argmax()])
            assert self._bound[row] > -np.inf, "the rule above always leaves a pair"
            partner = int(self._partner[row])
            if self._table[row, partner] == self._bound[row] and not self._spent(row)[partner]:
                return min(row, partner), max(row, partner)
            allowed = np.where(self._spent(row), -np.inf, self._table[row])
            self._partner[row] = allowed.argmax()
            self._bound[row] = allowed.max()

    def merge(self, first: int, second: int, damping: float) -> None:
        least = np.minimum(self._table[first], self._table[second])
        self._table[first] = self._table[:, first] = damping * np.maximum(least, 0) + np.minimum(least, 0)
        self._table[second] = self._table[:, second] = self._bound[second] = -np.inf
        self._left -= self._owners[first] & self._owners[second]
        self._owners[first] |= self._owners[second]
        self._open[[first, second]] = True, False
        self.home[self.home == second] = first

    def _spent(self, row: int) -> np.ndarray:
        """Which columns share with this row a model that may not be merged within itself any more."""
        return np.asarray(self._owners[:, self._owners[row] & (self._left == 0)].any(axis=1))


def _symmetric(similarity: np.ndarray, parts: int) -> np.ndarray:
    """The table as float64, exactly symmetric. Raises InvalidData where it is not nearly so, or not of these parts."""
    table = finite(similarity, 2)
    if table.shape != (len(table),) * 2 or parts < 1 or len(table) % parts:
        raise InvalidData(f"the similarity is {table.shape}; expected a square of {parts} equal parts")
    if np.abs(table - table.T).max() > ASYMMETRY * np.abs(table).max():
        raise InvalidData("the similarity is not symmetric; expected that of all units of all models with each other")
    symmetric: np.ndarray = (table + table.T) / 2
    return symmetric


def _within(columns: int, models: int, keep: int, budget: float) -> int:
    """How many merges each model may have within itself. Raises InvalidData where they cannot suffice."""
    if not 1 <= keep <= columns or not 0 <= budget <= 1:
        raise InvalidData(
            f"{keep} units are to be kept on a budget of {budget}; expected 1 to {columns}, the units of all models, "
            "and a budget from 0 to 1"
        )
    # Shares such as 0.29 of 100 must not lose a merge to rounding.
    within = int((columns - keep) * budget / models + 1e-9)
    needed = columns // models - keep
    if within < needed:
        raise InvalidData(
            f"to keep {keep} units, {needed} must be merged within each model; a budget of {budget} allows {within}: "
            "raise the one or the other"
        )
    return within
