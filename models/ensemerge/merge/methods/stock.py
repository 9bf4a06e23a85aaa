"""Model Stock: how far the mean of fine-tuned models is to be trusted, read off the angles between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.methods.spherical import inner_products, squared_buffers

Trust = Callable[[np.ndarray], np.ndarray]


def trust(gram: np.ndarray) -> np.ndarray:
    """t from the inner products of the task vectors, `(models, models, …)`: the ratio at the mean angle."""
    return ratio(mean_angle(gram), len(gram))


def mean_angle(gram: np.ndarray) -> np.ndarray:
    """The cosine of the mean of the angles between the task vectors; a zero one is orthogonal to all."""
    norms = np.sqrt(np.einsum("kk...->k...", gram))
    angles = [
        np.arccos(np.clip(_ratio(gram[j, k], norms[j] * norms[k]), -1, 1)) for j, k in combinations(range(len(gram)), 2)
    ]
    cosine: np.ndarray = np.cos(np.mean(angles, axis=0))
    return cosine


def ratio(cosine: np.ndarray, models: int) -> np.ndarray:
    """`t = N cos θ / (1 + (N − 1) cos θ)` (Jang et al. 2024, arXiv 2403.19522, equation for N models).

    0, so that the base is kept, at the pole `cos θ = −1/(N − 1)`, past it, and wherever t would be less than −1: such
    angles are noise, and would be answered with an update larger than the models' own.
    """
    denominator = 1 + (models - 1) * cosine
    t = models * cosine / np.where(denominator > 1e-6, denominator, 1)
    return np.where((denominator > 1e-6) & (t >= -1), t, 0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0)
    return quotient


def toward_mean(base: torch.Tensor, models: Sequence[torch.Tensor], t: torch.Tensor | float) -> torch.Tensor:
    """`t · mean(θ_k) + (1 − t) · θ_0`; overwrites the models."""
    mean = models[0]
    for model in models[1:]:
        mean.add_(model)
    # The mean itself first, so that t = 1 gives it exactly.
    return mean.div_(len(models)).sub_(base).mul_(t).add_(base)


@dataclass(frozen=True)
class Ratio:
    """t of the tensor."""

    trust: Trust
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return inner_products([delta.reshape(-1) for delta in block.deltas()], (0,))

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> float:
        return float(self.trust(total))


@dataclass(frozen=True)
class ModelStock:
    """Layer-wise: one t for the tensor."""

    models: int
    trust: Trust = trust
    grain: Grain = Grain.ELEMENT
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return (Ratio(self.trust),)

    @property
    def buffers(self) -> int:
        return squared_buffers(self.models)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return toward_mean(block.base, block.models(), findings[0])


@dataclass(frozen=True)
class FilterStock:
    """Filter-wise: one t for each filter; a vector is one."""

    models: int
    trust: Trust = trust
    grain: Grain = Grain.FILTER
    surveys: Sequence[Survey] = ()
    propagates: bool = False

    @property
    def buffers(self) -> int:
        return squared_buffers(self.models)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        t = self.trust(inner_products(block.deltas(), (1,)))
        return toward_mean(block.base, block.models(), torch.from_numpy(t).to(block.base)[:, None])
