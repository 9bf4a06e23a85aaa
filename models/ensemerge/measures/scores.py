"""How good answers are: accuracy, log-loss, agreement; and the softmax that turns logits into probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]

# A probability of zero for what then happens would cost an infinite log-loss; clipped here it costs 13.8 nats.
SMALLEST_PROBABILITY = 1e-6


def softmax(logits: Floats) -> Floats:
    """Probabilities from logits `(…, classes)`, over the last axis, in the dtype of the input."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def correct(probabilities: Floats, labels: Integers) -> npt.NDArray[np.bool_]:
    """Whether the most probable class is the label, `(rows,) bool`. Of equal classes the first counts."""
    return np.asarray(probabilities.argmax(axis=-1) == labels)


def accuracy(probabilities: Floats, labels: Integers) -> float:
    """Share of rows whose most probable class is the label."""
    return float(correct(probabilities, labels).mean())


def log_losses(probabilities: Floats, labels: Integers) -> npt.NDArray[np.float64]:
    """`-ln p(label)` of each row, `(rows,) float64`, in nats; p is clipped to `SMALLEST_PROBABILITY`..1."""
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.clip(truth, SMALLEST_PROBABILITY, 1.0))


def agreement(first: Floats, second: Floats) -> float:
    """Share of rows on which two models name the same class."""
    return float((first.argmax(axis=-1) == second.argmax(axis=-1)).mean())
