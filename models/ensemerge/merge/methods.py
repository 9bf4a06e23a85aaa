"""Merge methods: pure functions from the tensors of one name to the merged tensor.

A method knows tensors and nothing else. All inputs have one shape and a floating dtype; the result has the dtype of
the first. Arithmetic is in float32 at least and rounded once, since a running sum in bfloat16 loses a bit with
every model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ensemerge.errors import InvalidSpec

Method = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weight averaging: `sum(w_k θ_k) / sum(w_k)` (Wortsman et al. 2022, arXiv 2203.05482). Raises InvalidSpec."""
    total = sum(weights)
    if abs(total) < 1e-8:
        raise InvalidSpec(f"the weights {list(weights)} sum to {total}; expected a sum that is not zero")
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    merged = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        merged.add_(tensor.to(wide), alpha=weight)
    return merged.div_(total).to(tensors[0].dtype)


METHODS: dict[str, Method] = {"linear": linear}
