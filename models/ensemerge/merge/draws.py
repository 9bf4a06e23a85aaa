"""Chance, keyed by (seed, tensor, model, element): the same draws whatever the block, the shard or the thread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ensemerge.merge.method import Place

# So many elements share a generator, whose seed they have in common; within them an element's number is its place.
CHUNK_ELEMENTS = 1 << 17


class Draws(Protocol):
    """Which elements survive a random drop."""

    def keep(self, place: Place, model: int, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        """`(count,) bool` on the block's device, true with `probability` (one, or one per element).

        The same arguments give the same answer: a survey and the combination after it ask for the same draws.
        """
        ...


@dataclass(frozen=True)
class KeyedDraws:
    """SFC64 (Doty-Humphrey 2010), seeded from (seed, tensor, model, chunk): half of what Philox costs."""

    seed: int = 0

    def keep(self, place: Place, model: int, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        # Words lie in [−2³¹, 2³¹) and float64 holds them all: a probability of 1 keeps every one, 0 none.
        words = self._words(place, model, count)
        limits = probability.double().cpu().numpy() if isinstance(probability, torch.Tensor) else float(probability)
        kept = _below(words, limits) if isinstance(limits, float) else words < limits * 2.0**32 - 2.0**31
        return torch.from_numpy(kept).to(place.device)

    def _words(self, place: Place, model: int, count: int) -> np.ndarray:
        """`(count,) int32`, uniform over all of them."""
        chunks = range(place.start // CHUNK_ELEMENTS, -(-(place.start + count) // CHUNK_ELEMENTS))
        first = chunks.start * CHUNK_ELEMENTS
        words = [
            self._chunk(place, model, chunk, min(place.start + count - chunk * CHUNK_ELEMENTS, CHUNK_ELEMENTS))
            for chunk in chunks
        ]
        whole: np.ndarray = np.concatenate(words) if len(words) != 1 else words[0]
        return whole[place.start - first :][:count]

    def _chunk(self, place: Place, model: int, chunk: int, count: int) -> np.ndarray:
        """The first `count` words of a chunk."""
        digest = hashlib.sha256(f"{self.seed}\0{place.tensor}\0{model}\0{chunk}".encode()).digest()
        bits = np.random.SFC64(int.from_bytes(digest, "little"))
        # The generator's raw words, by the way that lets other threads run meanwhile.
        raw = np.random.Generator(bits).integers(0, 2**64 - 1, (count + 1) // 2, np.uint64, endpoint=True)
        words: np.ndarray = raw.view(np.int32)[:count]
        return words


def _below(words: np.ndarray, probability: float) -> np.ndarray:
    """The same for one probability, with a limit of the words' own type: its greatest value would still drop one."""
    limit = round(probability * 2**32) - 2**31
    return np.ones(len(words), bool) if limit > np.iinfo(np.int32).max else words < np.int32(limit)
