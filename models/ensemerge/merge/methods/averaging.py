"""Weighted sums with coefficients that are known beforehand: linear, soups, averages of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemerge.errors import InvalidSpec
from ensemerge.merge.method import Block, Grain, Survey

Coefficients = Sequence[float]


def weighted_sum(vectors: Iterable[torch.Tensor], coefficients: Coefficients) -> torch.Tensor:
    """`Σ c_k x_k`; overwrites the first tensor."""
    pairs = iter(zip(vectors, coefficients, strict=True))
    first, coefficient = next(pairs)
    total = first if coefficient == 1 else first.mul_(coefficient)
    for vector, coefficient in pairs:
        total.add_(vector, alpha=coefficient)
    return total


def normalized(weights: Coefficients) -> list[float]:
    """`w_k / Σ w` (Wortsman et al. 2022, arXiv 2203.05482). Raises InvalidSpec where the weights cancel."""
    total = sum(weights)
    # Against the weights' own size: small ones are as good as large ones.
    if abs(total) <= 1e-8 * sum(map(abs, weights)):
        raise InvalidSpec(
            f"the weights {list(weights)} sum to {total}; expected a sum that is not zero: "
            "change a weight, or set `normalize: false` where the method has it"
        )
    return [weight / total for weight in weights]


def uniform(models: int) -> list[float]:
    """The uniform soup: every model counts the same (Wortsman et al. 2022, arXiv 2203.05482)."""
    return [1 / models] * models


def swa(checkpoints: int, start: int) -> list[float]:
    """Stochastic weight averaging: the mean of all checkpoints from number `start` on, counted from 0.

    Izmailov et al. 2018, arXiv 1803.05407. Raises InvalidSpec where no checkpoint is left.
    """
    if start >= checkpoints:
        raise InvalidSpec(f"`start` is {start}, but there are {checkpoints} checkpoints: expected a smaller number")
    return [0.0] * start + uniform(checkpoints - start)


def ema(checkpoints: int, beta: float) -> list[float]:
    """Exponential moving average: `e_0 = θ_0, e_k = β e_{k−1} + (1 − β) θ_k`, after the last checkpoint.

    Polyak & Juditsky 1992 average iterates; the exponential form is the usual one in training.
    """
    decays = [beta ** (checkpoints - 1 - k) for k in range(checkpoints)]
    return [decays[0]] + [(1 - beta) * decay for decay in decays[1:]]


def lawa(checkpoints: int, k: int) -> list[float]:
    """Latest weight averaging: the mean of the last `k` checkpoints (Kaddour 2022, arXiv 2209.14981).

    Raises InvalidSpec where there are fewer.
    """
    if k > checkpoints:
        raise InvalidSpec(f"`k` is {k}, but there are {checkpoints} checkpoints: expected at most as many")
    return [0.0] * (checkpoints - k) + uniform(k)


@dataclass(frozen=True)
class WeightedSum:
    """A sum with coefficients that are known beforehand."""

    coefficients: Coefficients
    grain: Grain = Grain.ELEMENT
    surveys: Sequence[Survey] = ()
    buffers: int = 2
    propagates: bool = True

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        # Models of coefficient 0 too: their NaN must be seen, and zero times NaN is NaN.
        return weighted_sum((block.model(k) for k in range(block.count)), self.coefficients)
