"""Run the jobs of a plan: read in windows, survey, combine, round once, write.

Work is cut into spans, whose borders depend on the tensors alone. Workers take spans in any order; what they measure
is added up in the order of the spans. So the result has the same bits for any number of threads, and what is in
memory at a time is a few spans per worker, whatever the size of the models.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock
from typing import Any, Protocol, TypeVar

import torch

from ensemerge.errors import InvalidModel
from ensemerge.merge.blocks import Cut, Stretch, block_elements
from ensemerge.merge.method import (
    CPU,
    LARGEST,
    Block,
    Grain,
    Method,
    NotFinite,
    Place,
    SampledSurvey,
    Scope,
    Survey,
    within,
)
from ensemerge.progress import Notify, silent
from ensemerge.threads import one_thread
from ensemerge.weights.reader import TensorInfo, WeightReader

T = TypeVar("T")
# The most that a survey sums up per model: two rounds of counts of 65,536 bins, of this span and of those before.
SURVEY_BYTES = 4 * 65536 * 8
# On a GPU a block must be large for its launch to be worth it.
CUDA_BLOCK_ELEMENTS = 1 << 23


class Writer(Protocol):
    """Where the merged tensors go; called from several threads."""

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Elements of the flattened tensor `name` from `start` on, in its output dtype, on the processor."""
        ...


class Journal(Protocol):
    """Which tensors are written whole, so that an interrupted merge can go on."""

    def holds(self, name: str) -> bool: ...

    def add(self, name: str) -> None: ...


class NoJournal:
    """For merges that begin anew each time."""

    def holds(self, name: str) -> bool:
        return False

    def add(self, name: str) -> None:
        pass


@dataclass(frozen=True)
class Source:
    """One tensor of one model, and how to call the model in a message."""

    reader: WeightReader
    name: str
    model: str


@dataclass(frozen=True)
class Job:
    """One tensor of the merged model. Without a method its sources must be equal, and the first is copied."""

    name: str
    info: TensorInfo
    sources: tuple[Source, ...]
    origin: Source | None
    method: Method | None
    drawn_as: str | None = None  # the name that random draws go by, where it is not the tensor's own

    @property
    def inputs(self) -> tuple[Source, ...]:
        """All tensors that are read, the origin last."""
        return self.sources if self.origin is None else (*self.sources, self.origin)

    @property
    def surveys(self) -> Sequence[Survey]:
        return self.method.surveys if self.method else ()

    @property
    def arrays(self) -> int:
        """How many arrays of a block's size a worker holds at once, in float32."""
        return len(self.inputs) + 1 + (self.method.buffers if self.method else 0)


@dataclass(frozen=True)
class Machine:
    """What a merge runs on."""

    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    device: torch.device = CPU
    working_bytes: int | None = None  # how much all workers may hold at once; None is as much as they like

    def block_elements(self, arrays: int) -> int:
        """Of a method that holds so many arrays of a block's size at once."""
        return block_elements(arrays) if self.device == CPU else CUDA_BLOCK_ELEMENTS


def merge_weights(
    jobs: Sequence[Job],
    writer: Writer,
    machine: Machine | None = None,
    journal: Journal | None = None,
    notify: Notify = silent,
) -> None:
    """Merge every tensor and hand it to `writer`. `notify("merge", bytes, total)` counts what was read and written.

    Raises InvalidModel for NaN, for integers that differ, for a result that its dtype does not hold.
    """
    machine, journal = machine or Machine(), journal or NoJournal()
    with one_thread(), _pool(machine.threads) as pool:
        run = _Run(machine, pool, _Progress(jobs, notify))
        shared = _shared_findings(run, jobs)
        left = [job for job in jobs if not journal.holds(job.name)]
        share = sum(job.info.numel for job in left) // (4 * machine.threads)
        large = [job for job in left if run.is_large(job, share)]
        for job in large:
            run.merge(job, shared, writer, journal, pool.submit)
        alone = {id(job) for job in left} - {id(job) for job in large}
        small = sorted((job for job in left if id(job) in alone), key=lambda job: -job.info.numel)
        one = partial(run.merge_alone, findings=shared, writer=writer, journal=journal)
        _drain(_in_order(pool.submit, one, [(job,) for job in small], machine.threads))


def _shared_findings(run: _Run, jobs: Sequence[Job]) -> dict[int, list[Any]]:
    """By the id of each job: what its surveys over the whole model found. Those come first in every method."""
    findings: dict[int, list[Any]] = {id(job): [] for job in jobs}
    for level in range(max((len(job.surveys) for job in jobs), default=0)):
        groups: dict[tuple[Survey, ...], list[Job]] = {}
        for job in jobs:
            surveys = tuple(job.surveys[: level + 1])
            if len(surveys) == level + 1 and all(survey.scope is Scope.MODEL for survey in surveys):
                groups.setdefault(surveys, []).append(job)
        for surveys, group in groups.items():
            found = run.survey(surveys[-1], group, findings[id(group[0])], run.pool.submit)
            for job in group:
                findings[id(job)].append(found)
    return findings


