"""The k-th largest magnitude of any number of scores, exactly, in one pass and a little, in a bounded memory.

Without the sign, the bits of a float32 order as its magnitude does. Every sixteenth block tells roughly where the
wanted score lies; one pass over all blocks then counts what is above that bracket and keeps the bits of what is inside.
Should the score lie elsewhere after all, two passes find it by its upper and its lower half. No sort, no copy of the
scores. Scores in float64 are rounded to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ensemerge.merge.method import Block, SampledSurvey, Scope, Survey

SIGN = 1 << 15  # of an upper half
LOWER = 1 << 16
INFINITE = 0x7F80  # the upper half of infinity, whose lower half is zero
EVERY = 16
# A bracket of more upper halves than this would take more memory than it saves time.
WIDEST = 48


class Scores(Protocol):
    """Something per element whose magnitude counts. A value: equal scores are counted once."""

    def __call__(self, block: Block) -> Iterable[torch.Tensor]:
        """One tensor of the block's size for each row of the finding."""
        ...


class Ranks(Protocol):
    """Which of n scores are wanted. A value."""

    def __call__(self, row: int, numel: int, findings: Sequence[Any]) -> Sequence[int]:
        """Ranks from 1, the largest score, to `numel`, the same count for every row; rank 0 is infinity.

        `findings` are those of the surveys before these two.
        """
        ...


@dataclass(frozen=True)
class Sketch(SampledSurvey):
    """The upper halves of some blocks' scores: a bracket for each wanted score."""

    scores: Scores
    ranks: Ranks
    scope: Scope
    every: int = EVERY
    passes: float = 1 + 1 / EVERY

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return np.stack([_upper_counts(_bits(score)) for score in self.scores(block)])

    def conclude(self, total: Any, numel: int, findings: Sequence[Any]) -> Survey:
        """The survey that finds the scores: in their brackets, or, where these are too wide, by their halves."""
        rows = [
            tuple(_bracket(counts, rank, numel) for rank in self.ranks(row, numel, findings))
            for row, counts in enumerate(total)
        ]
        if any(bracket is None for row in rows for bracket in row):
            return Coarse(self.scores, self.ranks, self.scope)
        return Count(self.scores, self.ranks, self.scope, tuple(rows))


Bracket = tuple[int, int]  # the lowest and the highest upper half


@dataclass(frozen=True)
class Count:
    """The pass over all scores: how many lie above each bracket, and which bits those inside have."""

    scores: Scores
    ranks: Ranks
    scope: Scope
    brackets: tuple[tuple[Bracket | None, ...], ...]

    def measure(self, block: Block, findings: Sequence[Any]) -> Tally:
        tally = Tally(self.brackets)
        for row, score in enumerate(self.scores(block)):
            tally.add(row, _bits(score) & 0x7FFFFFFF)
        return tally

    def conclude(self, total: Tally, numel: int, findings: Sequence[Any]) -> torch.Tensor | Survey:
        """The scores at the wanted ranks, `(rows, ranks) float32`, or the survey by halves where one is not inside."""
        wanted = [self.ranks(row, numel, findings) for row in range(len(self.brackets))]
        found = [[total.find(row, k, rank) for k, rank in enumerate(ranks)] for row, ranks in enumerate(wanted)]
        if any(bits is None for row in found for bits in row):
            return Coarse(self.scores, self.ranks, self.scope)
        return torch.from_numpy(np.array(found, np.int32).view(np.float32))


class Tally:
    """What `Count` sums up. Adding changes the first of two tallies: there is one total, and parts are used once."""

    def __init__(self, brackets: Sequence[Sequence[Bracket | None]]) -> None:
        self._brackets = brackets
        self._seen = [0] * len(brackets)
        self._above = [[0] * len(row) for row in brackets]
        self._inside: list[list[list[np.ndarray]]] = [[[] for _ in row] for row in brackets]

    def add(self, row: int, bits: np.ndarray) -> None:
        """Count the scores of one row, by their bits without the sign, `(n,) int32`."""
        self._seen[row] += len(bits)
        for k, bracket in enumerate(self._brackets[row]):
            if bracket is not None:
                low, width = bracket[0] << 16, (bracket[1] - bracket[0] + 1) << 16
                # As unsigned numbers, what is below the bracket wraps around to beyond it.
                inside = (bits - np.int32(low)).view(np.uint32)
                self._above[row][k] += int(np.count_nonzero(bits >= low + width))
                self._inside[row][k].append(inside[inside < width])

    def __radd__(self, nothing: int) -> Tally:
        return self

    def __add__(self, other: Tally) -> Tally:
        for row, _ in enumerate(self._brackets):
            self._seen[row] += other._seen[row]
            for k, those in enumerate(other._inside[row]):
                self._above[row][k] += other._above[row][k]
                self._inside[row][k] = self._settled(row, k, self._inside[row][k] + those)
        return self

    def _settled(self, row: int, k: int, inside: list[np.ndarray]) -> list[np.ndarray]:
        """Many values become counts: the first array of a long list is one, of the whole bracket's bins, int64."""
        counts = inside[0] if inside and inside[0].dtype == np.int64 else None
        values = inside if counts is None else inside[1:]
        width = self._width(row, k)
        if sum(map(len, values)) < width:
            return inside
        added = np.bincount(np.concatenate(values), minlength=width)
        return [added if counts is None else counts + added]

    def _width(self, row: int, k: int) -> int:
        bracket = self._brackets[row][k]
        return 0 if bracket is None else (bracket[1] - bracket[0] + 1) << 16

    def find(self, row: int, k: int, rank: int) -> int | None:
        """The bits of the `rank`-th largest score; None where it is not in the bracket."""
        bracket = self._brackets[row][k]
        # Fewer scores than ranks are counted where parts of a tensor are copied unseen.
        rank = min(rank, self._seen[row])
        if bracket is None or not rank:
            return INFINITE << 16
        width, parts = self._width(row, k), self._inside[row][k]
        counts = np.zeros(width, np.int64)
        for part in parts:
            counts += part if part.dtype == np.int64 else np.bincount(part, minlength=width)
        rank -= self._above[row][k]
        if not 0 < rank <= counts.sum():
            return None
        return (bracket[0] << 16) + _place(counts, rank)[0]


