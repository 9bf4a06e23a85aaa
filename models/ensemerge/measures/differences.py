"""How far two arrays are apart: what every proof of equality measures."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


def largest_difference(got: Array, expected: Array) -> float:
    """The largest absolute difference; infinite where shapes differ, or where one side alone is NaN or infinite.

    Two NaNs, and two infinities of one sign, are alike. Never NaN itself, so that a maximum over several calls holds.
    """
    if got.shape != expected.shape:
        return math.inf
    first, second = got.astype(np.float64), expected.astype(np.float64)
    alike = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        gaps = np.where(alike, 0.0, np.abs(first - second))
    return float(np.where(np.isnan(gaps), math.inf, gaps).max(initial=0.0))


def relative_difference(got: Array, expected: Array) -> float:
    """The largest difference, relative to the largest finite magnitude that was expected."""
    magnitudes = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    return largest_difference(got, expected) / (float(magnitudes.max(initial=0.0)) or 1.0)
