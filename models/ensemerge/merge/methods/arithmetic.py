"""Task arithmetic and everything that refines it: thin out the task vectors, find a consensus, add it to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemerge.merge.method import Block, Grain, Survey
from ensemerge.merge.methods.consensus import Consensus
from ensemerge.merge.methods.sparsify import Sparsify


@dataclass(frozen=True)
class TaskArithmetic:
    """`θ_0 + λ · consensus(sparsify(τ_1 … τ_n))` (Ilharco et al. 2023, arXiv 2212.04089, and its refinements)."""

    sparsify: Sparsify
    consensus: Consensus
    scale: float
    models: int

    @property
    def grain(self) -> Grain:
        return self.sparsify.grain

    @property
    def surveys(self) -> Sequence[Survey]:
        return self.sparsify.surveys

    @property
    def propagates(self) -> bool:
        return not self.surveys  # a drop multiplies, and zero times NaN is NaN

    @property
    def buffers(self) -> int:
        # The task vectors, the base, one being thinned out (with ranks or draws), the vote, the sum and its divisor.
        return self.models + 7

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        merged = self.consensus(self.sparsify(block, block.deltas(), findings))
        return torch.add(block.base, merged, alpha=self.scale, out=merged)
