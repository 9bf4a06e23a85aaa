"""Weights in torch's own files (`.pt`, `.pth`, `.bin`), read without running what is in them.

Such a file is a pickle, a program that makes objects. It is read with `weights_only=True`, which makes tensors and
containers and refuses everything else.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ensemerge.errors import InvalidData
from ensemerge.weights.pages import Pages
from ensemerge.weights.reader import TensorInfo, check_stretch, most_rows, rows_of
from ensemerge.weights.shards import check_shard, read_index

SUFFIXES = (".pt", ".pth", ".bin")
FILE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
WRAPPERS = ("state_dict", "model_state_dict", "model")


class TorchWeights:
    """A torch file, or a folder with `pytorch_model.bin` or with several files and their index.

    Files since torch 1.6 are mapped; older ones are read into memory. A state dict within a checkpoint, under one of
    `WRAPPERS`, is found. Tensors that share their memory wholly are tied. Raises InvalidData for what is no state dict
    of plain tensors, and for a pickle that wants to run code, which it never does. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._maps: list[Pages] = []
        self._files: list[Path] = []
        self._resident = 0
        if path.is_dir() and not (path / FILE).is_file():
            self._add_shards(path / INDEX)
        elif path.name.endswith(".index.json"):
            self._add_shards(path)
        else:
            self._add(path / FILE if path.is_dir() else path)
        self._infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self._ties = find_ties(self._tensors)

    def _add_shards(self, index: Path) -> None:
        shards = read_index(index)
        self._files.append(index)
        for shard in sorted(set(shards.values())):
            check_shard(index, shards, shard, self._add(index.parent / shard))

    def _add(self, path: Path) -> list[str]:
        mapped = is_mappable(path)
        self._files.append(path)
        tensors = _check_tensors(path, unwrap(path, load_checkpoint(path, mapped)))
        self._tensors |= tensors
        if mapped:
            self._maps += _maps_of(path)
        else:
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
            self._resident += sum(storage.nbytes() for storage in storages.values())
        return list(tensors)

    @property
    def names(self) -> Sequence[str]:
        return list(self._tensors)

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def resident_bytes(self) -> int:
        return self._resident

    @property
    def files(self) -> Sequence[Path]:
        return self._files

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor, info = self._tensors[name], self._infos[name]
        check_stretch(name, info, start, stop)
        if tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        first, end, columns = rows_of(info, start, stop)
        return tensor[first:end].reshape(-1)[start - first * columns : stop - first * columns]

    def give_back(self, name: str, start: int, stop: int) -> None:
        tensor = self._tensors[name]
        if stop <= start:
            return
        if tensor.is_contiguous():
            address, nbytes = tensor.data_ptr() + start * tensor.itemsize, (stop - start) * tensor.itemsize
        else:  # its rows lie anywhere in the storage
            address, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        for pages in self._maps:
            if pages.holds(address, nbytes):
                pages.give_back(address, nbytes)

    def window_bytes(self, name: str, elements: int) -> int:
        tensor, info = self._tensors[name], self._infos[name]
        if tensor.is_contiguous():
            return 0
        rows, columns = most_rows(info, elements)
        mapped = tensor.untyped_storage().nbytes() if self._maps else 0  # rows lie anywhere in the storage
        return mapped + max(rows * columns - elements, 0) * info.dtype.itemsize


def is_mappable(path: Path) -> bool:
    """Whether torch can map the file: a zip archive of stored records in this machine's byte order.

    Raises InvalidData where it cannot be opened, or is an archive with tensors that torch would not have written.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            order = next((record for record in records if record.filename.endswith("/byteorder")), None)
            swapped = order is not None and archive.read(order)[:8] == b"big"
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise InvalidData(f"{path} cannot be read: {error}") from error
    # A map of a compressed record would be taken for the numbers themselves.
    if any(record.compress_type != zipfile.ZIP_STORED for record in records if "/data/" in record.filename):
        raise InvalidData(f"{path} is a compressed archive, which torch does not write; convert it to safetensors")
    return not swapped  # torch swaps in place: a page given back would come again unswapped


def load_checkpoint(path: Path, mapped: bool) -> Any:
    """What a torch file holds. Raises InvalidData."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to switch the protection off
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise InvalidData(
            f"{path} holds more than tensors{f' ({wanted[1]})' if wanted else ''} and was not loaded: torch files are "
            "read with weights_only=True, since a pickle can run any code; convert it to safetensors where you trust it"
        ) from error
    except Exception as error:  # torch raises anything from EOFError to AssertionError for a damaged file
        raise InvalidData(f"{path} is no torch file that can be read: {_first_line(error)}") from error


def unwrap(path: Path, content: Any) -> Mapping[Any, Any]:
    """The state dict of a checkpoint. Raises InvalidData where there is none, or more than one."""
    if not isinstance(content, Mapping):
        raise InvalidData(f"{path} holds a {type(content).__name__}; expected a state dict, names to tensors")
    inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    if not inner or any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    if len(inner) > 1:
        raise InvalidData(
            f"{path} holds {' and '.join(map(repr, inner))}; expected one state dict: save the one you mean"
        )
    found: Mapping[Any, Any] = content[inner[0]]
    return found


def find_ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each tensor that is the same memory, seen the same way, as an earlier one: the earlier name."""
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            kept = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
            if kept != name:
                ties[name] = kept
    return ties


def _check_tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """The entries of a state dict, detached. Raises InvalidData."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InvalidData(
                f"{path}: entry '{name}' is a {type(value).__name__}; expected tensors only: save the state dict alone"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise InvalidData(
                f"{path}: tensor '{name}' is {value.dtype}, {value.layout}, {value.device}; expected dense numbers"
            )
    if not state:
        raise InvalidData(f"{path} holds no tensors")
    return {name: value.detach() for name, value in state.items()}


def _maps_of(path: Path) -> list[Pages]:
    """Where in memory the file is mapped. Empty on a system that does not tell: pages are not given back there."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    # By name: device numbers are not comparable on every file system. Memory that is no file has no such name.
    places = [field[0].split("-") for field in fields if field[5:] == [str(path.resolve())]]
    return [Pages(int(first, 16), int(end, 16)) for first, end in places]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
