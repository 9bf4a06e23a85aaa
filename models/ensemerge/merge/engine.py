"""Run a merge method over all tensors of several models, one name at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ensemerge.errors import InvalidModel
from ensemerge.merge.methods import Method
from ensemerge.weights.reader import WeightReader


def merge_weights(
    readers: Sequence[WeightReader], weights: Sequence[float], method: Method
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the first reader, merged with its namesakes in the others.

    Tensors of integers and booleans (counters, shapes, positions) have no average: they must be equal and are copied.
    Raises InvalidModel for integers that differ and for weights that are not finite.
    """
    for name in readers[0].names:
        tensors = [reader.read(name) for reader in readers]
        if tensors[0].is_floating_point():
            _refuse_non_finite(name, tensors)
            yield name, method(tensors, weights)
        else:
            _refuse_different(name, tensors)
            yield name, tensors[0]


def _refuse_non_finite(name: str, tensors: Sequence[torch.Tensor]) -> None:
    for position, tensor in enumerate(tensors):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidModel(f"weight '{name}' of model {position} holds NaN or infinity; expected finite numbers")


def _refuse_different(name: str, tensors: Sequence[torch.Tensor]) -> None:
    if not all(torch.equal(tensors[0], tensor) for tensor in tensors):
        raise InvalidModel(f"integers '{name}' differ between the models; expected equal ones, they cannot be averaged")
