"""One model for each task out of one merged task vector and a mask: EMR-Merging and TALL masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.methods.averaging import weighted_sum


def unified(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """`τ_uni`: the sign of `Σ τ_k`, the largest magnitude among the task vectors with that sign.

    Huang et al. 2024, arXiv 2405.17461, "elect". The deltas stay as they are.
    """
    elected = torch.stack(list(deltas)).sum(0).sign_()
    largest = torch.zeros_like(elected)
    for delta in deltas:
        torch.maximum(largest, delta * elected, out=largest)
    return largest.mul_(elected)


def mask(delta: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """1 where `τ_k ⊙ τ_uni > 0`, else 0 (EMR's "mask"); overwrites τ_k."""
    return delta.mul_(merged).sign_().clamp_(min=0)


@dataclass(frozen=True)
class Rescalers:
    """EMR's "rescale": `λ_k = Σ |τ_k| / Σ |M_k ⊙ τ_uni|` over the whole model; 1 for a model equal to the base."""

    scope: Scope = Scope.MODEL

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        deltas = block.deltas()
        merged = unified(deltas)
        before = [float(delta.abs().sum()) for delta in deltas]
        after = [float((mask(delta, merged) * merged).abs_().sum()) for delta in deltas]
        return np.array([before, after], np.float64)

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> list[float]:
        return [before / after if after > 0 else 1.0 for before, after in total.T.tolist()]


@dataclass(frozen=True)
class Unified:
    """`θ_0 + τ_uni`: what EMR shares between the tasks, for a task that it does not know."""

    models: int
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = ()
    propagates: bool = False

    @property
    def buffers(self) -> int:
        return 2 * self.models + 4

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return unified(block.deltas()).add_(block.base)


@dataclass(frozen=True)
class Emr:
    """`θ_0 + λ_k M_k ⊙ τ_uni`: the model for task k (Huang et al. 2024, arXiv 2405.17461)."""

    task: int
    models: int
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = (Rescalers(),)
    propagates: bool = False

    @property
    def buffers(self) -> int:
        return 2 * self.models + 4

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        deltas = block.deltas()
        merged = unified(deltas)
        return torch.add(block.base, merged.mul_(mask(deltas[self.task], merged)), alpha=findings[0][self.task])


def tall_mask(delta: torch.Tensor, merged: torch.Tensor, scale: float) -> torch.Tensor:
    """1 where `|τ_k| ≥ λ |τ_MTL − τ_k|`, else 0 (Wang et al. 2024, arXiv 2405.07813)."""
    return (delta.abs() >= (merged - delta).abs_().mul_(scale)).to(delta.dtype)


@dataclass(frozen=True)
class TallMask:
    """`θ_0 + m_k ⊙ τ_MTL`, `τ_MTL = Σ w τ`: the model for task k (Wang et al. 2024, arXiv 2405.07813)."""

    task: int
    weights: Sequence[float]
    scale: float
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = ()
    buffers: int = 6
    propagates: bool = True

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        merged = weighted_sum((block.delta(k) for k in range(block.count)), self.weights)
        return merged.mul_(tall_mask(block.delta(self.task), merged, self.scale)).add_(block.base)