class _Run:
    """One merge: the machine, its workers, and which blocks hold equal infinities."""

    def __init__(self, machine: Machine, pool: ThreadPoolExecutor, progress: _Progress) -> None:
        self.pool = pool
        self._machine = machine
        self._memory = _Memory(machine.working_bytes)
        self._progress = progress
        self._copied: set[tuple[str, int]] = set()

    def is_large(self, job: Job, share: int) -> bool:
        """Whether a tensor would keep one worker busy after the others are done, so that all must share it."""
        return job.info.numel > max(share, self._cut(job).span)

    def merge_alone(self, job: Job, findings: Mapping[int, list[Any]], writer: Writer, journal: Journal) -> None:
        """All that is left to do for one tensor, on this thread, once there is memory for it."""
        with self._memory.taken(worker_bytes(job, self._machine)):
            self.merge(job, findings, writer, journal, _at_once)

    def merge(
        self, job: Job, findings: Mapping[int, list[Any]], writer: Writer, journal: Journal, submit: _Submit
    ) -> None:
        """All that is left to do for one tensor."""
        found = list(findings[id(job)])
        for survey in job.surveys[len(found) :]:
            found.append(self.survey(survey, [job], found, submit))
        work = partial(self._combine, job, found, writer)
        _drain(_in_order(submit, work, self._cut(job).spans(), self._machine.threads))
        journal.add(job.name)

    def survey(self, survey: Survey, jobs: Sequence[Job], found: Sequence[Any], submit: _Submit) -> Any:
        """One survey over one tensor, or over those that share it, and those that follow from it."""
        numel = sum(job.info.numel for job in jobs)
        checked = bool(found)
        while True:
            work = ((job, start, stop) for job in jobs for start, stop in self._cut(job).spans())
            measure = partial(self._measure, survey, list(found), checked)
            total: Any = 0
            for part in _in_order(submit, measure, work, self._machine.threads):
                total = total + part
            if isinstance(total, int):
                return None  # every block is copied: no one will ask
            finding = survey.conclude(total, numel, list(found))
            if not isinstance(finding, Survey):
                return finding
            checked = checked or not isinstance(survey, SampledSurvey)
            survey = finding

    def _measure(self, survey: Survey, found: Sequence[Any], checked: bool, job: Job, start: int, stop: int) -> Any:
        total: Any = 0
        every = survey.every if isinstance(survey, SampledSurvey) else 1
        for block in self._blocks(job, start, stop, checked=checked, every=every):
            try:
                total = total + survey.measure(block, found)
            except NotFinite as error:
                self._copy_or_refuse(job, block, error)
        self._progress.add(job, start, stop, every)
        return total

    def _combine(self, job: Job, found: Sequence[Any], writer: Writer, start: int, stop: int) -> None:
        checked = bool(found) or (job.method is not None and job.method.propagates)
        for block in self._blocks(job, start, stop, checked=checked, skip=False):
            writer.write(job.name, block.place.start, self._combined(job, block, found).view(-1).to(CPU))
        self._progress.add(job, start, stop)

    def _combined(self, job: Job, block: Block, found: Sequence[Any]) -> torch.Tensor:
        if job.method is None:
            return _copied(job, block)
        if (job.name, block.place.start) in self._copied:
            return block.raw(0).to(job.info.dtype)
        try:
            return self._rounded(job, block, job.method.combine(block, found))
        except NotFinite as error:
            self._copy_or_refuse(job, block, error)
            return block.raw(0).to(job.info.dtype)

    def _rounded(self, job: Job, block: Block, merged: torch.Tensor) -> torch.Tensor:
        """The one rounding, from float32 to the output's dtype. Raises InvalidModel where that cannot hold it."""
        rounded = merged.to(job.info.dtype)
        if within(merged, torch.finfo(job.info.dtype).max) or bool(torch.isfinite(rounded.to(merged.dtype)).all()):
            return rounded
        block.check()
        raise InvalidModel(
            f"merging '{job.name}' gives values that are not finite; expected finite weights, in a range that "
            f"{job.info.dtype} holds"
        )

    def _blocks(
        self, job: Job, start: int, stop: int, *, checked: bool, skip: bool = True, every: int = 1
    ) -> Iterator[Block]:
        """The blocks of a span, or some of them, each in windows that are given back after it.

        `skip` leaves out those that are copied.
        """
        cut = self._cut(job)
        for stretch in cut.stretches(start, stop):
            if stretch.start // cut.block % every or (skip and (job.name, stretch.start) in self._copied):
                continue
            place = Place(job.drawn_as or job.name, stretch.start, job.info.numel, self._machine.device)
            models = [self._window(source, stretch) for source in job.inputs]
            base = models.pop() if job.origin else None
            yield Block(place, models, base, checked=checked)
            for source in job.inputs:
                source.reader.give_back(source.name, stretch.start, stretch.stop)

    def _window(self, source: Source, stretch: Stretch) -> torch.Tensor:
        window = source.reader.window(source.name, stretch.start, stretch.stop)
        if self._machine.device != CPU:
            window = window.to(self._machine.device)
        return window if len(stretch.shape) == 1 else window.reshape(stretch.shape)

    def _copy_or_refuse(self, job: Job, block: Block, error: NotFinite) -> None:
        """A mask is copied: zeros and infinities, or numbers as large, equal in all models. All else is refused."""
        if block.is_equal() and _is_mask(block.raw(0)):
            self._copied.add((job.name, block.place.start))
            return
        source = job.origin if error.model is None else job.sources[error.model]
        assert source is not None  # only an origin that there is can hold NaN
        raise InvalidModel(
            f"weight '{source.name}' of {source.model} holds NaN or infinity, or numbers beyond {LARGEST:g}; expected "
            "finite numbers"
        ) from error

    def _cut(self, job: Job) -> Cut:
        return cut(job, self._machine)


