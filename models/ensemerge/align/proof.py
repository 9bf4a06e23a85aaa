"""Proof that moving units has not changed what a network computes: both run on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ensemerge.graph.permute import move, random_permutations
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import held_tensors, with_weights
from ensemerge.graph.symmetry import Permutations, Symmetry
from ensemerge.measures.differences import relative_difference
from ensemerge.repository import Check

# Sums of float32 in another order differ by some 1e-7 of the largest answer, in networks of some fifty layers by 1e-6.
BOUND = 1e-5
BOUND_FLOAT16 = 1e-2


def weights_of(model: ir.Model, symmetry: Symmetry) -> dict[str, np.ndarray]:
    """The weights whose axes the symmetry knows."""
    held = held_tensors(model)
    return {name: held[name].numpy() for name in symmetry.weights}


def permuted(model: ir.Model, symmetry: Symmetry, permutations: Permutations) -> ir.Model:
    """The network with its units in new places."""
    return with_weights(model, move(symmetry, weights_of(model, symmetry), permutations))


def prove_same(original: ir.Model, aligned: ir.Model, feeds: Sequence[Arrays], name: str = "aligned") -> Check:
    """The largest difference of an output, next to the largest output. Raises CheckFailed above the bound."""
    before, after = Runner(original), Runner(aligned)
    worst = 0.0
    for arrays in feeds:
        expected, got = before.run(arrays), after.run(arrays)
        outputs = zip(expected.values(), got.values(), strict=True)
        worst = max([worst, *(_difference(theirs, ours) for ours, theirs in outputs)])
    half = any(
        tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for tensor in held_tensors(original).values()
    )
    rows = sum(len(next(iter(arrays.values()))) for arrays in feeds)
    detail = f"largest relative difference of an output from the original network's, on {rows} rows,"
    return Check.measured(name, worst, BOUND_FLOAT16 if half else BOUND, detail)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    """How far numbers are apart; texts are the same or infinitely far."""
    if expected.dtype.kind in "OSU":
        return 0.0 if np.array_equal(got, expected) else math.inf
    return relative_difference(got, expected)


def prove_symmetry(model: ir.Model, symmetry: Symmetry, feeds: Sequence[Arrays], seed: int = 0) -> Check:
    """Move the units by a random element of the group and compare. Raises CheckFailed where the network changes."""
    drawn = random_permutations(symmetry, np.random.default_rng(seed))
    return prove_same(model, permuted(model, symmetry, drawn), feeds, "symmetry")
