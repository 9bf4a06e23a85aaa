"""What a merge method is: a few surveys over all blocks of a tensor, then one combination per block.

A block is a stretch of one tensor in every model, small enough for a processor's cache. Its borders depend on the
tensor alone, never on memory or threads, so every sum has one order and every merge one result. What a method must
know about a whole tensor (a dot product, a k-th magnitude) it asks for in a `Survey`; `combine` then needs the block
and what the surveys found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

CPU = torch.device("cpu")
# Weights beyond it are none: masks hold such numbers, or infinities, and sums of their squares have no end.
LARGEST = 1e18


class NotFinite(Exception):
    """A model's block holds NaN or infinity; the engine, which alone sees the file's own values, says what follows."""

    def __init__(self, model: int | None) -> None:
        super().__init__(model)
        self.model = model  # None is the base


class Grain(Enum):
    """What must not be split between blocks."""

    ELEMENT = "element"  # nothing: blocks are flat, `(elements,)`
    ROW = "row"  # a stretch along the last axis: blocks are `(rows, columns)`
    FILTER = "filter"  # an entry of axis 0, a vector being one: blocks are `(filters, elements of one)`
    TENSOR = "tensor"  # the tensor: one block in the tensor's own shape


class Scope(Enum):
    """Over what a survey sums."""

    TENSOR = "tensor"
    MODEL = "model"  # over all tensors whose methods ask an equal survey


@dataclass(frozen=True)
class Place:
    """Where a block lies: the merged tensor's name, the flat index of its first element, the tensor's elements."""

    tensor: str
    start: int
    numel: int
    device: torch.device = CPU  # on which the block's tensors are


class Block:
    """One stretch of one tensor: of the models, and of the base where the method has one.

    Reading a value raises NotFinite where it holds NaN or infinity, so that no method ever sees one.
    """

    def __init__(
        self, place: Place, models: Sequence[torch.Tensor], base: torch.Tensor | None = None, *, checked: bool = False
    ) -> None:
        """`checked` spares the search for NaN to a block that was read before."""
        self.place = place
        self._models = models
        self._base = base
        self._checked = checked
        dtypes = [tensor.dtype for tensor in (*models, base) if tensor is not None]
        self._wide = torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def count(self) -> int:
        """How many models there are, without the base."""
        return len(self._models)

    def model(self, k: int) -> torch.Tensor:
        """θ_k, float32 (float64 where a model is), a copy that the caller may overwrite."""
        model = self._models[k]
        return self._finite(model.clone() if model.dtype == self._wide else model.to(self._wide), k)

    def models(self) -> list[torch.Tensor]:
        """θ_1 … θ_n, copies."""
        return [self.model(k) for k in range(self.count)]

    @cached_property
    def base(self) -> torch.Tensor:
        """θ_0, float32 (float64), which the caller must not overwrite."""
        assert self._base is not None  # the plan gives a base to every method that has one
        return self._finite(self._base.to(self._wide), None)

    @property
    def has_base(self) -> bool:
        return self._base is not None

    def delta(self, k: int) -> torch.Tensor:
        """The task vector τ_k = θ_k − θ_0, a copy."""
        return self.model(k).sub_(self.base)

    def deltas(self) -> list[torch.Tensor]:
        """τ_1 … τ_n, copies."""
        return [self.delta(k) for k in range(self.count)]

    def check(self) -> None:
        """Raises NotFinite where a model or the base holds NaN or infinity."""
        for k, model in [*enumerate(self._models), (None, self._base)]:
            if model is not None and not _is_finite(model.to(self._wide)):
                raise NotFinite(k)

    def raw(self, k: int) -> torch.Tensor:
        """θ_k as the file has it, not to be overwritten; unlike `model` it may hold anything."""
        return self._models[k]

    def is_equal(self) -> bool:
        """Whether all models and the base hold the same values here; NaN equals nothing."""
        others = self._models[1:] if self._base is None else [*self._models[1:], self._base]
        return all(torch.equal(self._models[0], other) for other in others)

    def _finite(self, values: torch.Tensor, model: int | None) -> torch.Tensor:
        if not self._checked and not _is_finite(values):
            raise NotFinite(model)
        return values


def _is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN, infinite, or so large that surveys could not square it."""
    return within(values, LARGEST) or bool((values.abs() <= LARGEST).all())


def within(values: torch.Tensor, most: float) -> bool:
    """Whether surely no value is NaN or beyond `most`: one quick pass over their squares, which may say no wrongly."""
    flat = values.reshape(-1)
    return math.sqrt(max(float(flat.dot(flat)), 0.0)) <= most  # NaN is not


@runtime_checkable
class Survey(Protocol):
    """A sum over blocks, and what follows from it. Surveys are values: equal ones of scope MODEL share one finding."""

    @property
    def scope(self) -> Scope: ...

    def measure(self, block: Block, findings: Sequence[Any]) -> Any:
        """What this block adds to the sum: float64, int64, or anything that adds up, also to 0.

        `findings` are those of the method's surveys before this one.
        """
        ...

    def conclude(self, total: Any, numel: int, findings: Sequence[Any]) -> Any:
        """What the sum over `numel` elements says, or another survey that must be made to know it."""
        ...


class SampledSurvey:
    """A survey that looks at every n-th block of a tensor only, the first one included."""

    every: int
    passes: float  # how often all elements are read until there is a finding, as a rule


class Method(Protocol):
    """How the tensors of one name become one."""

    @property
    def grain(self) -> Grain: ...

    @property
    def surveys(self) -> Sequence[Survey]: ...

    @property
    def propagates(self) -> bool:
        """Whether a value that is not finite in any model makes the result not finite: then that alone is checked."""
        ...

    @property
    def buffers(self) -> int:
        """How many arrays of a block's size the method holds at once beside its inputs: for the memory plan."""
        ...

    def combine(self, block: Block, findings: Sequence[Any]) -> torch.Tensor:
        """The merged block, float32 (float64), in the shape of the block."""
        ...
