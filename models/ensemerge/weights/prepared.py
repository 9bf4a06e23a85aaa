"""Readers around readers: other axes, other rows, another dtype, computed for each window alone.

A tensor of which a window is wanted is never made whole, so a bound on memory holds with them as without.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ensemerge.errors import InvalidData
from ensemerge.weights.reader import TensorInfo, WeightReader, WrappedWeights, check_stretch, most_rows, rows_of

MANY_RUNS = 4096  # of rows per window: one look at the whole tensor is then quicker than so many reads
INDEX_BYTES = 40  # the most that finding a row's place takes: whole numbers of 8 bytes, a few at a time


class PermutedWeights(WrappedWeights):
    """A reader whose axes are re-indexed: `maps[name][axis]` gives for each index of the axis the index in `inner`.

    Any index array will do, permutations among them; its length is the axis' size. The maps of a residual network keep
    its function where they agree (Ainsworth et al. 2022, arXiv 2209.04836); whether they do is not checked here.
    Raises InvalidData where a map names an axis or an index that the tensor does not have.
    """

    def __init__(self, inner: WeightReader, maps: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        super().__init__(inner)
        self._maps = {
            name: {axis: _index(name, indices) for axis, indices in m.items()} for name, m in maps.items() if m
        }
        self._infos = {name: _reindexed(name, inner.info(name), m) for name, m in self._maps.items()}
        self._ties = {new: old for new, old in inner.ties.items() if _equal_maps(self._maps, new, old)}
        self._runs = {name: _count_runs(m[0]) if 0 in m else 1 for name, m in self._maps.items()}

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def resident_bytes(self) -> int:
        held = sum(indices.nbytes for axes in self._maps.values() for indices in axes.values())
        return self._inner.resident_bytes + held

    def info(self, name: str) -> TensorInfo:
        return self._infos[name] if name in self._infos else self._inner.info(name)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._maps:
            return self._inner.window(name, start, stop)
        info, maps = self._infos[name], self._maps[name]
        check_stretch(name, info, start, stop)
        first, end, columns = rows_of(info, start, stop)
        rows = gather_rows(self._inner, name, maps[0][first:end] if 0 in maps else np.arange(first, end))
        for axis in sorted(maps.keys() - {0}):
            rows = rows.index_select(axis, torch.from_numpy(maps[axis]))
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def give_back(self, name: str, start: int, stop: int) -> None:
        if name not in self._maps:  # the others were copied, and what they came from was given back at once
            self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        if name not in self._maps:
            return self._inner.window_bytes(name, elements)
        info, maps = self._inner.info(name), self._maps[name]
        count, _ = most_rows(self._infos[name], elements)
        shape = [count, *info.shape[1:]]
        steps = [math.prod(shape)]
        for axis in sorted(maps.keys() - {0}):
            shape[axis] = len(maps[axis])
            steps.append(math.prod(shape))
        selected = max((one + next_ for one, next_ in pairwise(steps)), default=steps[0]) * info.dtype.itemsize
        runs = self._runs[name]
        gathered = steps[0] * info.dtype.itemsize + gather_bytes(self._inner, name, count, runs)
        return max(selected, gathered) - elements * info.dtype.itemsize + count * INDEX_BYTES


@dataclass(frozen=True)
class Row:
    """One row of a tensor of some reader, which need not be the wrapped one."""

    reader: WeightReader
    tensor: str
    row: int


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a tensor come from: a vocabulary in another order, with tokens that the model did not have.

    `index`, `(rows,) int64`: for each row the row of the wrapped tensor, or −1 for zeros. `made` says of single rows,
    by their number, what they are instead: the mean of the given rows, or the one that is given.
    """

    index: np.ndarray
    made: Mapping[int, Sequence[Row]] = field(default_factory=dict)


