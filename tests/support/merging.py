"""Run a merge method over tensors in memory, cut into blocks as the engine cuts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemerge.merge.blocks import BLOCK_ELEMENTS
from ensemerge.merge.draws import Draws, KeyedDraws
from ensemerge.merge.engine import Job, Machine, Source, merge_weights
from ensemerge.merge.method import Method, Place
from ensemerge.merge.methods.table import METHODS, REQUIRED, MethodEntry, Settings
from ensemerge.weights.reader import TensorInfo
from support.memory import Collected, InMemory

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Given:
    """Draws that were made beforehand: whole masks by tensor and model."""

    masks: Mapping[tuple[str, int], torch.Tensor]

    def keep(self, place: Place, model: int, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        return self.masks[place.tensor, model].reshape(-1)[place.start : place.start + count] > 0


def settings(
    entry: MethodEntry,
    models: int,
    draws: Draws | None = None,
    each: Mapping[str, Sequence[Any]] | None = None,
    **shared: Any,
) -> Settings:
    """The entry's defaults, with these parameters: `each` by name, one for every model; `lambda_` is `lambda`."""
    given = {name.rstrip("_"): value for name, value in shared.items()}
    own = [p for p in entry.parameters if p.per_model]
    values = {p.name: (each or {}).get(p.name, [given.get(p.name, p.default)] * models) for p in own}
    common = {p.name: given.get(p.name, p.default) for p in entry.parameters if not p.per_model}
    known = {p.name for p in entry.parameters}
    assert not ({*given, *(each or {})} - known), "the method has no such parameter"
    assert REQUIRED not in common.values()
    return Settings([{name: values[name][k] for name in values} for k in range(models)], common, draws or KeyedDraws())


@dataclass(frozen=True)
class Blocks(Machine):
    """One worker, and blocks of another size."""

    threads: int = 1
    elements: int = BLOCK_ELEMENTS

    def block_elements(self, arrays: int) -> int:
        return self.elements


@dataclass
class Run:
    """A method over the tensors of a whole model, as the engine runs it; nothing is rounded at the end."""

    method: Method
    models: Sequence[Tensors]
    base: Tensors | None = None
    block_elements: int = BLOCK_ELEMENTS

    def merged(self) -> dict[str, torch.Tensor]:
        jobs = [self._job(name) for name in self.models[0]]
        out = Collected({job.name: job.info for job in jobs})
        merge_weights(jobs, out, Blocks(elements=self.block_elements))
        return out.tensors

    def _job(self, name: str) -> Job:
        sources = tuple(Source(InMemory(model), name, f"model-{k}") for k, model in enumerate(self.models))
        origin = None if self.base is None else Source(InMemory(self.base), name, "base")
        inputs = [model[name] for model in (*self.models, *([self.base] if self.base else []))]
        wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in inputs} else torch.float32
        return Job(name, TensorInfo(tuple(inputs[0].shape), wide), sources, origin, self.method)


def run(
    method: Method,
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    name: str = "w",
) -> torch.Tensor:
    """The merge of one tensor."""
    return Run(
        method, [{name: model} for model in models], None if base is None else {name: base}, block_elements
    ).merged()[name]


def merge(
    name: str,
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    table: Mapping[str, MethodEntry] = METHODS,
    draws: Draws | None = None,
    each: Mapping[str, Sequence[Any]] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    **shared: Any,
) -> torch.Tensor:
    """The merge of one tensor by a method of the table."""
    entry = table[name]
    return run(entry.make(settings(entry, len(models), draws, each, **shared)), models, base, block_elements)