@dataclass(frozen=True)
class Coarse:
    """The upper halves of all scores."""

    scores: Scores
    ranks: Ranks
    scope: Scope

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        return np.stack([_upper_counts(_bits(score)) for score in self.scores(block)])

    def conclude(self, total: Any, numel: int, findings: Sequence[Any]) -> Survey:
        """The survey of the lower halves, of those scores that share a wanted one's upper half."""
        halves = tuple(
            tuple(_upper(counts, rank) for rank in self.ranks(row, numel, findings)) for row, counts in enumerate(total)
        )
        return Fine(self.scores, self.scope, halves)


@dataclass(frozen=True)
class Fine:
    """The lower halves; of each row and rank the upper half is known, and the rank among those that share it."""

    scores: Scores
    scope: Scope
    halves: tuple[tuple[tuple[int, int], ...], ...]

    def measure(self, block: Block, findings: Sequence[Any]) -> np.ndarray:
        rows = zip(self.scores(block), self.halves, strict=True)
        return np.stack([_lower_counts(_bits(score), uppers) for score, uppers in rows])

    def conclude(self, total: Any, numel: int, findings: Sequence[Any]) -> torch.Tensor:
        """The scores at the wanted ranks, `(rows, ranks) float32`."""
        found = [
            [(upper << 16) | (_place(lower, rank)[0] if rank else 0) for (upper, rank), lower in zip(*row, strict=True)]
            for row in zip(self.halves, total, strict=True)
        ]
        return torch.from_numpy(np.array(found, np.int32).view(np.float32))


def order_statistics(scores: Scores, ranks: Ranks, scope: Scope) -> tuple[Survey]:
    """One survey, whose finding is `(rows, ranks) float32`: the magnitudes of the scores at `ranks`."""
    return (Sketch(scores, ranks, scope),)


def _bits(score: torch.Tensor) -> np.ndarray:
    bits: np.ndarray = score.reshape(-1).to(torch.float32).view(torch.int32).cpu().numpy()
    return bits


def _upper_counts(bits: np.ndarray) -> np.ndarray:
    # Every second half word, signs and all: cheaper than to shift the bits and to take the signs away.
    counts = np.bincount(bits.view(np.uint16)[1::2], minlength=2 * SIGN)
    return counts[:SIGN] + counts[SIGN:]


def _lower_counts(bits: np.ndarray, uppers: Sequence[tuple[int, int]]) -> np.ndarray:
    halves = bits & 0x7FFF0000
    return np.stack([np.bincount(bits[halves == upper << 16] & 0xFFFF, minlength=LOWER) for upper, _ in uppers])


def _bracket(counts: np.ndarray, rank: int, numel: int) -> Bracket | None:
    """The upper halves among which the `rank`-th of `numel` scores surely is, as far as a sample can tell.

    None where they are too many. `counts` are the sample's. A rank of 0, infinity, has the bracket of infinity.
    """
    seen = int(counts.sum())
    if not rank or not seen:
        return (INFINITE, INFINITE) if not rank else None
    share = rank / numel
    # Five standard deviations of a fair sample, and a fiftieth, because blocks are not quite one.
    margin = 5 * math.sqrt(seen * share * (1 - share)) + 0.02 * seen * min(share, 1 - share) + 1
    first, last = math.floor(share * seen - margin), math.ceil(share * seen + margin)
    high = _place(counts, first)[0] if first >= 1 else _place(counts, 1)[0] + 8
    low = _place(counts, last)[0] if last <= seen else max(0, _place(counts, seen)[0] - 8)
    return (low, min(high, INFINITE)) if high - low < WIDEST else None


def _upper(counts: np.ndarray, rank: int) -> tuple[int, int]:
    # Fewer scores than ranks are counted where parts of a tensor are copied unseen.
    rank = min(rank, int(counts.sum()))
    return _place(counts, rank) if rank else (INFINITE, 0)


def _place(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th largest, counted from the highest bin, and its rank within the bin."""
    descending = np.cumsum(counts[::-1])
    position = int(np.searchsorted(descending, rank))
    above = int(descending[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - above
