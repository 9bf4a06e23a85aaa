"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import torch

from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.methods.consensus import Elect, agreement, elected_sign, sign
from ensemerge.merge.methods.sparsify import at_least
from ensemerge.merge.selection import order_statistics


def variance(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance over the models, element by element; exactly 0 where all are equal. Overwrites the vectors.

    In float32 it is 0 too where models differ by less than 1e-22: the selection compares float32 numbers anyway.
    """
    # Measured from the first model, so that equal ones differ by exactly 0 from their mean.
    first = vectors[0].clone()
    mean = torch.zeros_like(first)
    for vector in vectors:
        mean.add_(vector.sub_(first), alpha=1 / len(vectors))
    squares = torch.zeros_like(first)
    for vector in vectors:
        squares.addcmul_(vector.sub_(mean), vector)
    return squares.div_(len(vectors))


Shares = Callable[[np.ndarray], list[float]]


def energies(squares: np.ndarray) -> list[float]:
    """Each model's part of the mean squares; equal parts where all task vectors are zero."""
    total = float(squares.sum())
    return (squares / total).tolist() if total > 0 else [1 / len(squares)] * len(squares)


@dataclass(frozen=True)
class Variances:
    """The elements' variances, the scores of the selection."""

    def __call__(self, block: Block) -> Iterable[torch.Tensor]:
        return (variance(block.models()),)


@dataclass(frozen=True)
class Varying:
    """How many elements are not the same in all models."""

    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return np.array(torch.count_nonzero(variance(block.models())).item(), np.int64)

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> int:
        return int(total)


@dataclass(frozen=True)
class TopOfVarying:
    """The rank of the least variance that is selected: `⌊select_topk · varying⌋`."""

    select_topk: float

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        return (floor(self.select_topk * findings[0]),)


@dataclass(frozen=True)
class Energies:
    """The models' shares, from the mean squares of what the selection left of each."""

    select: Select
    shares: Shares
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        # In float64: the squares of updates below 1e-22 are zero in float32.
        return np.array([float(delta.double().square_().sum()) for delta in self.select(block, findings)], np.float64)

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> list[float]:
        return self.shares(total / numel)


@dataclass(frozen=True)
class SelectAll:
    surveys: tuple[Survey, ...] = ()

    def __call__(self, block: Block, findings: Sequence[Any]) -> list[torch.Tensor]:
        return block.deltas()


@dataclass(frozen=True)
class SelectVarying:
    """The task vectors where the models vary most, 0 elsewhere; elements that tie with the last are all kept."""

    select_topk: float

    @property
    def surveys(self) -> tuple[Survey, ...]:
        return (Varying(), *order_statistics(Variances(), TopOfVarying(self.select_topk), Scope.TENSOR))

    def __call__(self, block: Block, findings: Sequence[Any]) -> list[torch.Tensor]:
        mask = at_least(variance(block.models()), float(findings[1][0, 0])).sign_()
        return [delta.mul_(mask) for delta in block.deltas()]


Select = SelectAll | SelectVarying


TINY = float(np.finfo(np.float32).tiny)


def erased_mean(deltas: Sequence[torch.Tensor], shares: Sequence[float], elect: Elect, least: float) -> torch.Tensor:
    """`Σ η_k τ_k / Σ η_k` over the models whose sign is the elected one of `Σ τ_k`; 0 where there is none.

    The divisor is at least `least`. Overwrites the deltas.
    """
    elected = elected_sign(deltas, elect)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for agreed, share in zip(agreement(deltas, elected), shares, strict=True):
        total.add_(agreed, alpha=share)
        divisor.add_(agreed.sign_(), alpha=share)
    return total.mul_(elected).div_(divisor.clamp_(min=least))


@dataclass(frozen=True)
class Sce:
    """Select, calculate, erase (Wan et al. 2024, arXiv 2408.07990), each tensor by itself."""

    select: Select
    models: int
    shares: Shares = energies
    elect: Elect = sign
    least: float = TINY
    grain: Grain = Grain.ELEMENT
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return (*self.select.surveys, Energies(self.select, self.shares))

    @property
    def buffers(self) -> int:
        return 2 * self.models + 7

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        return erased_mean(self.select(block, findings), findings[-1], self.elect, self.least).add_(block.base)
