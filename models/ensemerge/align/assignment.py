"""Which unit belongs to which: exact assignments on tables of similarity, one to one.

Two models: one linear assignment (Ainsworth et al. 2023, arXiv 2209.04836, section 3). Units that lie in groups, such
as attention heads: assignments within an assignment. More than two models: maps into one common order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from ensemerge.errors import InvalidData

# What a sum must gain, relative to the magnitudes that it is made of, to be more than rounding.
PROGRESS = 1e-12


def assign(similarity: np.ndarray) -> np.ndarray:
    """The assignment with the largest sum, `(units,) int64`: entry i is the column that belongs to row i.

    `similarity` is `(units, units)`. Exact. Raises InvalidData.
    """
    table = finite(similarity, 2)
    _expect_shape(table, (len(table),) * 2, "the similarity")
    columns: np.ndarray = linear_sum_assignment(table, maximize=True)[1]
    return columns.astype(np.int64)


def assign_groups(own: np.ndarray | None, inner: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Assign groups and, in them, their units, so that the sum of all similarities is the largest. Exact.

    `own` is `(groups, groups)`, what the groups have in common as such; each of `inner` is
    `(groups, units, groups, units)`, one table for each kind of unit that moves along with the groups (as queries and
    values do with their heads). Returns which group of the second model belongs to each group of the first,
    `(groups,) int64`, and for each of `inner` which of that group's units belongs to each unit,
    `(groups, units) int64`. Raises InvalidData.
    """
    scores, nested = score_groups(own, inner)
    groups = assign(scores)
    return groups, [units[np.arange(len(groups)), groups] for units in nested]


def score_groups(own: np.ndarray | None, inner: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """What matching each pair of groups is worth, `(groups, groups) float64`, and the assignments that give it.

    Arguments as for `assign_groups`. An assignment is `(groups, groups, units) int64`, its last axis the units of the
    row's group. Raises InvalidData.
    """
    tables = [finite(table, 4) for table in inner]
    if own is not None:
        scores = finite(own, 2).copy()
    elif tables:
        scores = np.zeros((len(tables[0]),) * 2)
    else:
        raise InvalidData("there is nothing to match groups by; expected a table of the groups or of their units")
    groups = len(scores)
    _expect_shape(scores, (groups, groups), "the groups' own similarity")
    nested = []
    for table in tables:
        _expect_shape(table, (groups, table.shape[1]) * 2, "the similarity of the groups' units")
        nested.append(np.array([[assign(table[row, :, column]) for column in range(groups)] for row in range(groups)]))
        scores += _worth(table.swapaxes(1, 2), nested[-1])
    return scores, nested


def match_cycle_consistent(similarities: Mapping[tuple[int, int], np.ndarray], models: int) -> list[np.ndarray]:
    """Bring several models into one common order: each one's unit at every place, `(units,) int64`.

    `similarities` holds `(units, units)` for every pair of models (a, b), a < b, with a's units as rows. The maps aim
    at the largest sum over all pairs (`total_similarity`) and, all into one order, agree along every cycle. The
    common order is that of model 0, so its map is the identity.

    With three models or more the problem is hard. One model at a time is therefore assigned anew, exactly, to all the
    others, until none gains; it starts from every model in turn as the one that all others follow, and the best end
    counts. Raises InvalidData.
    """
    tables = _both_ways(similarities, models)
    ends = [_settled(tables, _following(tables, leader, models)) for leader in range(models)]
    best = max(ends, key=lambda maps: total_similarity(similarities, maps))
    order = np.argsort(best[0])
    return [units[order] for units in best]


def total_similarity(similarities: Mapping[tuple[int, int], np.ndarray], maps: Sequence[np.ndarray]) -> float:
    """The similarity of all units that share a place, summed over all pairs of models."""
    return float(sum(table[maps[first], maps[second]].sum() for (first, second), table in similarities.items()))


def finite(similarity: np.ndarray, axes: int) -> np.ndarray:
    """The table as float64. Raises InvalidData where it is none: not as many axes, an empty one, NaN, infinities."""
    if similarity.ndim != axes or not similarity.size or similarity.dtype.kind not in "fiu":
        raise InvalidData(
            f"expected real similarities along {axes} axes, none of them empty; "
            f"got {similarity.dtype} {similarity.shape}"
        )
    if not np.isfinite(similarity).all():
        wrong = int(np.count_nonzero(~np.isfinite(similarity)))
        raise InvalidData(
            f"{wrong} of {similarity.size} similarities are NaN or infinite; "
            "units of zero variance correlate with none: give them 0"
        )
    return similarity.astype(np.float64, copy=False)


def _expect_shape(table: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if table.shape != shape:
        raise InvalidData(f"{what} is {table.shape}; expected {shape}, as many units in both models")


def _worth(similarity: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """The similarity of all assigned units, summed: `(…, units, units)` and `(…, units)` give `(…)`."""
    worth: np.ndarray = np.take_along_axis(similarity, assigned[..., None], axis=-1)[..., 0].sum(axis=-1)
    return worth


def _both_ways(similarities: Mapping[tuple[int, int], np.ndarray], models: int) -> dict[tuple[int, int], np.ndarray]:
    """The tables by (row's model, column's model), all of one shape."""
    pairs = list(combinations(range(models), 2))
    if not pairs or set(similarities) != set(pairs):
        raise InvalidData(
            f"{models} models: expected at least 2, and a similarity for each of the pairs {pairs}; "
            f"got {sorted(similarities)}"
        )
    units = len(similarities[0, 1])
    tables = {}
    for first, second in pairs:
        table = finite(similarities[first, second], 2)
        _expect_shape(table, (units, units), f"the similarity of models {first} and {second}")
        tables[first, second], tables[second, first] = table, np.ascontiguousarray(table.T)
    return tables


def _following(tables: Mapping[tuple[int, int], np.ndarray], leader: int, models: int) -> list[np.ndarray]:
    """Each model assigned to the leader by itself."""
    identity = np.arange(len(tables[0, 1]))
    return [identity if model == leader else assign(tables[leader, model]) for model in range(models)]


def _settled(tables: Mapping[tuple[int, int], np.ndarray], maps: list[np.ndarray]) -> list[np.ndarray]:
    """The maps once no model gains by being assigned anew to all the others."""
    slack = PROGRESS * sum(float(np.abs(table).max()) for table in tables.values()) * len(maps[0])
    waiting = list(range(len(maps)))
    while waiting:
        model = waiting.pop(0)
        others = [other for other in range(len(maps)) if other != model]
        table = np.sum([tables[other, model][maps[other]] for other in others], axis=0)
        units = assign(table)
        if _worth(table, units) > _worth(table, maps[model]) + slack:
            maps = [*maps[:model], units, *maps[model + 1 :]]
            waiting = others
    return maps
