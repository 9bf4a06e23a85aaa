"""Optimal transport between the units of two layers, which may be of different widths (Singh & Jaggi 2019,
arXiv 1910.05653): a plan says which part of each unit of the first goes to each unit of the second.

All units of a layer weigh the same: the rows of a plan `(first, second)` sum to 1/first, its columns to 1/second.
Multiplied by `first` or `second` it averages units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from scipy.special import logsumexp

from ensemerge.align.assignment import assign, finite
from ensemerge.errors import CheckFailed, InvalidData

# Up to here equal shares of all units are assigned one by one: a second or two.
SHARES = 4096
# Up to here the linear program is solved: about ten seconds.
ENTRIES = 400_000

# By how much the regularization is lowered at a time, once rows are right to about this much.
COOLING = 4
ROUGH = 0.1
# What is added to the curvature, relative to a row's sum, and how often a step that goes wrong is halved.
RIDGE = 1e-10
HALVINGS = 40
# The smallest regularization, relative to the range of similarities: below it float64 cannot tell rows' sums.
FINEST = 1e-9


def transport(similarity: np.ndarray) -> np.ndarray:
    """The plan with the largest sum of similarities, `(first, second) float64`, exact.

    `similarity` is `(first, second)`. Every unit is cut into equal shares, as many as make both widths alike, and the
    shares are assigned: of equal widths the plan is `assign`'s. Where that takes more than 4096 shares (widths that
    have little in common, such as 100 and 101) it is a linear program, up to 400 000 pairs of units. Raises
    InvalidData, also for more than these: `sinkhorn` has no limit.
    """
    table = finite(similarity, 2)
    shares = math.lcm(*table.shape)
    if shares <= SHARES:
        return _assigned(table, shares) / shares
    if table.size <= ENTRIES:
        return _programmed(table, shares) / shares
    raise InvalidData(
        f"widths {table.shape}: expected a common multiple up to {SHARES} or a product up to {ENTRIES}; use sinkhorn"
    )


def sinkhorn(
    similarity: np.ndarray, regularization: float, *, tolerance: float = 1e-6, iterations: int = 200
) -> np.ndarray:
    """The plan P that maximises `Σ P·S + regularization·entropy(P)`, `(first, second) float64` (Cuturi 2013,
    arXiv 1306.0895).

    `similarity` is `(first, second)`; a small regularization, in its unit, comes close to `transport`. All sums of rows
    and columns are right to a relative error of `tolerance`.

    Sinkhorn's iteration alone takes tens of thousands of rounds where units are told apart well. Each round is
    therefore followed by a step of Newton's method (Brauer et al. 2017, arXiv 1710.06635), and the regularization is
    lowered to its value by and by. Raises InvalidData, and CheckFailed where `iterations` rounds do not suffice.
    """
    table = finite(similarity, 2)
    if not (0 < regularization < math.inf and 0 < tolerance < 1):
        raise InvalidData(
            f"regularization {regularization}, tolerance {tolerance}: expected a positive number, and one from 0 to 1"
        )
    if regularization < FINEST * float(np.ptp(table)):
        raise InvalidData(
            f"a regularization of {regularization} is lost in similarities from {table.min():.3g} to "
            f"{table.max():.3g}; use transport, which has none"
        )
    if len(table) > table.shape[1]:
        return sinkhorn(table.T, regularization, tolerance=tolerance, iterations=iterations).T
    dual = _Dual(table, max(regularization, float(np.ptp(table))), np.zeros(len(table)))
    while dual.regularization > regularization:
        lower = max(regularization, dual.regularization / COOLING)
        dual = replace(dual.solved(ROUGH, iterations), regularization=lower)
    dual = dual.solved(tolerance, iterations)
    if dual.error > tolerance:
        raise CheckFailed(
            f"after {iterations} iterations the sums of a plan are wrong by {dual.error:.2g} of them; expected "
            f"{tolerance:.2g}: raise the regularization, the tolerance or the iterations",
            difference=dual.error,
            bound=tolerance,
        )
    plan: np.ndarray = np.exp(dual.logarithms)
    return plan


def _assigned(table: np.ndarray, shares: int) -> np.ndarray:
    """The number of shares that go from each unit to each, by assignment."""
    first, second = (shares // width for width in table.shape)
    to = assign(table.repeat(first, axis=0).repeat(second, axis=1))
    plan = np.zeros(table.shape)
    np.add.at(plan, (np.arange(shares) // first, to // second), 1)
    return plan


def _programmed(table: np.ndarray, shares: int) -> np.ndarray:
    """The number of shares that go from each unit to each, by linear programming."""
    first, second = table.shape
    sums = sparse.vstack(
        [
            sparse.kron(sparse.eye_array(first), np.ones((1, second))),
            sparse.kron(np.ones((1, first)), sparse.eye_array(second)),
        ]
    )
    marginals = np.repeat([shares // first, shares // second], [first, second])
    found = linprog(-table.reshape(-1), A_eq=sums.tocsr(), b_eq=marginals, method="highs")
    # Whole marginals have whole solutions at the corners, which is where the simplex method ends.
    plan: np.ndarray = np.round(found.x).reshape(table.shape)
    return plan


@dataclass(frozen=True)
class _Dual:
    """A plan on logarithms, given by a `potential` for each row; each column then has the factor that makes it right.

    How wrong its rows are never grows, neither by Sinkhorn's rounds nor by the steps that are taken beside them.
    """

    table: np.ndarray
    regularization: float
    potential: np.ndarray

    @cached_property
    def logarithms(self) -> np.ndarray:
        """The logarithm of the plan, `(first, second) float64`."""
        raised = (self.table + self.potential[:, None]) / self.regularization
        plan: np.ndarray = raised - logsumexp(raised, axis=0) - math.log(raised.shape[1])
        return plan

    @cached_property
    def excess(self) -> np.ndarray:
        """By how much each row's sum is too large, relative to what it should be; as a logarithm."""
        excess: np.ndarray = logsumexp(self.logarithms, axis=1) + math.log(len(self.table))
        return excess

    @property
    def error(self) -> float:
        return float(np.abs(np.expm1(self.excess)).max())

    @property
    def total_error(self) -> float:
        return float(np.abs(np.expm1(self.excess)).sum())

    def solved(self, tolerance: float, iterations: int) -> _Dual:
        dual = self
        for _ in range(iterations):
            if dual.error <= tolerance:
                break
            dual = dual.moved(-dual.regularization * dual.excess)
            dual = dual.stepped()
        return dual

    def stepped(self) -> _Dual:
        """A step of Newton's method, halved until the total error falls; none where it does not."""
        plan, rows = np.exp(self.logarithms), len(self.table)
        curvature = -plan.shape[1] * plan @ plan.T
        # Potentials may all grow alike; and rows that share no columns have no curvature.
        curvature[np.diag_indices(rows)] += plan.sum(axis=1) + RIDGE / rows
        step = self.regularization * np.linalg.solve(curvature, -np.expm1(self.excess) / rows)
        halved = (self.moved(step / 2**halvings) for halvings in range(HALVINGS))
        return next((dual for dual in halved if dual.total_error < self.total_error), self)

    def moved(self, step: np.ndarray) -> _Dual:
        return replace(self, potential=self.potential + step)
