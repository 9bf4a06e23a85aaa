"""An ONNX graph with other weights, written in stretches like every other format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from ensemerge.errors import InvalidData, InvalidModel, StructureMismatch
from ensemerge.graph.surgery import constant_nodes
from ensemerge.weights.arrays import to_array
from ensemerge.weights.onnx import DTYPES, OnnxWeights
from ensemerge.weights.raw import raw_bytes
from ensemerge.weights.reader import TensorInfo
from ensemerge.weights.writer import PlacedFile, Progress

INLINE_BYTES = 1 << 10  # below this a tensor is kept in the .onnx itself: shape inference wants to see shapes
ALIGNMENT = 4096  # runtimes map external data page by page
WHOLE_BYTES_LIMIT = 1 << 30  # protobuf ends at 2 GiB, and needs several times a message's size to write it

_ONNX = {dtype: onnx_dtype for onnx_dtype, dtype in DTYPES.items()}


class OnnxWriter:
    """The graph of `model`, unchanged, with the weights of `layout` written anew: initializers and Constant nodes.

    Weights from 1 KiB on go to `<stem>.onnx.data` beside `path`, smaller ones into the graph; with `external=False`
    all go into the graph. Weights of the graph that `layout` leaves out are carried over, and tied ones stay tied to
    the one that is written. `path` itself appears with `close`. `model` is not changed.

    Raises StructureMismatch where the layout has a name, a shape or a dtype that the graph does not have, InvalidData
    where there is no space or `external=False` and more than 1 GiB.
    """

    def __init__(
        self,
        path: Path,
        model: ir.Model,
        layout: Mapping[str, TensorInfo],
        *,
        source: Path | None = None,
        external: bool = True,
    ) -> None:
        """`source` is the file that `model` was loaded from, where its external data lies."""
        self._path = path
        self._model = model.clone()
        self._source = OnnxWeights(self._model, source)
        _check_layout(self._source, layout)
        self._progress = Progress(layout)
        self._carried = [name for name in self._source.names if name not in layout]
        self._tied = {
            name: kept for name, kept in self._source.ties.items() if name in self._carried and kept in layout
        }
        infos = {name: self._source.info(name) for name in self._source.names if name not in self._tied}
        self._offsets, size = _place(infos) if external else ({}, 0)
        self._inline = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items() if name not in self._offsets
        }
        if not external and sum(info.nbytes for info in infos.values()) > WHOLE_BYTES_LIMIT:
            raise InvalidData(
                f"{path}: the weights are too large for one file; expected at most {WHOLE_BYTES_LIMIT} bytes"
            )
        self._file = PlacedFile(self._data_path, size) if self._offsets else None
        self._carry_over()

    @property
    def _data_path(self) -> Path:
        return self._path.with_name(f"{self._path.stem}.onnx.data")

    @property
    def total_bytes(self) -> int:
        return self._progress.total_bytes

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        self._progress.check(name, start, tensor)
        self._put(name, start, tensor)
        self._progress.count(name, tensor.numel())

    def keep(self, name: str) -> bool:
        if name not in self._offsets:
            return False  # what lies in the graph is written last
        self._progress.keep(name)
        return True

    def close(self) -> None:
        self.abandon()
        self._progress.finish(self._path)
        constants = constant_nodes(self._model)
        for name in self._source.names:
            tensor = self._written(name)
            if name in constants:
                constants[name].attributes["value"] = ir.AttrTensor("value", tensor)
            else:
                self._model.graph.initializers[name].const_value = tensor
        ir.save(self._model, self._path)
        _check_file(self._path)

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()

    def _put(self, name: str, start: int, tensor: torch.Tensor) -> None:
        if name in self._offsets:
            assert self._file is not None  # it exists where anything is placed in it
            self._file.write(self._offsets[name] + start * tensor.dtype.itemsize, raw_bytes(tensor))
        else:
            self._inline[name].view(-1)[start : start + tensor.numel()] = tensor.reshape(-1)

    def _carry_over(self) -> None:
        for name in self._carried:
            if name in self._tied:
                continue
            numel, step = self._source.info(name).numel, 1 << 20
            for start in range(0, numel, step):
                stop = min(start + step, numel)
                self._put(name, start, self._source.window(name, start, stop))
                self._source.give_back(name, start, stop)

    def _written(self, name: str) -> ir.TensorProtocol:
        """What the graph says of a weight, now that it is written."""
        kept = self._tied.get(name, name)
        info = self._source.info(name)
        if kept not in self._offsets:
            return ir.tensor(to_array(self._inline[kept]), dtype=_ONNX[info.dtype], name=name)
        return ir.ExternalTensor(
            self._data_path.name,
            self._offsets[kept],
            info.nbytes,
            _ONNX[info.dtype],
            shape=ir.Shape(info.shape),
            name=name,
            base_dir=self._path.parent,
        )


def _place(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, int], int]:
    """The byte at which each large weight begins in the external file, and the file's size."""
    offsets: dict[str, int] = {}
    end = 0
    for name, info in infos.items():
        if info.nbytes >= INLINE_BYTES:
            offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offsets[name] + info.nbytes
    return offsets, end


def _check_layout(source: OnnxWeights, layout: Mapping[str, TensorInfo]) -> None:
    known = set(source.names)
    for name, info in layout.items():
        if name not in known:
            raise StructureMismatch(f"the graph has no weight '{name}' to replace")
        if info != (expected := source.info(name)):
            raise StructureMismatch(
                f"weight '{name}': the graph expects {expected.dtype} {list(expected.shape)}, "
                f"got {info.dtype} {list(info.shape)}"
            )


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise InvalidModel(f"the graph written to {path} is not valid ONNX: {error}") from error
