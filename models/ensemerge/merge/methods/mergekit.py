"""`compat: mergekit`: the same methods, made of the steps that mergekit 0.1.5 takes where they are not the paper's.

Written from what mergekit computes, not from its text. Where a step here needs no comment, mergekit's numbers and ours
are the same anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ensemerge.errors import InvalidData
from ensemerge.merge.method import Block, Grain, Method, Scope, Survey
from ensemerge.merge.methods import selective, spherical, table
from ensemerge.merge.methods.consensus import AgreeingSum, Consensus, Elect, Sum, agreement, elected_sign, weighted
from ensemerge.merge.methods.sce import Sce, SelectAll, SelectVarying
from ensemerge.merge.methods.sparsify import (
    Band,
    Drop,
    DropByRank,
    Outliers,
    RescaledToL1,
    Sparsify,
    Trim,
    unscaled,
)
from ensemerge.merge.methods.stock import FilterStock, ModelStock
from ensemerge.merge.methods.table import METHODS, MethodEntry, Settings, task_arithmetic
from ensemerge.merge.selection import order_statistics

DEVIATIONS: Mapping[str, str] = {
    "slerp": "a zero tensor is interpolated linearly (mergekit: as if at a right angle)",
    "nuslerp": "nearly parallel vectors (|cos| > 0.9995) and zeros are interpolated linearly (mergekit: only exactly "
    "parallel ones, so that rounding noise is divided by rounding noise); weights that cancel are refused (mergekit: "
    "t = 0.5)",
    "multislerp": "the logarithmic map at the mean direction is taken, so that two models give SLERP (mergekit leaves "
    "out its angle, which makes the step vanish); directions that cancel, to a thousandth, are averaged linearly "
    "(mergekit: an error for more than two models)",
    "karcher": "any model that is not zero has a direction (mergekit: only norms above `tol`); directions that cancel, "
    "to a thousandth, are averaged linearly (mergekit: the first model's)",
    "task_arithmetic": "with `normalize`, weights that cancel are refused (mergekit: not normalized)",
    "ties": "trimmed over the whole model, as in the paper (mergekit: each tensor by itself); all elements that tie "
    "with the smallest that is kept stay (mergekit: as its sort leaves them); a sum of zero elects nothing (mergekit: "
    "+); a negative weight's share is its magnitude (mergekit: negative)",
    "dare_linear": "what survives is divided by the density, as in the paper (mergekit: stretched to the old L1 norm)",
    "dare_ties": "what survives is divided by the density, as in the paper (mergekit: stretched to the old L1 norm); a "
    "sum of zero elects nothing (mergekit: +)",
    "della": "what survives is divided by its own probability, as in the paper (mergekit: stretched to the old L1 "
    "norm); a row is what the last axis spans (mergekit: axis 1); a row of one element is kept with probability "
    "`density` (mergekit: fails); a sum of zero elects nothing (mergekit: +)",
    "della_linear": "what survives is divided by its own probability, as in the paper (mergekit: stretched to the old "
    "L1 norm); a row is what the last axis spans (mergekit: axis 1); a row of one element is kept with probability "
    "`density` (mergekit: fails)",
    "breadcrumbs": "every tensor keeps at least one element (mergekit: none where density · elements < 1)",
    "breadcrumbs_ties": "every tensor keeps at least one element (mergekit: none where density · elements < 1); a sum "
    "of zero elects nothing (mergekit: +)",
    "sce": "shares follow the energies however small they are (mergekit: equal shares where the mean squares sum to "
    "less than 1e-6, as those of most fine-tunes do); one model alone is kept whole (mergekit: `select_topk` below 1 "
    "gives the base); a sum of zero elects nothing (mergekit: +)",
    "model_stock": "the mean of the angles, as in the paper (mergekit: of the cosines); no floor under the product of "
    "norms (mergekit: 1e-6, which makes small updates look orthogonal); filters are entries of axis 0 (mergekit: rows "
    "of the last axis); angles that ask for t < −1 keep the base (mergekit: only at the pole)",
    "nearswap": "an exactly clipped step (mergekit: differences count as at least 1e-6)",
    "arcee_fusion": "exact quartiles for every size (mergekit: of a random sample above a million elements); the "
    "divergence without 1e-8 added to each probability, and never negative (mergekit: as rounding leaves it, which "
    "decides in most fine-tunes)",
}


def slerp(gram: np.ndarray, t: float) -> np.ndarray:
    """SLERP whose zero vectors are at right angles to everything."""
    norms = np.sqrt(np.stack([gram[0, 0], gram[1, 1]]))
    cosine = gram[0, 1] / np.where(norms > 1e-8, norms, 1).prod(0)
    return spherical.arc(cosine, np.abs(cosine) > spherical.PARALLEL, t)


def nuslerp(gram: np.ndarray, t: float) -> np.ndarray:
    """SLERP that is linear only where the squared sine is at most 1e-16."""
    norms = np.sqrt(np.stack([gram[0, 0], gram[1, 1]]))
    cosine = np.clip(gram[0, 1] / np.maximum(norms, 1e-7).prod(0), -1, 1)
    return spherical.arc(cosine, 1 - cosine**2 <= 1e-16, t)


def multislerp(gram: np.ndarray, weights: Sequence[float], eps: float) -> np.ndarray:
    """The direction of the weighted mean of the unit vectors, times the weighted mean of the norms.

    mergekit then moves along `Σ w_k (u_k − ⟨u_k, m⟩ m)`, which is zero. Raises InvalidData where the directions of
    more than two models cancel.
    """
    shares = np.asarray(weights, np.float64)
    if len(shares) == 1:
        return np.ones(1)
    norms = np.sqrt(np.diag(gram))
    inverses = 1 / (norms + eps)
    length = spherical.length_of(gram, shares * inverses)
    if length >= eps:
        coefficients: np.ndarray = shares * inverses * float(shares @ norms) / length
        return coefficients
    if len(shares) > 2:
        raise InvalidData(
            "multislerp: the weighted directions of the models cancel, so that there is no mean direction; "
            "change the weights, or leave out `compat: mergekit` to average such tensors linearly"
        )
    return shares


def karcher(gram: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The Karcher mean among the models whose norm is above `tol`; where they cancel it starts at the first."""
    norms = np.sqrt(np.diag(gram))
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    units = spherical.unit_gram(gram, norms)
    shares = valid / np.count_nonzero(valid)
    length = spherical.length_of(units, shares)
    start = shares / length if length >= tol else np.eye(len(norms))[int(valid.argmax())]
    return spherical.stretched(spherical.settled(units, start, shares, max_iter, tol), norms, float(norms.mean()))


