"""Weights written in stretches, in any order, from any thread: the places of all are known before the first.

All writers take a layout, the names, shapes and dtypes of all tensors, and give one file per layout: the bytes do not
depend on how the stretches came. Files are not synced to disk; who publishes them does that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ensemerge.errors import InvalidData
from ensemerge.weights.raw import raw_bytes
from ensemerge.weights.reader import TensorInfo, check_stretch
from ensemerge.weights.safetensors import DTYPES, HEADER_BYTES_LIMIT, METADATA

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class TensorWriter(Protocol):
    """Where merged tensors go."""

    @property
    def total_bytes(self) -> int:
        """What all tensors have together, without headers."""
        ...

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Elements `start:start + n` of a tensor, `(n,)` in the layout's dtype; each once. Safe from several threads.

        Raises KeyError, IndexError, TypeError for what the layout does not have, InvalidData where the disk is full.
        """
        ...

    def keep(self, name: str) -> bool:
        """A tensor was written by an interrupted run with the same layout: whether it is still there."""
        ...

    def close(self) -> None:
        """Finish. Raises InvalidData where elements were never written."""
        ...

    def abandon(self) -> None:
        """Let go of everything after an error; what was written stays as it is."""
        ...


class Progress:
    """Which elements of a layout have been written, as counts."""

    def __init__(self, layout: Mapping[str, TensorInfo]) -> None:
        self.layout = dict(layout)
        self._left = {name: info.numel for name, info in layout.items()}
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.layout.values())

    def check(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Raises KeyError, IndexError, TypeError: the caller and the layout disagree."""
        info = self.layout[name]
        if tensor.dtype != info.dtype or tensor.device.type != "cpu":
            raise TypeError(
                f"tensor '{name}' is written as {info.dtype} on the CPU, not {tensor.dtype} {tensor.device}"
            )
        check_stretch(name, info, start, start + tensor.numel())

    def count(self, name: str, elements: int) -> None:
        with self._lock:
            self._left[name] -= elements

    def keep(self, name: str) -> None:
        with self._lock:
            self._left[name] = 0

    def finish(self, where: object) -> None:
        """Raises InvalidData where a tensor has not been written exactly once."""
        for name, left in self._left.items():
            if left:
                numel = self.layout[name].numel
                raise InvalidData(f"{where}: {numel - left} elements of tensor '{name}' were written, not all {numel}")


class PlacedFile:
    """A file whose size is settled and reserved at once, so that a full disk is known before the work is done.

    What a file of that name already holds stays (an interrupted run can go on), and is cut or grown to the size.
    Raises InvalidData where there is no space, where the folder takes no files, or where `path` is a link: what it
    leads to is someone else's.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            os.ftruncate(self._descriptor, size)
            if size:
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            self.close()
            raise _refused(error, path, size) from error

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data` at byte `offset`. Raises InvalidData where the disk is full."""
        try:
            while data:
                written = os.pwrite(self._descriptor, data, offset)  # the kernel takes at most 2 GiB at once
                data, offset = data[written:], offset + written
        except OSError as error:
            raise _refused(error, self.path, len(data)) from error

    def close(self) -> None:
        """Once is enough; more do no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_whole(path: Path, content: bytes) -> None:
    file = PlacedFile(path, len(content))
    try:
        file.write(0, memoryview(content))
    finally:
        file.close()


def _refused(error: OSError, path: Path, needed: int) -> InvalidData:
    if error.errno == errno.ELOOP:
        return InvalidData(f"{path} is a link, and is not written through; expected a file or nothing: remove it")
    if error.errno not in _FULL:
        return InvalidData(f"{path} cannot be written: {error.strerror}")
    free = shutil.disk_usage(path.parent).free
    return InvalidData(
        f"disk full: {path} needs {needed} bytes, {free} are free in {path.parent}; make room or choose another folder"
    )


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: the tensors in it, in the order in which they lie."""

    file: str
    layout: Mapping[str, TensorInfo]


class SafetensorsWriter:
    """A folder of safetensors: `model.safetensors`, or shards of at most `shard_bytes` and their index.

    Tensors are given to shards in the order of `layout`, each shard as full as it gets; a larger tensor is a shard of
    its own. Within a shard wide dtypes come first, so that every tensor is aligned. `metadata` goes into every file,
    with `format: pt`, which transformers ask for. Raises InvalidData where a dtype has no name in the format, where a
    name is the format's own, or where there is no space for all files; none is left behind then.
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, TensorInfo], *, shard_bytes: int, metadata: Mapping[str, str]
    ) -> None:
        _check_layout(layout)
        self._progress = Progress(layout)
        self._folder = folder
        self._shards = plan_shards(layout, shard_bytes)
        self._places: dict[str, tuple[PlacedFile, int]] = {}
        self._files: list[PlacedFile] = []
        created = [folder / shard.file for shard in self._shards if not (folder / shard.file).exists()]
        try:
            for shard in self._shards:
                self._open(shard, {"format": "pt", **metadata})
        except BaseException:
            self.abandon()
            for path in created:
                path.unlink(missing_ok=True)
            raise

    def _open(self, shard: Shard, metadata: Mapping[str, str]) -> None:
        header = encode_header(shard.layout, metadata)
        size = len(header) + sum(info.nbytes for info in shard.layout.values())
        file = PlacedFile(self._folder / shard.file, size)
        self._files.append(file)
        file.write(0, memoryview(header))
        offset = len(header)
        for name, info in shard.layout.items():
            self._places[name] = file, offset
            offset += info.nbytes

    @property
    def total_bytes(self) -> int:
        return self._progress.total_bytes

    @property
    def files(self) -> list[str]:
        """The names of all shards."""
        return [shard.file for shard in self._shards]

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        self._progress.check(name, start, tensor)
        file, offset = self._places[name]
        file.write(offset + start * tensor.dtype.itemsize, raw_bytes(tensor))
        self._progress.count(name, tensor.numel())

    def keep(self, name: str) -> bool:
        self._progress.keep(name)
        return True

    def close(self) -> None:
        self.abandon()
        self._progress.finish(self._folder)
        if len(self._shards) > 1:
            shards = {name: shard.file for shard in self._shards for name in shard.layout}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": shards}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            _write_whole(self._folder / "model.safetensors.index.json", text.encode())

    def abandon(self) -> None:
        for file in self._files:
            file.close()


class MemoryWriter:
    """Merged tensors as they are, for a caller who goes on working with them."""

    def __init__(self, layout: Mapping[str, TensorInfo]) -> None:
        self._progress = Progress(layout)
        self._tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in layout.items()}

    @property
    def total_bytes(self) -> int:
        return self._progress.total_bytes

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All tensors in their own shapes, by name, in the order of the layout."""
        return self._tensors

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        self._progress.check(name, start, tensor)
        self._tensors[name].view(-1)[start : start + tensor.numel()] = tensor.reshape(-1)
        self._progress.count(name, tensor.numel())

    def keep(self, name: str) -> bool:
        return False

    def close(self) -> None:
        self._progress.finish("in memory")

    def abandon(self) -> None:
        self._tensors = {}


def plan_shards(layout: Mapping[str, TensorInfo], shard_bytes: int) -> list[Shard]:
    """The files of a checkpoint, at least one."""
    groups = list(_fill(layout, shard_bytes)) or [[]]
    count = len(groups)
    files = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    ordered = [sorted(group, key=lambda name: -layout[name].dtype.itemsize) for group in groups]
    return [
        Shard(file if count > 1 else "model.safetensors", {name: layout[name] for name in group})
        for file, group in zip(files, ordered, strict=True)
    ]


def _fill(layout: Mapping[str, TensorInfo], shard_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, info in layout.items():
        if group and size + info.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += info.nbytes
    if group:
        yield group


def encode_header(layout: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file, a multiple of eight. Raises InvalidData where they are too many."""
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))}
    offset = 0
    for name, info in layout.items():
        offsets = [offset, offset + info.nbytes]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_LIMIT:
        raise InvalidData(f"the header of {len(layout)} tensors has {len(text)} bytes; expected smaller shards")
    return len(text).to_bytes(8, "little") + text


def _check_layout(layout: Mapping[str, TensorInfo]) -> None:
    for name, info in layout.items():
        if name == METADATA:
            raise InvalidData(f"a tensor cannot be called '{METADATA}': safetensors use that name for something else")
        if info.dtype not in _NAMES:
            raise InvalidData(f"tensor '{name}' is {info.dtype}; safetensors can hold {', '.join(map(str, _NAMES))}")
