"""Merges on a sphere: SLERP and its kin.

Every point that they visit lies in the span of the models, so the merge is a weighted sum after all, and its
coefficients follow from the models' inner products, the Gram matrix. Where the method has an origin, the vectors are
the task vectors instead of the models.

A rule maps a Gram matrix `(models, models, …) float64` to coefficients `(models, …) float64`; further axes, if there
are any, are rows or columns that are merged each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch

from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.methods.averaging import weighted_sum

Rule = Callable[[np.ndarray], np.ndarray]

PARALLEL = 0.9995  # |cos Ω| above which an arc is as good as its chord
# A mean of unit vectors that is shorter than this is what bfloat16 leaves of directions that cancel.
CANCELLED = 1e-3


def slerp(gram: np.ndarray, t: float) -> np.ndarray:
    """`sin((1 − t)Ω)/sin Ω, sin(tΩ)/sin Ω`, Ω the angle between two models (Shoemake 1985, doi 10.1145/325334.325242).

    Nearly parallel or opposite models (|cos Ω| > 0.9995) and zeros are interpolated linearly.
    """
    norms = np.sqrt(gram[0, 0]) * np.sqrt(gram[1, 1])
    cosine = np.where(norms > 0, gram[0, 1] / np.where(norms > 0, norms, 1), 1)
    return arc(cosine, np.abs(cosine) > PARALLEL, t)


def arc(cosine: np.ndarray, linear: np.ndarray, t: float) -> np.ndarray:
    """The coefficients of SLERP for these cosines, and those of linear interpolation where `linear`."""
    angle = np.arccos(np.where(linear, 0, np.clip(cosine, -1, 1)))
    spherical = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    chord = np.stack([np.full_like(angle, 1 - t), np.full_like(angle, t)])
    return np.where(linear, chord, spherical)


def multislerp(gram: np.ndarray, weights: Sequence[float], eps: float) -> np.ndarray:
    """One step of the weighted mean on the sphere, times the weighted mean of the norms; two models give SLERP.

    With `u_k = x_k/‖x_k‖` and m the direction of `Σ w_k u_k`: the logarithms `θ_k/sin θ_k (u_k − cos θ_k m)` at m are
    averaged and the exponential map leads back (Goddard 2025, the blog post "Multi-SLERP"; the map: Buss & Fillmore
    2001, doi 10.1145/502122.502124). Where `Σ w_k u_k` is shorter than `eps`, or than a thousandth of `Σ |w_k|`, no
    direction is left but that of rounding: linear then.
    """
    shares = np.asarray(weights, np.float64)
    norms = np.sqrt(np.diag(gram))
    units = unit_gram(gram, norms)
    mean = shares * (norms > 0)
    length = length_of(units, mean)
    if length < max(eps, CANCELLED * float(np.abs(mean).sum())) or not length:
        return shares
    mean /= length
    return stretched(settled(units, mean, shares * (norms > 0), 1, 0), norms, float(shares @ norms))


def karcher(gram: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The Karcher mean of the directions, times the mean of the norms (Karcher 1977; Buss & Fillmore 2001).

    Steps like those of `multislerp`, with uniform weights, until one is shorter than `tol`. Zeros have no direction and
    take no part in it. Where the directions cancel, so that their mean is shorter than `tol` or than a thousandth, no
    direction is left but that of rounding: linear then.
    """
    norms = np.sqrt(np.diag(gram))
    units = unit_gram(gram, norms)
    shares = (norms > 0) / max(1, int(np.count_nonzero(norms)))
    mean, length = shares, length_of(units, shares)
    if length < max(tol, CANCELLED):
        return np.full(len(norms), 1 / len(norms))
    return stretched(settled(units, mean / length, shares, max_iter, tol), norms, float(norms.mean()))


