"""What of a task vector is kept: the steps that come before the consensus.

A step is a value. It says what it must know beforehand (`surveys`) and what must not be split (`grain`), and then
thins out the task vectors of a block, overwriting them. Its own findings are the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Any, Protocol

import numpy as np
import torch

from ensemerge.errors import InvalidSpec
from ensemerge.merge.draws import Draws
from ensemerge.merge.method import Block, Grain, Scope, Survey
from ensemerge.merge.selection import order_statistics


class Sparsify(Protocol):
    """A step that thins out task vectors."""

    @property
    def grain(self) -> Grain: ...

    @property
    def surveys(self) -> tuple[Survey, ...]: ...

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        """The task vectors that are left; overwrites `deltas`."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Nothing is dropped: task arithmetic."""

    grain: Grain = Grain.ELEMENT
    surveys: tuple[Survey, ...] = ()

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        return list(deltas)


@dataclass(frozen=True)
class Magnitudes:
    """The task vectors; selection looks at magnitudes only."""

    def __call__(self, block: Block) -> Iterable[torch.Tensor]:
        return (block.delta(k) for k in range(block.count))


@dataclass(frozen=True)
class TopFraction:
    """The rank of the smallest element that is kept: `max(1, ⌊density·n⌋)`, none for a density of 0."""

    densities: tuple[float, ...]

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        density = self.densities[row]
        return (max(1, min(numel, floor(density * numel))) if density > 0 else 0,)


