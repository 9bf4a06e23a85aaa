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

    Raises InvalidModel for NaN, for integers that differ (they have no average), and for a result that is not finite.
    """
    for name in readers[0].names:
        tensors = [reader.read(name) for reader in readers]
        _refuse_nan(name, tensors)
        # Counters and shapes, and masks, which hold infinities: what is equal everywhere is copied, without a rounding.
        if all(torch.equal(tensors[0], tensor) for tensor in tensors):
            yield name, tensors[0]
        else:
            yield name, _merged(name, tensors, weights, method)


def _merged(name: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], method: Method) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        raise InvalidModel(f"integers '{name}' differ between the models; they have no average, expected equal ones")
    merged = method(tensors, weights)
    if not bool(torch.isfinite(merged).all()):
        raise InvalidModel(
            f"merging '{name}' gives values that are not finite; expected finite weights, in a range that "
            f"{merged.dtype} holds"
        )
    return merged


def _refuse_nan(name: str, tensors: Sequence[torch.Tensor]) -> None:
    for position, tensor in enumerate(tensors):
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise InvalidModel(f"weight '{name}' of model {position} holds NaN; expected numbers")
