"""What a merged model is written as. A checkpoint of safetensors here; ONNX, which is slow to import, in onnx_forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ensemerge.merge.plan import Output
from ensemerge.weights.writer import SafetensorsWriter, TensorWriter


class Form(Protocol):
    """How tensors reach the disk."""

    def open(self, folder: Path, output: Output) -> TensorWriter:
        """A writer for all tensors of the output. Raises InvalidData, StructureMismatch."""
        ...

    def extra_bytes(self, output: Output) -> int:
        """What the writer holds in memory at most."""
        ...


@dataclass(frozen=True)
class SafetensorsForm:
    """`model.safetensors`, or shards and their index."""

    shard_bytes: int

    def open(self, folder: Path, output: Output) -> TensorWriter:
        return SafetensorsWriter(folder, output.layout, shard_bytes=self.shard_bytes, metadata={})

    def extra_bytes(self, output: Output) -> int:
        return 0