def cut(job: Job, machine: Machine) -> Cut:
    """How the tensor of a job is cut."""
    grain = job.method.grain if job.method else Grain.ELEMENT
    return Cut(job.info.shape, grain, machine.block_elements(job.arrays))


def _copied(job: Job, block: Block) -> torch.Tensor:
    """Counters and indices. Raises InvalidModel where they differ: they have no average."""
    if not block.is_equal():
        raise InvalidModel(
            f"integers '{job.name}' differ between the models; they have no average, expected equal ones"
        )
    return block.raw(0)


def _is_mask(values: torch.Tensor) -> bool:
    """Whether all is zero, or beyond what can be squared. A method gives both back as they are, in equal models."""
    wide = values.double()
    return bool(((wide == 0) | (wide.abs() > LARGEST)).all())


def worker_bytes(job: Job, machine: Machine) -> int:
    """What one worker holds at a time: a block's windows, its arrays in float32, and what it measures."""
    block = min(cut(job, machine).block, job.info.numel)
    wide = 8 if torch.float64 in {source.reader.info(source.name).dtype for source in job.inputs} else 4
    reading = max((source.reader.window_bytes(source.name, block) for source in job.inputs), default=0)
    surveys = len(job.surveys) * len(job.inputs) * SURVEY_BYTES
    return passed_bytes(job, block) + block * wide * job.arrays + reading + surveys


class _Memory:
    """The workers' memory, taken before a tensor is begun."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait for so much memory; one worker alone always gets it, since the plan has seen that it fits."""
        with self._changed:
            self._changed.wait_for(lambda: self._fits(size))
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self._size is None or not self._taken or self._taken + size <= self._size


class _Progress:
    """Bytes done, over all passes."""

    def __init__(self, jobs: Iterable[Job], notify: Notify) -> None:
        self._notify = notify
        self._lock = Lock()
        self._done = 0.0
        self._total = sum(read_bytes(job) for job in jobs)

    def add(self, job: Job, start: int, stop: int, every: int = 1) -> None:
        with self._lock:
            self._done += passed_bytes(job, stop - start) / every
            self._notify("merge", min(round(self._done), self._total), self._total)


def read_bytes(job: Job) -> int:
    """What a tensor's surveys and its combination read, as a rule."""
    surveys = [survey.passes if isinstance(survey, SampledSurvey) else 1 for survey in job.surveys]
    return round((1 + sum(surveys)) * passed_bytes(job, job.info.numel))


def passed_bytes(job: Job, elements: int) -> int:
    """What one pass over so many elements of a tensor reads."""
    return elements * sum(source.reader.info(source.name).dtype.itemsize for source in job.inputs)


class _Submit(Protocol):
    def __call__(self, fn: Callable[..., T], /, *args: Any) -> Future[T]: ...


def _at_once(fn: Callable[..., T], /, *args: Any) -> Future[T]:
    """Run it here: for work that is already on a worker."""
    future: Future[T] = Future()
    future.set_result(fn(*args))
    return future


def _in_order(
    submit: _Submit, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]], threads: int
) -> Iterator[T]:
    """The results in the order of the arguments, with a few calls under way, so that few results wait."""
    waiting: deque[Future[T]] = deque()
    try:
        for those in arguments:
            waiting.append(submit(work, *those))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _drain(results: Iterable[object]) -> None:
    for _ in results:
        pass


def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")
