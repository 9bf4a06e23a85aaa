"""Weights without files: a reader and a writer in memory; and how much memory a call takes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from ensemerge.weights.reader import TensorInfo


class InMemory:
    """A reader that notes which windows are out, and refuses any use of a window that was given back."""

    files: Sequence[Path] = ()

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.ties: Mapping[str, str] = {}
        self.resident_bytes = 0
        self.out: list[tuple[str, int, int]] = []

    @property
    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.out.append((name, start, stop))
        return self.tensors[name].reshape(-1)[start:stop]

    def give_back(self, name: str, start: int, stop: int) -> None:
        self.out.remove((name, start, stop))

    def window_bytes(self, name: str, elements: int) -> int:
        return 0


class Collected:
    """A writer that keeps what it gets."""

    def __init__(self, layout: Mapping[str, TensorInfo]) -> None:
        self.tensors = {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in layout.items()}
        self.elements = dict.fromkeys(layout, 0)

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        assert tensor.dtype == self.tensors[name].dtype
        self.tensors[name].view(-1)[start : start + tensor.numel()] = tensor
        self.elements[name] += tensor.numel()


def peak_bytes_of(call: Callable[[], object]) -> int:
    """How far the process's memory rises while `call` runs; its result counts as well."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError as error:
        pytest.skip(f"the kernel does not forget a peak: {error}")
    before = _status_bytes("VmRSS:")
    held = call()
    peak = _status_bytes("VmHWM:")
    del held
    return peak - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10
