"""Intervals for a share and for a paired difference, at a fixed number of rows.

They hold when one looks once. Intervals that hold at every look belong to the experiments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Interval of a share (Wilson 1927, JASA 22:209). Without trials nothing is known: [0, 1]."""
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(
    first: npt.NDArray[np.generic], second: npt.NDArray[np.generic], confidence: float = 0.95
) -> Interval:
    """Interval of the mean of `first - second`, two scores `(rows,)` of the same rows (normal approximation).

    Pairing removes what the rows have in common: two models that err on the same rows need far fewer of them.
    """
    differences = first.astype(np.float64) - second.astype(np.float64)
    mean = float(differences.mean())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * float(differences.std(ddof=1)) / sqrt(len(differences)) if len(differences) > 1 else float("inf")
    return Interval(mean, mean - half, mean + half)
