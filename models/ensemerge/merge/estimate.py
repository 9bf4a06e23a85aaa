"""How long a merge will take: a little of the real work, on made-up numbers, timed and scaled up."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ensemerge.merge.engine import Job, Machine, Source, merge_weights
from ensemerge.merge.method import CPU, Grain
from ensemerge.merge.plan import MergePlan
from ensemerge.weights.reader import TensorInfo

PROBE_ELEMENTS = 1 << 19
# Matrices whose decomposition takes a few tens of milliseconds.
PROBE_SIDE = 256


def estimate_seconds(plan: MergePlan) -> float:
    """Seconds from the first byte to the last, if the disk keeps up. Nothing is read: each kind of work is tried."""
    tried: dict[object, float] = {}
    total = 0.0
    for job in plan.jobs:
        if job.info.numel:
            key = (type(job.method), len(job.sources), job.info.dtype, _is_matrix(job))
            if key not in tried:
                tried[key] = _seconds_per_unit(job, plan.machine)
            total += tried[key] * _work(job, job.info.shape)
    return total / plan.machine.threads


def _is_matrix(job: Job) -> bool:
    return job.method is not None and job.method.grain is Grain.TENSOR and len(job.info.shape) == 2


def _work(job: Job, shape: Sequence[int]) -> float:
    """Elements; of a decomposition, elements by the shorter side."""
    return math.prod(shape) * (min(shape) if _is_matrix(job) else 1)


def _seconds_per_unit(job: Job, machine: Machine) -> float:
    """One thread's time for a small tensor of this kind, once it has been done before."""
    shape = _small(job)
    probe = replace(job, info=TensorInfo(shape, job.info.dtype))
    made = _MadeUp(shape)
    sources = tuple(Source(made, source.name, source.model) for source in job.sources)
    origin = None if job.origin is None else Source(made, job.origin.name, job.origin.model)
    probe = replace(probe, sources=sources, origin=origin)
    made.dtypes = {source.name: source.reader.info(source.name).dtype for source in job.inputs}
    alone = replace(machine, threads=1, working_bytes=None)
    merge_weights([probe], _Nowhere(), alone)
    began = time.perf_counter()
    merge_weights([probe], _Nowhere(), alone)
    return (time.perf_counter() - began) / _work(job, shape)


def _small(job: Job) -> tuple[int, ...]:
    shape = job.info.shape
    if _is_matrix(job):
        return tuple(min(side, PROBE_SIDE) for side in shape)
    sides = list(shape)
    while math.prod(sides) > PROBE_ELEMENTS:
        # Fewer rows first, so that each stays as it is; where a single one is too long, a shorter one.
        axis = 0 if sides[0] > 1 else sides.index(max(sides))
        sides[axis] = max(1, PROBE_ELEMENTS * sides[axis] // math.prod(sides))
    return tuple(sides)


class _MadeUp:
    """Random weights of any name."""

    ties: Mapping[str, str] = {}
    resident_bytes = 0
    names: Sequence[str] = ()
    files: Sequence[Path] = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator(CPU).manual_seed(0)
        self._values = torch.empty(math.prod(shape)).normal_(0, 0.02, generator=generator)
        self._shape = shape
        self._calls = 0
        self.dtypes: Mapping[str, torch.dtype] = {}

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._shape, self.dtypes[name])

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        if not self.dtypes[name].is_floating_point:
            return torch.zeros(stop - start, dtype=self.dtypes[name])
        self._calls += 1
        return self._values[start:stop].roll(self._calls).to(self.dtypes[name])

    def give_back(self, name: str, start: int, stop: int) -> None:
        pass

    def window_bytes(self, name: str, elements: int) -> int:
        return 0


class _Nowhere:
    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        pass
