"""What a merge will do, settled from headers alone: every problem is found, and told, before a tensor is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ensemerge import __version__
from ensemerge.errors import EnsemergeError, InvalidSpec
from ensemerge.merge.draws import KeyedDraws
from ensemerge.merge.engine import Job, Machine, Source, read_bytes, worker_bytes
from ensemerge.merge.layout import Contribution, TensorRecipe
from ensemerge.merge.method import Grain, Method, Scope
from ensemerge.merge.methods.table import MethodEntry, Settings
from ensemerge.merge.problems import Problems, few
from ensemerge.merge.recipe import Recipe
from ensemerge.merge.sizes import show_size
from ensemerge.merge.staging import JOURNAL, staged_bytes
from ensemerge.repository import is_name
from ensemerge.weights.reader import TensorInfo, WeightReader

# What Python and torch take beyond what they had when the plan was made: code paged in, the allocator's slack.
OVERHEAD_BYTES = 48 << 20


@dataclass(frozen=True)
class Output:
    """One merged model: its folder below the merge's own, '' for the only one, and its tensors."""

    folder: str
    jobs: tuple[Job, ...]

    @property
    def layout(self) -> dict[str, TensorInfo]:
        return {job.name: job.info for job in self.jobs}

    @property
    def nbytes(self) -> int:
        return sum(job.info.nbytes for job in self.jobs)


