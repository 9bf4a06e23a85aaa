"""The workshop's only door to ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

# ONNX Runtime sends its maker usage data unless this is set before it is loaded. Whoever wants to can say 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from ensemerge.errors import ExecutionFailed, InvalidData, InvalidModel

Arrays = Mapping[str, np.ndarray]


class Runner:
    """A network ready to run on the CPU, whole arrays at a time, in batches of `batch_rows`.

    One that was exported for a fixed number of rows gets batches of so many, `fixed_rows`.
    Raises InvalidModel when ONNX Runtime does not accept the graph.
    """

    def __init__(self, model: ir.Model | Path, *, batch_rows: int = 256) -> None:
        source = str(model) if isinstance(model, Path) else _serialized(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise InvalidModel(f"ONNX Runtime does not accept the model: {error}") from error
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.fixed_rows = fixed_rows(list(self.inputs.values()))
        self._batch_rows = self.fixed_rows or batch_rows
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Arrays, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run the network on `feeds`, arrays `(rows, …)` by input name; the outputs come back `(rows, …)`."""
        names = list(outputs or self.outputs)
        parts = list(self.batches(feeds, names))
        return {name: _joined(name, [part[name] for part in parts]) for name in names}

    def batches(self, feeds: Arrays, outputs: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """The outputs batch by batch, for results too large to keep. Raises InvalidData, ExecutionFailed."""
        rows = self._rows(feeds)
        for start in range(0, rows, self._batch_rows):
            batch = {name: array[start : start + self._batch_rows] for name, array in feeds.items()}
            try:
                values = self._session.run(list(outputs), batch)
            except Exception as error:
                raise ExecutionFailed(f"the model failed on rows {start} and up: {error}") from error
            yield dict(zip(outputs, values, strict=True))

    def _rows(self, feeds: Arrays) -> int:
        if set(feeds) != set(self.inputs):
            raise InvalidData(f"expected arrays for {sorted(self.inputs)}, got {sorted(feeds)}")
        counts = {len(array) if array.ndim else 0 for array in feeds.values()}
        if len(counts) != 1 or 0 in counts:
            shapes = {name: array.shape for name, array in feeds.items()}
            raise InvalidData(f"expected arrays with one number of rows, at least 1; got {shapes}")
        (rows,) = counts
        if self.fixed_rows and rows % self.fixed_rows:
            raise InvalidData(f"the model takes {self.fixed_rows} rows at once; expected a multiple, got {rows} rows")
        return rows


def fixed_rows(shapes: Sequence[Sequence[object]]) -> int | None:
    """How many rows inputs of these shapes have; None where their number may vary."""
    first = {shape[0] if shape else None for shape in shapes}
    (rows,) = first if len(first) == 1 else (None,)
    return rows if isinstance(rows, int) else None


def _joined(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The answers of all batches as one. Raises InvalidModel for an output that has no rows."""
    if not all(isinstance(part, np.ndarray) for part in parts):
        raise InvalidModel(f"output '{name}' is no tensor; expected an answer for each row")
    if len(parts) == 1:
        return parts[0]
    if not all(part.ndim for part in parts):
        raise InvalidModel(f"output '{name}' is one number for all rows of a batch; expected an answer for each row")
    return np.concatenate(parts)


def _serialized(model: ir.Model) -> bytes:
    """A graph with its weights inside: bytes have no folder in which external files could lie."""
    return ir.to_proto(ir.external_data.load_to_model(model)).SerializeToString()
