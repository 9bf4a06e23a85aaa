"""Weights in safetensors files, read as maps of the files.

The format (https://github.com/huggingface/safetensors, README, "Format"): eight bytes with the length of a header,
the header in JSON, the tensors' bytes without holes. The official library hands out whole tensors; a bound on memory
needs windows, so the header is read here, and every figure in it is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ensemerge.errors import InvalidData
from ensemerge.weights.file import WeightFile
from ensemerge.weights.reader import TensorInfo, check_stretch
from ensemerge.weights.shards import check_shard, parse_json, read_index

HEADER_BYTES_LIMIT = 100_000_000  # the format's own
METADATA = "__metadata__"
SUFFIX = ".safetensors"
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT puts it beside a model's own
INDEX_SUFFIX = ".safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what it is, and the byte of the file at which it begins."""

    info: TensorInfo
    offset: int


class SafetensorsWeights:
    """A safetensors file, or a folder with one or with several and their index. Safe to use from several threads.

    `path` is the file or the folder. Tensors come in the order in which they lie on disk. There are no ties: writers
    of safetensors leave tied tensors out. Raises InvalidData where a header or an index cannot be true. The files must
    not be shortened while they are read (see `WeightFile`).
    """

    def __init__(self, path: Path) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[WeightFile, Entry]] = {}
        self._files: list[Path] = []
        index = find_index(path)
        if index is None:
            self._add(find_file(path))
            return
        shards = read_index(index)
        self._files.append(index)
        for shard in sorted(set(shards.values())):
            check_shard(index, shards, shard, self._add(index.parent / shard))

    def _add(self, path: Path) -> list[str]:
        file = WeightFile(path)
        self._files.append(path)
        entries, metadata = read_header(file)
        self.metadata |= metadata
        for name in entries.keys() & self._places.keys():
            raise InvalidData(f"{path} holds tensor '{name}', as {self._places[name][0].path} does; expected it once")
        self._places |= {name: (file, entry) for name, entry in entries.items()}
        return list(entries)

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    @property
    def ties(self) -> Mapping[str, str]:
        return {}

    @property
    def resident_bytes(self) -> int:
        return 0

    @property
    def files(self) -> Sequence[Path]:
        return self._files

    def info(self, name: str) -> TensorInfo:
        return self._places[name][1].info

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        file, entry = self._places[name]
        check_stretch(name, entry.info, start, stop)
        size = entry.info.dtype.itemsize
        return file.window(entry.offset + start * size, stop - start, entry.info.dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        pass  # a window is memory of its own

    def window_bytes(self, name: str, elements: int) -> int:
        return 0


def find_index(path: Path) -> Path | None:
    """The index in a folder, or `path` if it is one; None where the weights are one file. Raises InvalidData."""
    if not path.is_dir():
        return path if path.name.endswith(INDEX_SUFFIX) else None
    if (path / f"model{SUFFIX}").is_file():
        return None
    found = sorted(file for file in path.iterdir() if file.name.endswith(INDEX_SUFFIX))
    if len(found) > 1:
        raise InvalidData(f"{path} has several indices: {', '.join(file.name for file in found)}; name one of them")
    return found[0] if found else None


def find_file(path: Path) -> Path:
    """The only safetensors file of a folder, `model.safetensors` first, or `path` itself. Raises InvalidData."""
    if not path.is_dir():
        return path
    if (path / f"model{SUFFIX}").is_file():
        return path / f"model{SUFFIX}"
    found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIX) and file.name != ADAPTER_FILE)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(file.name for file in found) or "none"
    raise InvalidData(f"{path}: expected model{SUFFIX}, one *{INDEX_SUFFIX} or a single *{SUFFIX}, got {listed}")


def read_header(file: WeightFile) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata. Raises InvalidData."""
    header, data = _header(file)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidData(f"{file.path}: {METADATA} is {metadata!r:.80}; expected an object of strings")
    entries = {name: _entry(f"{file.path}: tensor '{name}'", value, data) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)))
    _check_cover(file, ordered, data)
    return ordered, metadata


def _header(file: WeightFile) -> tuple[dict[str, Any], int]:
    """The header's object, and the byte at which the data begins."""
    if file.size < 8:
        raise InvalidData(f"{file.path} has {file.size} bytes; a safetensors file has at least 8. Download it again")
    length = int.from_bytes(file.window(0, 8, torch.uint8).numpy().tobytes(), "little")
    if length > HEADER_BYTES_LIMIT:
        raise InvalidData(
            f"{file.path} says that its header has {length} bytes; at most {HEADER_BYTES_LIMIT} are allowed. "
            "Is it a safetensors file?"
        )
    if 8 + length > file.size:
        raise InvalidData(
            f"{file.path} says that its header has {length} bytes, but the file has {file.size}; it is no safetensors "
            "file, or cut off: download it again"
        )
    text = file.window(8, length, torch.uint8).numpy().tobytes()
    header = parse_json(text, f"the header of {file.path}")
    if not isinstance(header, dict):
        raise InvalidData(f"the header of {file.path} is {header!r:.80}; expected an object of tensors")
    return header, 8 + length


def _entry(where: str, value: object, data: int) -> Entry:
    """One tensor of the header. Raises InvalidData."""
    if not isinstance(value, dict):
        raise InvalidData(f"{where}: expected an object, got {value!r:.80}")
    name = value.get("dtype")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise InvalidData(f"{where}: dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    shape = _counts(f"{where}: 'shape'", value.get("shape"))
    offsets = _counts(f"{where}: 'data_offsets'", value.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidData(f"{where}: 'data_offsets' is {list(offsets)}; expected a begin and an end not before it")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise InvalidData(
            f"{where}: {name} {list(shape)} has {nbytes} bytes, but its offsets {list(offsets)} span others"
        )
    return Entry(TensorInfo(shape, dtype), data + offsets[0])


def _counts(where: str, value: object) -> tuple[int, ...]:
    # In Python True is an int. No size above 2^63 − 1 can be meant, not even beside a zero.
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise InvalidData(f"{where} is {value!r:.80}; expected a list of whole numbers that are not negative")
    return tuple(value)


def _check_cover(file: WeightFile, ordered: Mapping[str, Entry], data: int) -> None:
    """Each tensor begins where the one before it ends, and the last ends with the file. Raises InvalidData."""
    end, before = data, "the header"
    for name, entry in ordered.items():
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a hole after"
            raise InvalidData(
                f"{file.path}: tensor '{name}' begins at byte {entry.offset - data} and {what} {before}, which ends at "
                f"{end - data}; expected no holes and no overlaps"
            )
        end, before = entry.offset + entry.info.nbytes, f"tensor '{name}'"
    if end != file.size:
        hint = "it is cut off: download it again" if end > file.size else "expected nothing after the last tensor"
        raise InvalidData(f"{file.path} has {file.size} bytes, but its tensors end at {end} ({before}); {hint}")