def at_least(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """τ where `|τ| ≥ threshold`, a float32 number, else 0. Overwrites a float64 τ, which is rounded to compare."""
    if delta.dtype == torch.float64:
        return delta.mul_(delta.abs().float() >= threshold)
    # hardshrink keeps what is above its bound, in one pass: the float below the threshold makes that "at least".
    return torch.nn.functional.hardshrink(delta, float(np.nextafter(np.float32(threshold), np.float32(0))))


def at_most(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """τ where `|τ| ≤ threshold`, a float32 number, else 0. Overwrites τ; a float64 one is rounded to compare."""
    if delta.dtype == torch.float64:
        return delta.mul_(delta.abs().float() <= threshold)
    return delta.sub_(torch.nn.functional.hardshrink(delta, threshold))


@dataclass(frozen=True)
class Trim:
    """The trim of TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): a model's largest changes are kept.

    Over the whole model, as the paper does it; tensors with other densities are trimmed apart. Everything at least as
    large as the k-th magnitude, `k = max(1, ⌊density·n⌋)`, is kept, so that elements of one magnitude share one fate.
    """

    densities: tuple[float, ...]
    scope: Scope = Scope.MODEL
    grain: Grain = Grain.ELEMENT

    @property
    def surveys(self) -> tuple[Survey, ...]:
        if min(self.densities) >= 1:
            return ()  # all is kept, whatever the thresholds would be
        return order_statistics(Magnitudes(), TopFraction(self.densities), self.scope)

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        if not self.surveys:
            return list(deltas)
        return [at_least(delta, float(row[0])) for delta, row in zip(deltas, findings[-1], strict=True)]


@dataclass(frozen=True)
class Band:
    """The ranks of the largest and the smallest element that Model Breadcrumbs keep.

    Of n elements the `⌊gamma·n⌋` largest go, then the smallest, until `max(least, ⌊density·n⌋)` are left; where that
    cannot be, fewer of the largest go.
    """

    densities: tuple[float, ...]
    gammas: tuple[float, ...]
    least: int = 1

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        density, gamma = self.densities[row], self.gammas[row]
        kept = min(numel, max(self.least, floor(density * numel))) if density > 0 else 0
        if not kept:
            return 0, 0
        outliers = min(floor(gamma * numel), numel - kept)
        return outliers + 1, outliers + kept


@dataclass(frozen=True)
class Outliers:
    """Model Breadcrumbs (Davari & Belilovsky 2023, arXiv 2312.06795): in each tensor both tails are cut."""

    band: Band
    grain: Grain = Grain.ELEMENT

    @property
    def surveys(self) -> tuple[Survey, ...]:
        return order_statistics(Magnitudes(), self.band, Scope.TENSOR)

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        return [
            at_most(at_least(delta, low), high)
            for delta, (high, low) in zip(deltas, findings[-1].tolist(), strict=True)
        ]


Compensate = Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]


def inverse(delta: torch.Tensor, probability: torch.Tensor | float) -> torch.Tensor:
    """What was kept with this probability is divided by it: the expectation stays what it was. Overwrites τ."""
    return delta.div_(probability)


def unscaled(delta: torch.Tensor, _probability: torch.Tensor | float) -> torch.Tensor:
    """What was kept stays as it is."""
    return delta


def masked(delta: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """τ where `keep`, a bool tensor, else 0. Overwrites τ."""
    # torch casts bytes with vector instructions, but not booleans.
    return delta.mul_(keep.view(torch.uint8).to(delta.dtype).view_as(delta))


@dataclass(frozen=True)
class Drop:
    """DARE (Yu et al. 2024, arXiv 2311.03099): elements survive with probability `density`, the rest is dropped.

    `compensate` is `inverse` in the paper: what survives is divided by the density.
    """

    densities: tuple[float, ...]
    draws: Draws
    compensate: Compensate = inverse
    grain: Grain = Grain.ELEMENT
    surveys: tuple[Survey, ...] = ()

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        return [self._dropped(block, k, delta, self.densities[k]) for k, delta in enumerate(deltas)]

    def _dropped(self, block: Block, k: int, delta: torch.Tensor, density: float) -> torch.Tensor:
        if density >= 1:
            return delta
        if density <= 0:
            return delta.mul_(0)  # which, unlike `zero_`, lets NaN be seen
        keep = self.draws.keep(block.place, k, density, delta.numel())
        return self.compensate(masked(delta, keep), density)


def rank_probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """`(rows, columns)`: from `density − ε` for a row's smallest magnitude to `density + ε` for its largest, by rank.

    Elements of equal magnitude rank by position; a row of one element gets `density`. Ranks are exact integers.
    """
    rows, columns = delta.shape
    if columns == 1:
        return torch.full_like(delta, density)
    order = delta.abs().argsort(dim=1, stable=True)
    steps = (
        torch.arange(columns, dtype=torch.float64, device=delta.device)
        .div_(columns - 1)
        .mul_(2 * epsilon)
        .add_(density - epsilon)
    )
    return torch.empty_like(delta).scatter_(1, order, steps.to(delta.dtype).expand(rows, columns))


@dataclass(frozen=True)
class DropByRank:
    """MAGPRUNE of DELLA (Deep et al. 2024, arXiv 2406.11617): in each row the larger survive more often.

    What survives is divided by its own probability (`inverse`). Epsilon is what recipes mean by it: probabilities lie
    between `density − ε` and `density + ε`. Raises InvalidSpec where these are not between 0 and 1.
    """

    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    draws: Draws
    compensate: Compensate = inverse
    grain: Grain = Grain.ROW
    surveys: tuple[Survey, ...] = ()

    def __post_init__(self) -> None:
        for density, epsilon in zip(self.densities, self.epsilons, strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise InvalidSpec(
                    f"density {density} and epsilon {epsilon} ask for probabilities from {density - epsilon:g} to "
                    f"{density + epsilon:g}; expected them between 0 and 1: make epsilon smaller"
                )

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        return [self._dropped(block, k, delta, self.densities[k]) for k, delta in enumerate(deltas)]

    def _dropped(self, block: Block, k: int, delta: torch.Tensor, density: float) -> torch.Tensor:
        if density >= 1:
            return delta
        if density <= 0:
            return delta.mul_(0)  # which, unlike `zero_`, lets NaN be seen
        probability = rank_probabilities(delta, density, self.epsilons[k])
        keep = self.draws.keep(block.place, k, probability.reshape(-1), delta.numel())
        return self.compensate(masked(delta, keep), probability)


@dataclass(frozen=True)
class AbsoluteSums:
    """By how much a step's result must grow so that the tensor's `Σ |τ_k|` is as before: a factor per model."""

    step: Sparsify
    scope: Scope = Scope.TENSOR

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        deltas = block.deltas()
        before = [float(delta.abs().sum()) for delta in deltas]
        after = [float(delta.abs().sum()) for delta in self.step(block, deltas, findings)]
        return np.array([before, after], np.float64)

    def conclude(self, total: np.ndarray, numel: int, findings: Sequence[Any]) -> list[float]:
        before, after = total.tolist()
        return [b / a if a > 0 else 1.0 for b, a in zip(before, after, strict=True)]


@dataclass(frozen=True)
class RescaledToL1:
    """A step, and after it each task vector stretched until its L1 norm over the tensor is what it was.

    This is what mergekit's `rescale` means; no paper has it.
    """

    step: Sparsify
    grain: Grain = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grain", self.step.grain)

    @property
    def surveys(self) -> tuple[Survey, ...]:
        return (*self.step.surveys, AbsoluteSums(self.step))

    def __call__(self, block: Block, deltas: Sequence[torch.Tensor], findings: Sequence[Any]) -> list[torch.Tensor]:
        kept = self.step(block, deltas, findings[:-1])
        return [delta.mul_(factor) for delta, factor in zip(kept, findings[-1], strict=True)]
