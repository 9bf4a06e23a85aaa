"""How weighted task vectors become one: their sum, or the sum or mean of those that agree with an elected sign.

All of these overwrite the task vectors that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ensemerge.merge.methods.averaging import weighted_sum

Elect = Callable[[torch.Tensor], torch.Tensor]


class Consensus(Protocol):
    """What many task vectors have in common."""

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """The merged task vector; overwrites the deltas."""
        ...


def sign(total: torch.Tensor) -> torch.Tensor:
    """The elected sign: that of the sum, 0 where it is 0, so that nothing is kept there.

    Yadav et al. 2023, arXiv 2306.01708, algorithm 1: the elected sign is `sgn(Σ τ̂)`. Their code gives
    such positions the majority sign of the whole model, which the algorithm does not have and which would let
    unrelated tensors decide.
    """
    return total.sign_()


def elected_sign(deltas: Sequence[torch.Tensor], elect: Elect) -> torch.Tensor:
    """The sign that `elect` gives the sum of the task vectors, which stay as they are."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return elect(total)


def agreement(deltas: Sequence[torch.Tensor], elected: torch.Tensor) -> Iterator[torch.Tensor]:
    """`|τ_k|` where τ_k has the elected sign, else 0, model by model; overwrites the deltas. Zeros agree with nothing.

    The product with the elected sign is positive where they agree: arithmetic, because masks of booleans cost several
    times as much.
    """
    return (delta.mul_(elected).clamp_(min=0) for delta in deltas)


@dataclass(frozen=True)
class Sum:
    """`Σ w_k τ_k`: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089)."""

    weights: Sequence[float]

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        return weighted_sum(deltas, self.weights)


def weighted(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> list[torch.Tensor]:
    """`w_k τ_k`; overwrites the deltas."""
    return [delta if weight == 1 else delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]


@dataclass(frozen=True)
class AgreeingSum:
    """`Σ w_k τ_k` over the models whose `w_k τ_k` has the sign that `elect` gives their sum."""

    weights: Sequence[float]
    elect: Elect = sign

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        votes = weighted(deltas, self.weights)
        elected = elected_sign(votes, self.elect)
        total = torch.zeros_like(elected)
        for agreed in agreement(votes, elected):
            total.add_(agreed)
        return total.mul_(elected)


@dataclass(frozen=True)
class AgreeingMean:
    """The disjoint merge of TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): the mean of those that agree.

    `Σ w_k τ_k / Σ |w_k|` over the models whose `w_k τ_k` has the elected sign. The paper has no weights; a negative
    weight takes a task away, so that its magnitude is its share.
    """

    weights: Sequence[float]

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        votes = weighted(deltas, self.weights)
        elected = elected_sign(votes, sign)
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        shares = [abs(weight) for weight in self.weights]
        for agreed, share in zip(agreement(votes, elected), shares, strict=True):
            total.add_(agreed)
            divisor.add_(agreed.sign_(), alpha=share)
        # Where no one agrees the sum is zero too. Any other divisor is at least the smallest share.
        return total.mul_(elected).div_(divisor.clamp_(min=min(filter(None, shares), default=1.0)))