def never_zero(total: torch.Tensor) -> torch.Tensor:
    """The elected sign: + where the sum is zero."""
    # Doubled and shifted, because sign(0) = 0 must become +1.
    return total.sign_().mul_(2).add_(1).clamp_(-1, 1)


@dataclass(frozen=True)
class SignedMean:
    """The mean of those that agree, divided by the plain sum of their weights, or by 1 where that is 0."""

    weights: Sequence[float]
    elect: Elect = never_zero

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        votes = weighted(deltas, self.weights)
        elected = elected_sign(votes, self.elect)
        total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
        for agreed, weight in zip(agreement(votes, elected), self.weights, strict=True):
            total.add_(agreed)
            divisor.add_(agreed.sign_(), alpha=weight)
        return total.mul_(elected).div_(torch.where(divisor == 0, 1, divisor))


def trust(gram: np.ndarray) -> np.ndarray:
    """Model Stock's t at the mean of the cosines, the product of norms at least 1e-6; 0 at the pole."""
    norms = np.sqrt(np.einsum("kk...->k...", gram))
    pairs = combinations(range(len(gram)), 2)
    cosine = np.mean([np.clip(gram[j, k] / np.maximum(norms[j] * norms[k], 1e-6), -1, 1) for j, k in pairs], axis=0)
    denominator = 1 + (len(gram) - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    return np.where(singular, 0, len(gram) * cosine / np.where(singular, 1, denominator))


def capped(delta: torch.Tensor, t: float) -> torch.Tensor:
    """NearSwap's step, `τ · min(1, t / max(|τ|, 1e-6))`."""
    return delta.mul_(delta.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(0, 1))


def importance(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Arcee fusion's importance, with 1e-8 added to every probability: negative where the divergence rounds to that."""
    p, q = (torch.softmax(logits, -1).add_(1e-8) for logits in (model, base))
    divergence = (p * (p / q).log_()).sum(-1, keepdim=True)
    return model.sub_(base).abs_().mul_(divergence)


@dataclass(frozen=True)
class SignedScores:
    """The importance of each element's change in two rows, what is above zero and what is below."""

    def __call__(self, block: Block) -> Iterable[torch.Tensor]:
        scores = importance(block.model(0), block.base)
        return scores.clamp(min=0), scores.clamp(max=0)


@dataclass(frozen=True)
class SignedQuartiles:
    """The quartiles' ranks in both rows, in the second counted from the other end.

    Where the score at a rank is positive, the second row has a zero there, and the other way round.
    """

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        ranks = selective.Quartiles()(row, numel, findings)
        return ranks if row == 0 else [numel + 1 - rank for rank in ranks]


@dataclass(frozen=True)
class ArceeFusion:
    """Arcee fusion by signed importance.

    Divergences of most fine-tunes are smaller than what float32 resolves, so that their sign is chance, and decides.
    """

    grain: Grain = Grain.ROW
    buffers: int = 7
    propagates: bool = False

    @property
    def surveys(self) -> Sequence[Survey]:
        return order_statistics(SignedScores(), SignedQuartiles(), Scope.TENSOR)

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        above, below = findings[-1]
        low, median, high = above - below
        chosen = importance(block.model(0), block.base).float() >= median + 1.5 * (high - low)
        return block.delta(0).mul_(chosen).add_(block.base)


def floored_energies(squares: np.ndarray) -> list[float]:
    """SCE's shares: equal where the mean squares sum to less than 1e-6."""
    total = float(squares.sum())
    return (squares / total).tolist() if total >= 1e-6 else [1 / len(squares)] * len(squares)


def _rescaled(settings: Settings, step: Sparsify) -> Sparsify:
    return RescaledToL1(step) if settings.shared["rescale"] else step


def _trim(settings: Settings) -> Sparsify:
    return _rescaled(settings, Trim(settings.each("density"), Scope.TENSOR))


def _drop(settings: Settings) -> Sparsify:
    return _rescaled(settings, Drop(settings.each("density"), settings.draws, unscaled))


def _drop_by_rank(settings: Settings) -> Sparsify:
    step = DropByRank(settings.each("density"), settings.each("epsilon"), settings.draws, unscaled)
    return _rescaled(settings, step)


def _outliers(settings: Settings) -> Sparsify:
    return _rescaled(settings, Outliers(Band(settings.each("density"), settings.each("gamma"), least=0)))


def _sum(settings: Settings) -> Consensus:
    weights = settings.each("weight")
    total = sum(weights) if settings.shared["normalize"] else 1.0
    return Sum([weight / total for weight in weights] if abs(total) >= 1e-8 else weights)


def _elect(settings: Settings) -> Consensus:
    weights = settings.each("weight")
    return SignedMean(weights) if settings.shared["normalize"] else AgreeingSum(weights, never_zero)


def _slerp(settings: Settings) -> Method:
    return spherical.SphericalSum(partial(slerp, t=settings.shared["t"]), settings.count)


def _nuslerp(settings: Settings) -> Method:
    first, second = settings.each("weight")
    total = first + second
    return table.along(settings, partial(nuslerp, t=0.5 if abs(total) < 1e-6 else second / total))


def _multislerp(settings: Settings) -> Method:
    rule = partial(multislerp, weights=table.sphere_weights(settings), eps=settings.shared["eps"])
    return spherical.SphericalSum(rule, settings.count)


def _karcher(settings: Settings) -> Method:
    rule = partial(karcher, max_iter=settings.shared["max_iter"], tol=settings.shared["tol"])
    return spherical.SphericalSum(rule, settings.count)


def _sce(settings: Settings) -> Method:
    top = settings.shared["select_topk"]
    select = SelectVarying(top) if top < 1 else SelectAll()
    return Sce(select, settings.count, floored_energies, never_zero, least=1e-6)


def _model_stock(settings: Settings) -> Method:
    if settings.shared["filter_wise"]:
        return FilterStock(settings.count, trust, Grain.ROW)
    return ModelStock(settings.count, trust)


# What mergekit computes otherwise. The parameters, the base and the number of models are the same.
OTHER: Mapping[str, Callable[[Settings], Method]] = {
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "task_arithmetic": task_arithmetic(table.keep_all, _sum),
    "ties": task_arithmetic(_trim, _elect),
    "dare_linear": task_arithmetic(_drop, _sum),
    "dare_ties": task_arithmetic(_drop, _elect),
    "della": task_arithmetic(_drop_by_rank, _elect),
    "della_linear": task_arithmetic(_drop_by_rank, _sum),
    "breadcrumbs": task_arithmetic(_outliers, _sum),
    "breadcrumbs_ties": task_arithmetic(_outliers, _elect),
    "sce": _sce,
    "model_stock": _model_stock,
    "nearswap": lambda settings: selective.NearSwap(settings.shared["t"], capped),
    "arcee_fusion": lambda settings: ArceeFusion(),
}
SAME = ("linear", "passthrough", "ram", "ramplus_tl")

MERGEKIT: Mapping[str, MethodEntry] = {name: METHODS[name] for name in SAME} | {
    name: replace(METHODS[name], make=make) for name, make in OTHER.items()
}