class RowMappedWeights(WrappedWeights):
    """A reader some of whose tensors have other rows. Rows of other dtypes are rounded to the tensor's own, once.

    Raises InvalidData where a map names a row that a tensor does not have, or a row of another length.
    """

    def __init__(self, inner: WeightReader, rows: Mapping[str, RowMap]) -> None:
        super().__init__(inner)
        self._rows = dict(rows)
        self._made = {name: sorted(map_.made) for name, map_ in rows.items()}
        self._given = {name: _distinct(map_.made) for name, map_ in rows.items()}
        self._runs = {name: _count_runs(map_.index) for name, map_ in rows.items()}
        self._infos = {name: _mapped_info(name, inner.info(name), map_) for name, map_ in rows.items()}
        self._ties = {new: old for new, old in inner.ties.items() if self._rows.get(new) is self._rows.get(old)}

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def resident_bytes(self) -> int:
        return self._inner.resident_bytes + sum(map_.index.nbytes for map_ in self._rows.values())

    @property
    def files(self) -> Sequence[Path]:
        given = (row.reader for rows in self._given.values() for row in rows)
        return list(dict.fromkeys(file for reader in (self._inner, *given) for file in reader.files))

    def info(self, name: str) -> TensorInfo:
        return self._infos[name] if name in self._infos else self._inner.info(name)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self._rows:
            return self._inner.window(name, start, stop)
        info = self._infos[name]
        check_stretch(name, info, start, stop)
        first, end, columns = rows_of(info, start, stop)
        rows = self._copied(name, first, end)
        made = self._made[name]
        for row in made[bisect_left(made, first) : bisect_left(made, end)]:
            rows[row - first] = _mean_row(self._rows[name].made[row]).to(info.dtype)
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def _copied(self, name: str, first: int, end: int) -> torch.Tensor:
        info = self._infos[name]
        index = self._rows[name].index[first:end]
        rows = torch.zeros((end - first, *info.shape[1:]), dtype=info.dtype)
        there = np.flatnonzero(index >= 0)
        if there.size:
            rows[torch.from_numpy(there)] = gather_rows(self._inner, name, index[there])
        return rows

    def give_back(self, name: str, start: int, stop: int) -> None:
        if name not in self._rows:
            self._inner.give_back(name, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        if name not in self._rows:
            return self._inner.window_bytes(name, elements)
        info, given = self._infos[name], self._given[name]
        count, columns = most_rows(info, elements)
        rows = count * columns * info.dtype.itemsize
        gathered = rows + gather_bytes(self._inner, name, count, self._runs[name])
        # Of a row's sources all stay until their mean, in float64, is made.
        each = [columns * row.reader.info(row.tensor).dtype.itemsize for row in given]
        one = max((gather_bytes(row.reader, row.tensor, 1, 1) for row in given), default=0)
        most = max(map(len, self._rows[name].made.values()), default=0)
        averaged = most * max(each, default=0) + one + 3 * 8 * columns * (most > 0)
        return rows + max(gathered, averaged) - elements * info.dtype.itemsize + count * INDEX_BYTES


class CastWeights(WrappedWeights):
    """A reader whose floating tensors are rounded to `dtype` as they are read; other tensors stay as they are."""

    def __init__(self, inner: WeightReader, dtype: torch.dtype) -> None:
        super().__init__(inner)
        self._dtype = dtype

    def info(self, name: str) -> TensorInfo:
        info = self._inner.info(name)
        return TensorInfo(info.shape, self._dtype) if info.dtype.is_floating_point else info

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._inner.window(name, start, stop).to(self.info(name).dtype)

    def window_bytes(self, name: str, elements: int) -> int:
        dtype = self._inner.info(name).dtype
        read = 0 if dtype == self.info(name).dtype else elements * dtype.itemsize
        return read + self._inner.window_bytes(name, elements)


def gather_rows(reader: WeightReader, name: str, index: np.ndarray) -> torch.Tensor:
    """Some rows of a tensor, `(rows, …)`, copied; the reader has its pages back."""
    info = reader.info(name)
    _, _, columns = rows_of(info, 0, info.numel)
    breaks = np.flatnonzero(np.diff(index) != 1)
    if len(breaks) >= MANY_RUNS or info.numel <= MANY_RUNS:
        return _gather_whole(reader, name, index)
    gathered = torch.empty((len(index), columns), dtype=info.dtype)
    for begin, end in pairwise([0, *(breaks + 1).tolist(), len(index)]):
        start = int(index[begin]) * columns
        stop = start + (end - begin) * columns
        gathered[begin:end].view(-1).copy_(reader.window(name, start, stop))
        reader.give_back(name, start, stop)
    return gathered.view(len(index), *info.shape[1:])


def gather_bytes(reader: WeightReader, name: str, count: int, runs: int) -> int:
    """The most that gathering so many rows, in at most so many runs, takes beside the rows and what finds them."""
    info = reader.info(name)
    _, _, columns = rows_of(info, 0, info.numel)
    whole = min(count, runs) > MANY_RUNS or info.numel <= MANY_RUNS
    elements = info.numel if whole else min(count * columns, info.numel)
    return elements * info.dtype.itemsize + reader.window_bytes(name, elements)


def _count_runs(index: np.ndarray) -> int:
    """Of rows that follow one another; a stretch of the index has no more, with or without its entries of −1."""
    return int(np.count_nonzero(np.diff(index) != 1)) + 1


def _gather_whole(reader: WeightReader, name: str, index: np.ndarray) -> torch.Tensor:
    info = reader.info(name)
    whole = reader.window(name, 0, info.numel).view(info.shape)
    gathered = whole[torch.from_numpy(index)]
    reader.give_back(name, 0, info.numel)
    return gathered


def _mean_row(sources: Sequence[Row]) -> torch.Tensor:
    rows = [gather_rows(source.reader, source.tensor, np.array([source.row]))[0] for source in sources]
    if len(rows) == 1:
        return rows[0]
    total = rows[0].to(torch.float64)
    for row in rows[1:]:
        total += row
    return total / len(rows)


def _distinct(made: Mapping[int, Sequence[Row]]) -> list[Row]:
    """One row of each tensor that rows are taken from."""
    found = {(id(row.reader), row.tensor): row for sources in made.values() for row in sources}
    return list(found.values())


def _index(name: str, indices: np.ndarray) -> np.ndarray:
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise InvalidData(
            f"tensor '{name}': a map is {indices.dtype} {list(indices.shape)}; expected whole numbers, one axis"
        )
    return np.ascontiguousarray(indices, np.int64)


def _check_indices(name: str, axis: int, size: int, indices: np.ndarray, lowest: int) -> None:
    if indices.size and not lowest <= indices.min() <= indices.max() < size:
        raise InvalidData(
            f"tensor '{name}': a map of axis {axis} leads to {indices.min()} and {indices.max()}; "
            f"expected {lowest} to {size - 1}"
        )


def _reindexed(name: str, info: TensorInfo, maps: Mapping[int, np.ndarray]) -> TensorInfo:
    shape = list(info.shape)
    for axis, indices in maps.items():
        if not 0 <= axis < len(shape):
            raise InvalidData(
                f"tensor '{name}' has shape {list(info.shape)}; expected a map of one of its axes, not {axis}"
            )
        _check_indices(name, axis, shape[axis], indices, 0)
        shape[axis] = len(indices)
    return TensorInfo(tuple(shape), info.dtype)


def _equal_maps(maps: Mapping[str, Mapping[int, np.ndarray]], name: str, other: str) -> bool:
    ours, theirs = maps.get(name, {}), maps.get(other, {})
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[axis], theirs[axis]) for axis in ours)


def _mapped_info(name: str, info: TensorInfo, rows: RowMap) -> TensorInfo:
    if not info.shape:
        raise InvalidData(f"tensor '{name}' has no axes; expected rows to map")
    _check_indices(name, 0, info.shape[0], _index(name, rows.index), -1)
    for number, sources in rows.made.items():
        if not 0 <= number < len(rows.index) or not sources:
            raise InvalidData(f"tensor '{name}': row {number} is made of {len(sources)} rows; expected one of its rows")
        for source in sources:
            other = source.reader.info(source.tensor)
            if other.shape[1:] != info.shape[1:] or not 0 <= source.row < other.shape[0]:
                raise InvalidData(
                    f"tensor '{name}' {list(info.shape)}: row {number} is taken from row {source.row} of "
                    f"'{source.tensor}' {list(other.shape)}; expected a row of the same length"
                )
    return TensorInfo((len(rows.index), *info.shape[1:]), info.dtype)