@dataclass(frozen=True)
class MergePlan:
    """What will be read, computed and written, and in which memory."""

    method: str
    outputs: tuple[Output, ...]
    machine: Machine
    memory_bytes: int  # the most that the process will hold
    notes: tuple[str, ...]  # what a reader of the recipe may not expect

    @property
    def jobs(self) -> Iterable[Job]:
        return (job for output in self.outputs for job in output.jobs)

    @property
    def read_bytes(self) -> int:
        """All passes over all models."""
        return sum(read_bytes(job) for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


def make_outputs(
    recipe: Recipe,
    tensors: Sequence[TensorRecipe],
    readers: Mapping[str, WeightReader],
    methods: Mapping[str, MethodEntry],
) -> tuple[Output, ...]:
    """The jobs of a merge: one output, or one for each model where the method makes a model for each task.

    Raises InvalidSpec with a line for each problem.
    """
    maker = _JobMaker(recipe, readers, methods)
    if methods[recipe.method].make_for is None:
        outputs = [Output("", maker.jobs(tensors, None))]
    else:
        names = _task_names(tensors)
        outputs = [Output(name, maker.jobs(tensors, task)) for task, name in enumerate(names)]
    maker.problems.raise_any()
    return tuple(outputs)


def shared_surveys(outputs: Sequence[Output]) -> int:
    """How many groups of tensors there are that are surveyed together, as one model."""
    jobs = [job for output in outputs for job in output.jobs]
    return len({tuple(job.surveys) for job in jobs if any(survey.scope is Scope.MODEL for survey in job.surveys)})


def with_tied(output: Output, ties: Mapping[str, str]) -> Output:
    """The output with a copy of each tied tensor under its own name: without a config.json no one knows of the tie."""
    jobs = {job.name: job for job in output.jobs}
    copies = [replace(jobs[kept], name=name, drawn_as=kept) for name, kept in ties.items() if kept in jobs]
    return Output(output.folder, (*output.jobs, *(job for job in copies if job.name not in jobs)))


def _task_names(tensors: Sequence[TensorRecipe]) -> list[str]:
    """A folder name for each model, told apart by number where the last parts of their paths are the same."""
    models = [contribution.model for contribution in tensors[0].contributions]
    last = [model.rstrip("/").split("/")[-1].split("@")[0].split("+")[0] for model in models]
    # A name such as `..` would lead out of the folder.
    names = [name if is_name(name) and name != JOURNAL else "task" for name in last]
    return names if len(set(names)) == len(names) else [f"{name}-{k + 1}" for k, name in enumerate(names)]


class _JobMaker:
    """Turns what a recipe says of each tensor into work, and keeps what is wrong."""

    def __init__(self, recipe: Recipe, readers: Mapping[str, WeightReader], methods: Mapping[str, MethodEntry]) -> None:
        self.problems = Problems()
        self._recipe = recipe
        self._readers = readers
        self._methods = methods
        self._draws = KeyedDraws(recipe.seed)

    def jobs(self, tensors: Sequence[TensorRecipe], task: int | None) -> tuple[Job, ...]:
        found: list[Job] = []
        wrong: dict[str, list[str]] = {}
        for tensor in tensors:
            try:
                found.append(self._job(tensor, task))
            except EnsemergeError as error:
                wrong.setdefault(str(error), []).append(f"'{tensor.name}'")
        for message, names in wrong.items():
            self.problems.add(f"{few(names)}: {message}")
        return tuple(found)

    def _job(self, tensor: TensorRecipe, task: int | None) -> Job:
        sources = tuple(self._source(contribution) for contribution in tensor.contributions)
        origin = self._source(tensor.origin) if tensor.origin else None
        info = self._info(sources, origin)
        job = Job(tensor.name, info, sources, origin, None)
        if not info.dtype.is_floating_point or not info.numel:
            return job
        return replace(job, method=self._method(tensor, task))

    def _method(self, tensor: TensorRecipe, task: int | None) -> Method:
        entry = self._methods[tensor.method]
        each = [contribution.parameters for contribution in tensor.contributions]
        settings = Settings(each, tensor.shared, self._draws)
        if task is None or entry.make_for is None:
            return entry.make(settings)
        return entry.make_for(settings, task)

    def _source(self, contribution: Contribution) -> Source:
        return Source(self._readers[contribution.model], contribution.tensor, contribution.model)

    def _info(self, sources: Sequence[Source], origin: Source | None) -> TensorInfo:
        """Of the merged tensor. Raises InvalidSpec where the models' shapes or kinds of dtype differ."""
        inputs = sources if origin is None else (origin, *sources)
        infos = [source.reader.info(source.name) for source in inputs]
        if len({info.shape for info in infos}) > 1 or len({info.dtype.is_floating_point for info in infos}) > 1:
            found = [f"{source.model} {_kind(info)}" for source, info in zip(inputs, infos, strict=True)]
            raise InvalidSpec(f"expected one shape and one kind of numbers in all models, got {', '.join(found)}")
        dtype = infos[0].dtype
        wanted = self._recipe.out_dtype or self._recipe.dtype
        if wanted is not None and dtype.is_floating_point:
            dtype = getattr(torch, wanted)
        return TensorInfo(infos[0].shape, dtype)


def _kind(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def fit(
    outputs: Sequence[Output],
    readers: Iterable[WeightReader],
    machine: Machine,
    memory_bytes: int | None,
    extra_bytes: int = 0,
) -> tuple[Machine, int]:
    """As many threads as the memory allows, and the most that the process will then hold.

    Raises InvalidSpec where not even one thread fits, with what it needs.
    """
    resident = resident_bytes() + OVERHEAD_BYTES + extra_bytes + sum(reader.resident_bytes for reader in readers)
    jobs = [job for output in outputs for job in output.jobs]
    needs = [worker_bytes(job, machine) for job in jobs]
    streamed = max((need for need, job in zip(needs, jobs, strict=True) if not _is_whole(job)), default=1)
    greatest = max(needs, default=0)
    if memory_bytes is None:
        return machine, resident + max(sum(sorted(needs)[-machine.threads :]), streamed * machine.threads)
    working = memory_bytes - resident
    if working < greatest:
        hungry = jobs[needs.index(greatest)].name
        raise InvalidSpec(
            f"--memory {show_size(memory_bytes)} is too little: {show_size(resident)} are taken before the first "
            f"tensor, and '{hungry}' needs {show_size(greatest)}; give at least {show_size(resident + greatest)}"
        )
    threads = max(1, min(machine.threads, working // max(streamed, 1)))
    return replace(machine, threads=threads, working_bytes=working), memory_bytes


def _is_whole(job: Job) -> bool:
    return job.method is not None and job.method.grain is Grain.TENSOR


def resident_bytes() -> int:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most that this process has held in memory so far."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def refuse_full_disk(outputs: Sequence[Output], out: Path) -> None:
    """Raises InvalidSpec where the disk has no room for the merged model, or for what an interrupted try left to do."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    needed = sum(output.nbytes for output in outputs)
    free = shutil.disk_usage(parent).free + staged_bytes(out)
    if needed > free:
        raise InvalidSpec(f"the merged model takes {show_size(needed)}, {parent} has {show_size(free)} free")


def fingerprint(recipe: Recipe, outputs: Sequence[Output], files: Iterable[Path], *settings: object) -> str:
    """One text for one merge: all that decides its bytes.

    That is the recipe and its seed, the tensors, every input file's size and time of change, the `settings` under which
    it runs, and the version of this library.
    """
    tensors = [(output.folder, job.name, _kind(job.info)) for output in outputs for job in output.jobs]
    stamps = [stamp(file) for file in sorted({file.resolve() for file in files})]
    text = json.dumps([__version__, recipe.body, recipe.seed, stamps, tensors, settings], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stamp(file: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns
