"""Where the blocks of a tensor lie. Their borders depend on its shape and the method's grain, on nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ensemerge.merge.method import Grain

# What the blocks that a worker holds at once may have together: 16 MiB of float32, which stays in a processor's cache.
CACHED_ELEMENTS = 1 << 22
BLOCK_ELEMENTS = 1 << 17  # the least, below which a call of torch costs as much as its work
# What one worker takes at a time: 4 MiB of bfloat16 from each model.
SPAN_ELEMENTS = 1 << 21


def block_elements(arrays: int) -> int:
    """Elements of a block where so many arrays of its size are held at once: a power of two."""
    return max(BLOCK_ELEMENTS, 1 << (CACHED_ELEMENTS // arrays).bit_length() - 1)


@dataclass(frozen=True)
class Stretch:
    """Elements `start:stop` of a flattened tensor, and the shape that a method sees them in."""

    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut: `rows` of `columns` elements, some rows to a block, some blocks to a span."""

    shape: tuple[int, ...]
    grain: Grain = Grain.ELEMENT
    block_elements: int = BLOCK_ELEMENTS

    @property
    def row(self) -> int:
        """The elements of what must not be split."""
        numel = math.prod(self.shape)
        if self.grain is Grain.ELEMENT:
            return 1
        if self.grain is Grain.TENSOR or len(self.shape) < 2:
            return numel
        return self.shape[-1] if self.grain is Grain.ROW else numel // self.shape[0]

    @property
    def block(self) -> int:
        """The elements of a block, the last one aside."""
        return max(self.block_elements // self.row, 1) * self.row

    @property
    def span(self) -> int:
        """The elements of a span, the last one aside: whole blocks."""
        return max(SPAN_ELEMENTS // self.block, 1) * self.block

    def spans(self) -> Iterator[tuple[int, int]]:
        """Start and stop of every span."""
        numel = math.prod(self.shape)
        return ((start, min(start + self.span, numel)) for start in range(0, numel, self.span))

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """The blocks of one span."""
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            yield Stretch(first, last, self._seen(last - first))

    def _seen(self, count: int) -> tuple[int, ...]:
        if self.grain is Grain.ELEMENT:
            return (count,)
        return self.shape if self.grain is Grain.TENSOR else (count // self.row, self.row)
