"""The one way to read weights. A preparation (pairing by structure, alignment) is a reader around a reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class WeightReader(Protocol):
    """Named tensors on disk: what they are is known at once, what they hold is read in windows."""

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors, tied ones included, in a fixed order."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """For each name whose tensor is another's as well: the name, earlier in `names`, under which it is kept."""
        ...

    @property
    def resident_bytes(self) -> int:
        """What the reader holds in memory whether or not anything is read."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Every file that decides what is read, each once: shards and their index, adapters, external data."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype. Raises KeyError."""
        ...

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start:stop` of the flattened tensor, `(stop - start,)`, which the caller must not change.

        May be a map of the file: after `give_back` its pages come back from the disk when it is used again. Raises
        KeyError, IndexError where the tensor has no such elements, InvalidData.
        """
        ...

    def give_back(self, name: str, start: int, stop: int) -> None:
        """The caller is done with a window: its pages need not stay in memory."""
        ...

    def window_bytes(self, name: str, elements: int) -> int:
        """The most that making a window of so many elements takes in memory, beside the window. Raises KeyError."""
        ...


def read(reader: WeightReader, name: str) -> torch.Tensor:
    """One whole tensor in its own shape, which the caller must not change. Raises KeyError, InvalidData."""
    info = reader.info(name)
    return reader.window(name, 0, info.numel).reshape(info.shape)


def check_stretch(name: str, info: TensorInfo, start: int, stop: int) -> None:
    """Raises IndexError: a map would answer with the bytes of a neighbouring tensor."""
    if not 0 <= start <= stop <= info.numel:
        raise IndexError(f"elements {start}:{stop} of tensor '{name}', which has {info.numel}")


def rows_of(info: TensorInfo, start: int, stop: int) -> tuple[int, int, int]:
    """The rows (entries of axis 0) `first:end` that elements `start:stop` touch, and the elements of one row."""
    columns = math.prod(info.shape[1:])
    if not columns or not info.shape:
        return 0, 0 if info.shape else 1, max(columns, 1)
    return start // columns, -(-stop // columns), columns


def most_rows(info: TensorInfo, elements: int) -> tuple[int, int]:
    """How many rows a stretch of so many elements touches at most, wherever it begins, and the elements of one row."""
    _, rows, columns = rows_of(info, 0, info.numel)
    return min(rows, -(-elements // columns) + 1), columns


class WrappedWeights:
    """A reader around another, which passes on everything; what a preparation changes, it overrides."""

    def __init__(self, inner: WeightReader) -> None:
        self._inner = inner

    @property
    def names(self) -> Sequence[str]:
        return self._inner.names

    @property
    def ties(self) -> Mapping[str, str]:
        return self._inner.ties

    @property
    def resident_bytes(self) -> int:
        return self._inner.resident_bytes

    @property
    def files(self) -> Sequence[Path]:
        return self._inner.files

    def info(self, name: str) -> TensorInfo:
        return self._inner.info(name)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._inner.window(name, start, stop)

    def give_back(self, name: str, start: int, stop: int) -> None:
        self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        return self._inner.window_bytes(name, elements)


class RenamedWeights(WrappedWeights):
    """A reader under the names of another: `mapping` leads from the new name to the wrapped reader's own."""

    def __init__(self, inner: WeightReader, mapping: Mapping[str, str]) -> None:
        super().__init__(inner)
        self._mapping = mapping
        first: dict[str, str] = {}
        kept = {new: inner.ties.get(old, old) for new, old in mapping.items()}
        self._ties = {new: first[old] for new, old in kept.items() if first.setdefault(old, new) != new}

    @property
    def names(self) -> Sequence[str]:
        return list(self._mapping)

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    def info(self, name: str) -> TensorInfo:
        return self._inner.info(self._mapping[name])

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._inner.window(self._mapping[name], start, stop)

    def give_back(self, name: str, start: int, stop: int) -> None:
        self._inner.give_back(self._mapping[name], start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        return self._inner.window_bytes(self._mapping[name], elements)
