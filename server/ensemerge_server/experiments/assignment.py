"""Which arm a unit gets: a salted hash, no coin. It is the same on every replica and after every restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate

SCALE = 2.0**-64


def position(salt: str, unit: str) -> float:
    """Where `unit` lies in [0, 1): 64 bits of BLAKE2b. Experiments with different salts are independent."""
    digest = hashlib.blake2b(unit.encode(), digest_size=8, key=hashlib.blake2b(salt.encode()).digest()).digest()
    return int.from_bytes(digest, "big") * SCALE


class Split:
    """The interval [0, 1) cut into arms, in proportion to their weights."""

    def __init__(self, weights: Mapping[str, float], salt: str) -> None:
        total = sum(weights.values())
        self.shares = {arm: weight / total for arm, weight in weights.items()}
        self._edges = list(zip(accumulate(self.shares.values()), self.shares, strict=True))
        self._salt = salt

    def arm(self, unit: str) -> str:
        """The arm of `unit`."""
        place = position(self._salt, unit)
        # The sum of the shares may miss 1 by a rounding error: what lies beyond belongs to the last arm.
        return next((arm for edge, arm in self._edges if place < edge), self._edges[-1][1])
