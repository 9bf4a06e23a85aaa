"""Combiners in numpy: from what each member says to one answer. The oracle for every compiled form.

`(members, rows, classes) float` in, `(rows, classes) float` out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ensemerge.measures.scores import Floats, softmax

Combiner = Callable[[Floats], Floats]

# What the answer is called, compiled or combined.
OUTPUT = "probabilities"


def mean_probability(probabilities: Floats) -> Floats:
    """The linear opinion pool (Stone 1961): the mean of the members' probabilities."""
    return np.asarray(probabilities.mean(axis=0))


COMBINERS: dict[str, Combiner] = {"mean_probability": mean_probability}


def to_probabilities(output: Floats, scale: str) -> Floats:
    """A member's output on the scale of probabilities, `scale` being what it is on (`logits` or `probabilities`).

    Half precision is widened to float32: its softmax would lose what the member knew.
    """
    wide = output.astype(np.result_type(output.dtype, np.float32), copy=False)
    return softmax(wide) if scale == "logits" else wide


def combine(outputs: Sequence[Floats], scales: Sequence[str], combiner: Combiner) -> Floats:
    """The answer of an ensemble from its members' outputs, each `(rows, classes)` on its own scale."""
    return combiner(np.stack([to_probabilities(*pair) for pair in zip(outputs, scales, strict=True)]))
