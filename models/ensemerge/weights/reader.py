"""The one way to read weights. A preparation (pairing by structure, alignment) is a reader around a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from ensemerge.errors import InvalidModel


class WeightReader(Protocol):
    """Named tensors, opened lazily."""

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors, in a fixed order."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, which the caller must not change. Raises KeyError."""
        ...


class OnnxWeights:
    """The initializers of an ONNX graph; those in external files stay on disk until they are read."""

    def __init__(self, model: ir.Model) -> None:
        self._initializers = model.graph.initializers

    @property
    def names(self) -> Sequence[str]:
        return list(self._initializers)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._initializers[name].const_value
        if tensor is None:
            raise InvalidModel(f"weight '{name}' has no value; expected an initializer with data")
        return to_tensor(tensor.numpy())


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own with the values of `array`, which may be a read-only map of a file."""
    if array.dtype == ml_dtypes.bfloat16:  # a dtype that numpy alone does not know
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The values of `tensor` as an array; `to_tensor` the other way round."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class RenamedWeights:
    """A reader under the names of another: `mapping` leads from the new name to the wrapped reader's own."""

    def __init__(self, inner: WeightReader, mapping: Mapping[str, str]) -> None:
        self._inner = inner
        self._mapping = mapping

    @property
    def names(self) -> Sequence[str]:
        return list(self._mapping)

    def read(self, name: str) -> torch.Tensor:
        return self._inner.read(self._mapping[name])
