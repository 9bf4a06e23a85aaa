"""Merges of matrices in their singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS.

Only matrices have singular vectors. Of every other shape, as in the papers' code, the mean of the task vectors is
taken. Factors are computed in float32 or wider. Singular vectors are unique up to sign and to rotations among equal
singular values, so that results are compared as products, never factor by factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemerge.merge.method import Block, Grain, Survey
from ensemerge.merge.methods.consensus import Consensus

MergeMatrices = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def svd(matrix: torch.Tensor, size: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin `U, Σ, V^T` within the numerical rank, singular values descending; a zero matrix has rank 0.

    Values up to `size · eps · max(rows, columns)` are rounding noise, and their vectors are arbitrary. `size` is the
    norm of what the matrix was computed from, by default its largest singular value.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    noise = (s[:1] if size is None else size) * torch.finfo(s.dtype).eps * max(matrix.shape)
    rank = int((s > noise).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns, or rows where it is wide: the solution of Procrustes' problem.

    Where the rank is not full there are many; this one adds no direction that the matrix does not have.
    """
    u, _, vt = svd(matrix)
    return u @ vt


def mean(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the task vectors."""
    return torch.stack(list(deltas)).mean(0)


def tsv_m(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Task singular vectors, merged (Gargiulo et al. 2025, arXiv 2412.00081).

    Of each task the ⌊rank/n⌋ leading triplets; the concatenated U and V are made orthogonal, each by itself, and the
    product with the concatenated singular values is the merge. A task of a lower rank, an adapter's for example, gives
    fewer: null directions are arbitrary and would bend the others. A matrix with fewer rows or columns than there are
    tasks has no room for one triplet per task: the mean then.
    """
    kept = min(deltas[0].shape) // len(deltas)
    if not kept:
        return mean(deltas)
    factors = [svd(delta) for delta in deltas]
    u = orthogonal(torch.cat([u[:, :kept] for u, _, _ in factors], 1))
    vt = orthogonal(torch.cat([vt[:kept] for _, _, vt in factors], 0))
    return u * torch.cat([s[:kept] for _, s, _ in factors]) @ vt


def iso_c(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Isotropic merging in the common subspace: every singular value of `Σ τ_k` becomes their mean.

    Marczak et al. 2025, arXiv 2502.04959. The paper takes all min(rows, columns) values; here those within the
    numerical rank are meant, because null directions are arbitrary. At full rank both are the same.
    """
    u, s, vt = svd(torch.stack(list(deltas)).sum(0))
    return u @ vt * _mean_value(s)


def _mean_value(s: torch.Tensor) -> torch.Tensor:
    return s.sum() / max(1, len(s))


def iso_cts(deltas: Sequence[torch.Tensor], common: float) -> torch.Tensor:
    """Isotropic merging in common and task-specific subspaces (Marczak et al. 2025, arXiv 2502.04959).

    The leading directions of `Σ τ_k`, about the fraction `common` of them, and of each task the same number of leading
    ones of what it has outside of them; all made orthogonal, all with the mean of their singular values. The paper
    shares out min(rows, columns) directions; here it is the numerical rank of the sum, and a task that has less outside
    gives less, because null directions are arbitrary.
    """
    u, s, vt = svd(torch.stack(list(deltas)).sum(0))
    rank = len(s)
    own = round((rank - int(rank * common)) / len(deltas))
    own = min(own, rank // len(deltas))
    shared = rank - own * len(deltas)
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [vt[:shared]]
    for delta in deltas if own else ():
        # Measured by the whole task vector, lest what the subtraction rounds to counts as directions.
        u_k, s_k, vt_k = svd(delta - lefts[0] @ (lefts[0].T @ delta), delta.norm())
        lefts.append(u_k[:, :own])
        values.append(s_k[:own])
        rights.append(vt_k[:own])
    return orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights, 0)) * _mean_value(torch.cat(values))


@dataclass(frozen=True)
class SubspaceMerge:
    """`θ_0 + λ · merge(τ_1 … τ_n)` for matrices, `θ_0 + λ · other(τ_1 … τ_n)` for any other shape."""

    merge: MergeMatrices
    scale: float
    models: int
    other: MergeMatrices = mean
    grain: Grain = Grain.TENSOR
    surveys: Sequence[Survey] = ()
    propagates: bool = False

    @property
    def buffers(self) -> int:
        # The task vectors and two factors of each; the concatenations, their factors, and LAPACK's copies of both.
        return 4 * self.models + 12

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        deltas = block.deltas()
        merged = self.merge(deltas) if deltas[0].dim() == 2 else self.other(deltas)
        return torch.add(block.base, merged, alpha=self.scale)


def largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The `max(1, ⌊density·n⌋)` largest magnitudes and all that tie with the last of them; 0 elsewhere."""
    if density <= 0:
        return torch.zeros_like(delta)
    kept = min(delta.numel(), max(1, int(density * delta.numel())))
    threshold = delta.abs().reshape(-1).kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0)


@dataclass(frozen=True)
class Knots:
    """KnOTS (Stoica et al. 2025, arXiv 2410.19735): merge in the singular vectors that all tasks share.

    `[τ_1 … τ_n] = U Σ [V_1^T … V_n^T]`; the V_k^T, trimmed to `densities`, are merged by `consensus` into V^T, and
    `U Σ V^T` is the merged task vector. Made for adapters, whose task vectors are ΔW.
    """

    densities: Sequence[float]
    consensus: Consensus

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        # Within the rank: noise would take part in the trim and in the vote.
        u, s, vt = svd(torch.cat(list(deltas), 1))
        if not len(s):
            return torch.zeros_like(deltas[0])
        parts = vt.chunk(len(deltas), 1)
        kept = [largest(part, density) for part, density in zip(parts, self.densities, strict=True)]
        return u * s @ self.consensus(kept)
