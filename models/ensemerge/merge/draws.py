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
    """SFC64 (Doty-Humphrey 2010), seeded from (seed, tensor, model, chunk): half of what Philox costs.

    An element is kept where its number, uniform on [0, 1) in steps of 2⁻³², is below the probability. The upper 16 of
    its bits decide that but for one element in 65,536; only for those are the lower bits drawn.
    """

    seed: int = 0

    def keep(self, place: Place, model: int, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        upper = self._upper(place, model, count)
        # One limit stays a number of Python's: then the words are compared in their own type, several times faster.
        limits = probability.double().cpu().numpy() if isinstance(probability, torch.Tensor) else np.array(probability)
        whole = np.floor(limits * 2.0**16).astype(np.int32) if limits.ndim else int(limits * 2**16)
        kept = upper < whole
        for at in np.flatnonzero(upper == whole):
            limit = float(limits[at] if limits.ndim else limits)
            kept[at] = self._number(place, model, int(at), int(upper[at])) < limit
        return torch.from_numpy(kept).to(place.device)

    def _upper(self, place: Place, model: int, count: int) -> np.ndarray:
        """`(count,) uint16`, uniform over all of them."""
        first, last = place.start // CHUNK_ELEMENTS, (place.start + count - 1) // CHUNK_ELEMENTS
        words = [
            self._chunk(place, model, chunk, min(place.start + count - chunk * CHUNK_ELEMENTS, CHUNK_ELEMENTS))
            for chunk in range(first, last + 1)
        ]
        words[0] = words[0][place.start - first * CHUNK_ELEMENTS :]
        return np.concatenate(words) if len(words) > 1 else words[0]

    def _chunk(self, place: Place, model: int, chunk: int, count: int) -> np.ndarray:
        """The first `count` words of a chunk."""
        bits = np.random.SFC64(int.from_bytes(self._digest(place, model, f"{chunk}"), "little"))
        # The generator's raw words, by the way that lets other threads run meanwhile.
        raw = np.random.Generator(bits).integers(0, 2**64 - 1, -(-count // 4), np.uint64, endpoint=True)
        words: np.ndarray = raw.view(np.uint16)[:count]
        return words

    def _number(self, place: Place, model: int, at: int, upper: int) -> float:
        """The whole number of the block's element `at`."""
        lower = int.from_bytes(self._digest(place, model, f"lower {place.start + at}")[:2], "little")
        return (upper * 2**16 + lower) / 2**32

    def _digest(self, place: Place, model: int, what: str) -> bytes:
        return hashlib.sha256(f"{self.seed}\0{place.tensor}\0{model}\0{what}".encode()).digest()
