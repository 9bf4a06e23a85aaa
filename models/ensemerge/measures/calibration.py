"""Whether a probability means what it says: the reliability diagram and its summary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemerge.measures.scores import Floats, Integers, correct


@dataclass(frozen=True)
class Reliability:
    """Mean confidence and accuracy of the rows of each bin, `(bins,) float64`, and their number, `(bins,) int64`."""

    confidence: Floats
    accuracy: Floats
    rows: Integers

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by rows."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((gaps * self.rows).sum() / self.rows.sum())


def reliability(probabilities: Floats, labels: Integers, bins: int = 15) -> Reliability:
    """Bins of equal mass by confidence (Roelofs et al. 2022, arXiv 2012.08668: less biased than equal width).

    Rows are sorted by the probability of their predicted class and cut into `bins` runs; with fewer rows than
    bins there is one bin for each row.
    """
    confidence = probabilities.max(axis=-1).astype(np.float64)
    order = np.argsort(confidence, kind="stable")
    hits = correct(probabilities, labels)[order]
    runs = np.array_split(np.arange(len(order)), min(bins, max(1, len(order))))
    return Reliability(
        confidence=np.array([confidence[order][run].mean() for run in runs]),
        accuracy=np.array([hits[run].mean() for run in runs]),
        rows=np.array([len(run) for run in runs]),
    )
