"""Methods that choose, element by element, whose change to take: NearSwap, Arcee fusion, RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import torch

from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.methods.consensus import Consensus
from ensemerge.merge.selection import order_statistics

Step = Callable[[torch.Tensor, float], torch.Tensor]


def clipped(delta: torch.Tensor, t: float) -> torch.Tensor:
    """`clip(τ, −t, t)`, which NearSwap adds to the base (alchemonaut 2024, model card of QuartetAnemoi-70B-t0.0001).

    The card weighs the other model with `min(1, t/|τ|)`; times τ that is a clipped step. Overwrites τ.
    """
    return delta.clamp_(-t, t)


@dataclass(frozen=True)
class NearSwap:
    """`θ_0 + step(θ_1 − θ_0, t)`: where the models are nearly equal the other one's value, else a step towards it."""

    t: float
    step: Step = clipped
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = ()
    buffers: int = 3
    propagates: bool = False

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return self.step(block.delta(0), self.t).add_(block.base)


Importance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def importance(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`|θ − θ_0| · KL(softmax θ ‖ softmax θ_0)`, the divergence that of the row (Arcee AI's fusion, no paper).

    `(rows, columns)`, not negative. Overwrites the model.
    """
    logits, reference = torch.log_softmax(model, -1), torch.log_softmax(base, -1)
    divergence = logits.exp().mul_(logits - reference).sum(-1, keepdim=True)
    return model.sub_(base).abs_().mul_(divergence.clamp_(min=0))


@dataclass(frozen=True)
class ImportanceScores:
    """The importance of each element's change."""

    rule: Importance

    def __call__(self, block: Block) -> Iterable[torch.Tensor]:
        return (self.rule(block.model(0), block.base),)


@dataclass(frozen=True)
class Quartiles:
    """The ranks of the first quartile, the median and the third: element `⌊q(n − 1)⌋` of those in ascending order."""

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        return [numel - floor(q * (numel - 1)) for q in (0.25, 0.5, 0.75)]


@dataclass(frozen=True)
class ArceeFusion:
    """The changes whose importance is at least `median + 1.5 (Q3 − Q1)` of their tensor; exact quartiles."""

    rule: Importance = importance
    grain: Grain = Grain.ROW
    buffers: int = 7
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return order_statistics(ImportanceScores(self.rule), Quartiles(), Scope.TENSOR)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        low, median, high = findings[-1][0]
        # In float32, as the quartiles are: the other order of rounding could exclude the threshold's own element.
        threshold = median + 1.5 * (high - low)
        chosen = self.rule(block.model(0), block.base).float() >= threshold
        return block.delta(0).mul_(chosen).add_(block.base)


@dataclass(frozen=True)
class SharedMean:
    """Changes of one model alone count `factors[k]` times, those of several are averaged over them.

    Reinforced Agent Merging (arXiv 2601.13572); a change is more than `epsilon`, an absolute magnitude.
    """

    factors: Sequence[float]
    epsilon: float

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        changed = [(delta.abs() > self.epsilon).to(delta.dtype) for delta in deltas]
        counts = torch.stack(changed).sum(0)
        alone = (counts == 1).to(counts.dtype)
        shared = (counts > 1).to(counts.dtype).div_(counts.clamp_(min=1))
        merged = torch.zeros_like(counts)
        for delta, mask, factor in zip(deltas, changed, self.factors, strict=True):
            merged.add_(delta.mul_(mask).mul_(shared.add(alone, alpha=factor)))
        return merged


@dataclass(frozen=True)
class Ram:
    """`θ_0 + SharedMean(τ)` with every factor 1 (RAM, arXiv 2601.13572)."""

    epsilon: float
    models: int
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = ()
    propagates: bool = False

    @property
    def buffers(self) -> int:
        return 2 * self.models + 6

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return SharedMean([1.0] * block.count, self.epsilon)(block.deltas()).add_(block.base)


@dataclass(frozen=True)
class Amplification:
    """`1 + r · min(share_k, alpha)`, the share being the changes that others have too over those that none has."""

    epsilon: float
    r: float
    alpha: float
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        changed = torch.stack([delta.abs() > self.epsilon for delta in block.deltas()]).reshape(block.count, -1)
        counts = changed.sum(0)
        alone, shared = changed & (counts == 1), changed & (counts > 1)
        return torch.stack([shared.sum(1), alone.sum(1)]).cpu().numpy()

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> list[float]:
        # A model that shares all its changes has an infinite share, which alpha bounds.
        return [1 + self.r * min(s / a if a else s * self.alpha, self.alpha) for s, a in total.T.tolist()]


@dataclass(frozen=True)
class RamPlus:
    """RAM+ within each tensor (arXiv 2601.13572): what is a model's alone is amplified, the more it shares."""

    amplification: Amplification
    models: int
    grain: Grain = Grain.ELEMENT
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return (self.amplification,)

    @property
    def buffers(self) -> int:
        return 2 * self.models + 6

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        merge: Consensus = SharedMean(findings[0], self.amplification.epsilon)
        return merge(block.deltas()).add_(block.base)