def settled(units: np.ndarray, mean: np.ndarray, shares: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The direction that steps from `mean` lead to, all in coefficients of the unit vectors."""
    for _ in range(max_iter):
        tangent = _tangent(units, mean, shares)
        if length_of(units, tangent) < tol:
            break
        mean = moved(units, mean, tangent)
    return mean


def unit_gram(gram: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """The inner products of the unit vectors; zeros stay zeros."""
    lengths = np.where(norms > 0, norms, 1)
    units: np.ndarray = gram / np.outer(lengths, lengths)
    return units


def length_of(units: np.ndarray, coefficients: np.ndarray) -> float:
    """The length of `Σ c_k u_k`."""
    # A Gram matrix in floating point can be a little less than positive.
    return float(np.sqrt(max(0.0, coefficients @ units @ coefficients)))


def _tangent(units: np.ndarray, mean: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """`Σ w_k θ_k/sin θ_k (u_k − cos θ_k m)`, as coefficients of the u_k. What lies opposite m has no direction."""
    cosines = np.clip(units @ mean, -1, 1)
    angles = np.arccos(cosines)
    sines = np.sin(angles)
    opposite = (sines < 1e-6) & (cosines < 0)
    stretch = np.where(sines < 1e-6, 1, angles / np.where(sines < 1e-6, 1, sines)) * shares * ~opposite
    tangent: np.ndarray = stretch - (stretch @ cosines) * mean
    return tangent


def moved(units: np.ndarray, mean: np.ndarray, tangent: np.ndarray) -> np.ndarray:
    """The exponential map at the mean, and back to length one."""
    length = length_of(units, tangent)
    end = np.cos(length) * mean + np.sinc(length / np.pi) * tangent
    scaled: np.ndarray = end / length_of(units, end)
    return scaled


def stretched(direction: np.ndarray, norms: np.ndarray, length: float) -> np.ndarray:
    """Coefficients of the unit vectors, as coefficients of the vectors, for a merge of this length."""
    return direction * length / np.where(norms > 0, norms, 1)


def vectors(block: Block) -> list[torch.Tensor]:
    """What is merged on the sphere: task vectors where there is an origin, else the models; copies."""
    return block.deltas() if block.has_base else block.models()


def squared_buffers(models: int) -> int:
    """The buffers of a method that takes inner products: the vectors, once more in float64, and their scratch."""
    return 3 * models + 4


def inner_products(rows: Sequence[torch.Tensor], dim: tuple[int, ...]) -> np.ndarray:
    """`⟨x_j, x_k⟩` summed over the axes `dim`, `(models, models, …) float64`, computed in float64.

    float32 would lose the squares of updates below 1e-22, and the little that is left where directions nearly cancel.
    """
    products: dict[tuple[int, int], np.ndarray] = {}
    wide = [row.double() for row in rows]
    for j, k in combinations_with_replacement(range(len(rows)), 2):
        # One pass where all is summed; along an axis the products must be there before they are.
        whole = wide[j].ndim == 1
        products[j, k] = (wide[j].dot(wide[k]) if whole else wide[j].mul(wide[k]).sum(dim)).cpu().numpy()
    return np.array([[products[min(j, k), max(j, k)] for k in range(len(rows))] for j in range(len(rows))])


@dataclass(frozen=True)
class Arc:
    """The coefficients that a rule draws from the inner products over the whole tensor, `(models,) float64`."""

    rule: Rule
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return inner_products([row.reshape(-1) for row in vectors(block)], (0,))

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> np.ndarray:
        return self.rule(total)


@dataclass(frozen=True)
class ColumnArcs:
    """The coefficients that a rule draws from the inner products along axis 0, `(models, columns) float64`."""

    rule: Rule
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        rows = vectors(block)
        if len(rows[0]) == 1 and rows[0].numel() == block.place.numel:
            # A vector has one axis, which is the first as well as the last.
            return inner_products(rows, (0, 1))[:, :, None]
        return inner_products(rows, (0,))

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> np.ndarray:
        return self.rule(total)


@dataclass(frozen=True)
class SphericalSum:
    """One arc for the whole tensor: SLERP, flattened NuSLERP, multi-SLERP, the Karcher mean."""

    rule: Rule
    models: int
    grain: Grain = Grain.ELEMENT
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return (Arc(self.rule),)

    @property
    def buffers(self) -> int:
        return squared_buffers(self.models)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return _from_origin(block, weighted_sum(vectors(block), findings[0].tolist()))


@dataclass(frozen=True)
class RowSum:
    """One arc for each row, the vectors along the last axis: NuSLERP that does not flatten."""

    rule: Rule
    models: int
    grain: Grain = Grain.ROW
    surveys: Sequence[Survey] = ()
    propagates: bool = False

    @property
    def buffers(self) -> int:
        return squared_buffers(self.models)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        rows = vectors(block)
        coefficients = self.rule(inner_products(rows, (1,)))
        return _from_origin(block, _scaled_sum(rows, coefficients[:, :, None]))


@dataclass(frozen=True)
class ColumnSum:
    """One arc for each column, the vectors along axis 0: what mergekit's `nuslerp_row_wise` means."""

    rule: Rule
    models: int
    grain: Grain = Grain.FILTER
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return (ColumnArcs(self.rule),)

    @property
    def buffers(self) -> int:
        return squared_buffers(self.models)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return _from_origin(block, _scaled_sum(vectors(block), findings[0][:, None, :]))


def _from_origin(block: Block, merged: torch.Tensor) -> torch.Tensor:
    return merged.add_(block.base) if block.has_base else merged


def _scaled_sum(rows: Sequence[torch.Tensor], coefficients: np.ndarray) -> torch.Tensor:
    """`Σ c_k x_k` with coefficients that broadcast; overwrites the first."""
    scales = torch.from_numpy(coefficients).to(rows[0])
    merged = rows[0].mul_(scales[0])
    for row, scale in zip(rows[1:], scales[1:], strict=True):
        merged.addcmul_(row, scale)
    return merged
