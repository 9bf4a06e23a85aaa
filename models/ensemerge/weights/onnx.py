"""The weights of an ONNX graph: initializers, and constants that an exporter kept as nodes.

What lies in external files is read from there in stretches. What lies in the .onnx itself is in memory anyway, since a
graph is loaded whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from ensemerge.errors import InvalidModel
from ensemerge.graph.surgery import constant_nodes
from ensemerge.weights.arrays import to_tensor
from ensemerge.weights.file import WeightFile
from ensemerge.weights.reader import TensorInfo, check_stretch
from ensemerge.weights.shards import leaves_folder

DTYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


@dataclass(frozen=True)
class _Place:
    file: WeightFile
    offset: int


class OnnxWeights:
    """The weights of a graph: its initializers, then its `Constant` nodes with tensors under their outputs' names.

    `path` is the file that the graph came from, None for one that was made in memory. Two initializers at one place of
    an external file are tied. Strings are no weights and are left out: the graph keeps them. Raises InvalidModel for
    an initializer without a value, an element type that torch does not have, and for external data that is missing,
    too short, or outside the model's folder. Safe to use from several threads.
    """

    def __init__(self, model: ir.Model, path: Path | None) -> None:
        self._infos: dict[str, TensorInfo] = {}
        self._placed: dict[str, _Place] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._ties: dict[str, str] = {}
        self._path = path
        self._external: dict[str, WeightFile] = {}
        self._first: dict[tuple[object, ...], str] = {}
        for name, tensor in weight_tensors(model):
            if tensor.dtype != ir.DataType.STRING:
                self._infos[name] = _info(name, tensor)
                self._add(name, tensor, path)

    def _add(self, name: str, tensor: ir.TensorProtocol, path: Path | None) -> None:
        info = self._infos[name]
        if not isinstance(tensor, ir.ExternalTensor) or not info.numel:
            self._arrays[name] = tensor.numpy().reshape(-1)
            return
        folder = Path(tensor.base_dir) if path is None else path.parent
        place = self._placed_at(name, tensor, folder, path)
        self._placed[name] = place
        first = self._first.setdefault((place.file.path, place.offset, info), name)
        if first != name:
            self._ties[name] = first

    def _placed_at(self, name: str, tensor: ir.ExternalTensor, folder: Path, path: Path | None) -> _Place:
        location = os.fspath(tensor.location)
        file = self._external.get(location)
        if file is None:
            file = self._external[location] = _open_external(name, location, folder, path)
        offset, nbytes = tensor.offset or 0, self._infos[name].nbytes
        length = nbytes if tensor.length is None else tensor.length
        if length != nbytes:
            raise InvalidModel(f"weight '{name}' has {nbytes} bytes, but {length} in '{location}'; export it again")
        if offset < 0 or offset + length > file.size:
            raise InvalidModel(
                f"weight '{name}' lies at bytes {offset} to {offset + length} of '{location}', which has {file.size}; "
                "the file is cut off or belongs to another model"
            )
        return _Place(file, offset)

    @property
    def names(self) -> Sequence[str]:
        return list(self._infos)

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def resident_bytes(self) -> int:
        # protobuf keeps the bytes that it parsed, and hands out copies
        return 2 * sum(array.nbytes for array in self._arrays.values())

    @property
    def files(self) -> Sequence[Path]:
        graph = [] if self._path is None else [self._path]
        return [*graph, *(file.path for file in self._external.values())]

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self._infos[name]
        check_stretch(name, info, start, stop)
        place = self._placed.get(name)
        if place is None:
            return to_tensor(self._arrays[name][start:stop])
        return place.file.window(place.offset + start * info.dtype.itemsize, stop - start, info.dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        pass  # a window is memory of its own

    def window_bytes(self, name: str, elements: int) -> int:
        return 0


def read_onnx(path: Path) -> OnnxWeights:
    """The weights of an ONNX file. Raises InvalidModel."""
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise a dozen unrelated types for a damaged file
        raise InvalidModel(f"{path} is no ONNX model that can be read: {error}") from error
    return OnnxWeights(model, path)


def weight_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor that the graph holds, by name. Raises InvalidModel for an initializer without a value."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise InvalidModel(f"weight '{name}' has no value; expected an initializer with data")
        yield name, value.const_value
    for name, node in constant_nodes(model).items():
        yield name, node.attributes["value"].as_tensor()


def _info(name: str, tensor: ir.TensorProtocol) -> TensorInfo:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidModel(
            f"weight '{name}' is {tensor.dtype}, which cannot be merged; expected one of "
            f"{', '.join(str(known) for known in DTYPES)}"
        )
    return TensorInfo(tuple(tensor.shape.numpy()), dtype)


def _open_external(name: str, location: str, folder: Path, path: Path | None) -> WeightFile:
    """Open an external file of the model's folder. Raises InvalidModel.

    External data is bytes without a header: a path, or a link, out of the folder would turn any file of the machine
    into weights. A link is followed where the model itself is one and leads to the same folder (Hugging Face's cache).
    """
    if leaves_folder(location):
        raise InvalidModel(f"weight '{name}' is said to be in '{location}'; expected a file in the model's folder")
    file = folder / location
    if not file.is_file():
        raise InvalidModel(f"weight '{name}' is in '{location}', which is missing from {folder}; copy it there")
    folders = [folder.resolve()] if path is None else [folder.resolve(), path.resolve().parent]
    if not any(file.resolve().is_relative_to(allowed) for allowed in folders):
        raise InvalidModel(f"weight '{name}' is in '{location}', a link out of the model's folder; copy the file there")
    return WeightFile(file)
