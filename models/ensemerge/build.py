"""The workshop's composition root: from a model.yaml to a version of its model.

    build(Repository("models/repository"), "digits-merged")

Each kind that is built rather than exported has one function in `BUILDERS`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch

from ensemerge import __version__
from ensemerge.ensemble.combiners import COMBINERS, OUTPUT
from ensemerge.ensemble.compiler import BATCHES, EMITTERS, Member, fuse, prove
from ensemerge.ensemble.spec import parse_ensemble
from ensemerge.errors import InvalidModel, InvalidSpec
from ensemerge.fields import suggest
from ensemerge.graph.feeds import read_arrays
from ensemerge.graph.files import batch_input, load, named, save
from ensemerge.graph.heads import Head, with_heads
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.statistics import statistics_of
from ensemerge.graph.surgery import with_weights
from ensemerge.graph.tasks import settle_task
from ensemerge.merge.alignment import Aligned, Orders, align_models
from ensemerge.merge.alignment_spec import ZIP
from ensemerge.merge.checkpoint import lay_out
from ensemerge.merge.engine import merge_weights
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.onnx_forms import pair_models
from ensemerge.merge.opened import OpenModel
from ensemerge.merge.recipe import Recipe, parse_model_yaml
from ensemerge.progress import Notify, silent
from ensemerge.repository import MODEL_FILE, Check, Manifest, Repository, Spec, Task, Version, parse_reference, sha256
from ensemerge.restore.batch_norm import restore_batch_norm
from ensemerge.restore.choose import restore
from ensemerge.restore.repair import repair
from ensemerge.weights.arrays import to_array
from ensemerge.weights.onnx import OnnxWeights
from ensemerge.weights.reader import WeightReader, read
from ensemerge.weights.writer import MemoryWriter

# As many as the largest batch on which an ensemble is compared with its members.
PROBE_ROWS = max(BATCHES)


@dataclass(frozen=True)
class Source:
    """A model of the repository that goes into another: its version, its graph and what its output means."""

    version: Version
    model: ir.Model
    task: Task | None

    @property
    def opened(self) -> OpenModel:
        """As a model of a merge."""
        path = self.version.model_path
        return OpenModel(path, OnnxWeights(self.model, path), None, path)


def build(repository: Repository, name: str, notify: Notify = silent) -> Version:
    """Make a new version of `name` from its model.yaml. `notify(stage, done, total)` reports progress.

    Raises InvalidSpec, InvalidModel, InvalidData, NotFound, CheckFailed; nothing is published then.
    """
    spec = repository.spec(name)
    builder = BUILDERS.get(spec.kind)
    if builder is None:
        raise InvalidSpec(f"{spec.where}: kind '{spec.kind}' is not built; {suggest(spec.kind, list(BUILDERS))}")
    return repository.publish(name, lambda folder: builder(repository, spec, folder, notify))


def _build_merge(repository: Repository, spec: Spec, folder: Path, notify: Notify) -> Manifest:
    recipe = parse_model_yaml(spec, METHODS)
    sources = _open_sources(repository, [str(reference) for reference in recipe.references()], spec)
    task = _task_of_merge(spec, recipe, sources)
    data = None if recipe.calibration is None else repository.folder(spec.name) / recipe.calibration.data
    feeds = None if data is None else read_arrays(data)
    merged, checks, figures = _Merging(sources, recipe, feeds, notify).merged()
    inputs = {} if data is None else {f"{spec.name}/{data.name}": sha256(data)}
    save(merged, folder / MODEL_FILE)
    _try_out(folder / MODEL_FILE, merged)
    return _manifest(spec, task, sources, checks, inputs, figures)


def _task_of_merge(spec: Spec, recipe: Recipe, sources: Sequence[Source]) -> Task | None:
    """What the merged model's output means; models that part have an output each, of which none is the model's."""
    if recipe.trunk is not None:
        return spec.task
    return settle_task(spec.task, sources[0].model) if spec.task else _common_task(sources)


def _common_task(sources: Sequence[Source]) -> Task | None:
    """What all sources say of their output. Raises InvalidModel: weights of different meanings have no mean."""
    first = sources[0]
    for source in sources[1:]:
        if source.task != first.task:
            raise InvalidModel(
                f"'{source.version.label}' has the task {source.task}, '{first.version.label}' {first.task}; expected "
                "one task, or a `task:` in the merge's model.yaml"
            )
    return first.task


def _try_out(path: Path, model: ir.Model) -> None:
    """Run the written file once, where inputs can be made up: a version that cannot answer is not published."""
    runner = Runner(path)
    with contextlib.suppress(InvalidModel):  # several inputs, or shapes that vary: nobody knows what fits
        runner.run(_probe(model))


class _Merging:
    """A merge on its way from its sources to the graph with the merged weights."""

    def __init__(self, sources: Sequence[Source], recipe: Recipe, feeds: Arrays | None, notify: Notify) -> None:
        opened = {str(name): source.opened for name, source in zip(recipe.references(), sources, strict=True)}
        self._paired = pair_models(recipe, opened)
        self._recipe = recipe
        self._feeds = feeds
        self._notify = notify

    def merged(self) -> tuple[ir.Model, list[Check], dict[str, float]]:
        """The donor's graph with the merged weights of all, what was proved on the way, and what was measured."""
        alignment = self._recipe.alignment
        if alignment is None:
            model, checks = self._restored(self._paired.models)
            return self._with_heads(model, {}), checks, {}
        score = None if self._feeds is None else self._score
        aligned = align_models(self._paired, alignment, self._feeds, score, self._notify)
        model, checks = self._restored(aligned.models)
        whole = self._with_heads(model, aligned.orders)
        figures = {"similarity": aligned.similarity, "exact": float(aligned.exact)}
        figures |= {} if aligned.alpha is None else {"alpha": aligned.alpha}
        figures |= {} if self._feeds is None else {"distance_to_parents": self._distance(whole)}
        return whole, [*aligned.checks, *checks], figures

    def _with_heads(self, trunk: ir.Model, orders: Orders) -> ir.Model:
        """The merged trunk and each model's own head; the merged network itself where the models do not part."""
        heads = [Head(name, head, orders.get(name, {})) for name, head in self._paired.heads.items()]
        return with_heads(trunk, heads) if heads else trunk

    def _restored(self, models: Mapping[str, OpenModel]) -> tuple[ir.Model, list[Check]]:
        merged = self._combined(models)
        calibration = self._recipe.calibration
        if calibration is None or self._feeds is None or calibration.restore == "nothing":
            return merged, []
        if calibration.restore == "batch_norm":
            restored = restore_batch_norm(merged, self._feeds, self._notify)
            return restored.model, [restored.check]
        return self._repaired(merged, models, always=calibration.restore == "repair")

    def _repaired(
        self, merged: ir.Model, models: Mapping[str, OpenModel], *, always: bool
    ) -> tuple[ir.Model, list[Check]]:
        """Channels get back the moments of their parents', which therefore have to be in the merged order."""
        assert self._feeds is not None  # asked for with calibration data alone
        alignment = self._recipe.alignment
        if alignment is not None and alignment.matching == ZIP and not statistics_of(merged):
            raise InvalidSpec(
                "a zip has no parents in one order whose moments REPAIR could give it; expected `matching: align`, "
                "or networks with BatchNormalization"
            )
        parents = [self._in_form(model.reader) for model in models.values()]
        mend = repair if always else restore
        restored = mend(merged, parents, self._feeds, self._notify)
        return restored.model, [restored.check]

    def _in_form(self, reader: WeightReader) -> ir.Model:
        """The donor's graph with the weights of another model."""
        weights = {name: to_array(read(reader, name)) for name in reader.names}
        return with_weights(self._paired.form.model, weights)

    def _combined(self, models: Mapping[str, OpenModel]) -> ir.Model:
        _, outputs = lay_out(self._recipe, models)
        if len(outputs) > 1:
            raise InvalidSpec(
                f"'{self._recipe.method}' makes a model for each task; expected one model: use `ensemerge merge`"
            )
        writer = MemoryWriter(outputs[0].layout)
        merge_weights(outputs[0].jobs, writer, notify=self._notify)
        merged = _with_tied(writer.tensors, models[self._paired.donor].reader.ties)
        return with_weights(self._paired.form.model, {name: to_array(tensor) for name, tensor in merged.items()})

    def _score(self, aligned: Aligned) -> float:
        """Without labels, the better merge is the one that answers more like its parents do."""
        return -self._distance(self._with_heads(self._restored(aligned.models)[0], aligned.orders))

    def _distance(self, merged: ir.Model) -> float:
        """How far answers to the calibration data are from those of the parents, relative to these.

        Each head's are compared with its own network's; without heads, all with the mean of the networks'.
        """
        assert self._feeds is not None  # asked for with calibration data alone
        answers = [list(Runner(graph).run(self._feeds).values()) for graph in self._parents()]
        if self._paired.heads:
            expected = [answer for own in answers for answer in own]
        else:
            expected = [np.mean(alike, axis=0) for alike in zip(*answers, strict=True)]
        got = Runner(merged).run(self._feeds).values()
        gap = sum(float(((ours - theirs) ** 2).sum()) for ours, theirs in zip(got, expected, strict=True))
        size = sum(float((theirs**2).sum()) for theirs in expected)
        return float(np.sqrt(gap / size)) if size else 0.0

    def _parents(self) -> list[ir.Model]:
        """The networks as they were."""
        heads = self._paired.heads
        return [
            with_heads(graph, [Head(name, heads[name])]) if heads else graph
            for name, graph in self._paired.graphs.items()
        ]


def _with_tied(tensors: Mapping[str, torch.Tensor], ties: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tied weights are merged once, under the name that is kept; the graph has a place for every name."""
    return {**{name: tensors[kept] for name, kept in ties.items() if kept in tensors}, **tensors}


def _build_ensemble(repository: Repository, spec: Spec, folder: Path, notify: Notify) -> Manifest:
    ensemble = parse_ensemble(spec)
    sources = _open_sources(repository, ensemble.members, spec)
    members = [Member(source.version.label, source.model, _task_of(source)) for source in sources]
    fused = fuse(members, EMITTERS[ensemble.combine])
    save(fused, folder / MODEL_FILE)
    notify("compile and prove", 1, 2)
    check = prove(members, load(folder / MODEL_FILE), COMBINERS[ensemble.combine], _probe(fused))
    notify("compile and prove", 2, 2)
    task = Task("classification", OUTPUT, "probabilities", members[0].task.classes)
    return _manifest(spec, task, sources, [check], {})


BUILDERS: Mapping[str, Callable[[Repository, Spec, Path, Notify], Manifest]] = {
    "merge": _build_merge,
    "ensemble": _build_ensemble,
}


def _open_sources(repository: Repository, references: Sequence[str], spec: Spec) -> list[Source]:
    if not references:
        raise InvalidSpec(f"{spec.where}: no models are named; expected at least one")
    return [_open_source(repository, reference, spec) for reference in references]


def _open_source(repository: Repository, reference: str, spec: Spec) -> Source:
    name, number = parse_reference(reference)
    if name == spec.name:
        raise InvalidSpec(f"{spec.where}: '{name}' names itself; expected other models of the repository")
    version = repository.version(name, number)
    version.verify()
    model = load(version.model_path)
    stated = version.manifest.task if version.manifest else None
    return Source(version, model, settle_task(repository.spec(name).task or stated, model))


def _task_of(source: Source) -> Task:
    if source.task is None:
        raise InvalidModel(
            f"the graph of '{source.version.label}' does not tell what its output means; "
            "state `task:` in its model.yaml"
        )
    return source.task


def _probe(model: ir.Model) -> Arrays:
    """Random rows that fit the network's input: normal floats, or integers of 0 and 1. Raises InvalidModel."""
    value = batch_input(model)
    shape = [PROBE_ROWS, *(value.shape or [])[1:]]
    if value.dtype is None or not all(isinstance(axis, int) for axis in shape):
        raise InvalidModel(f"input '{value.name}' is {value.dtype} {shape}; expected a fixed shape per row")
    generator = np.random.default_rng(0)
    sizes = [int(axis) for axis in shape]
    floating = value.dtype.is_floating_point()
    values = generator.standard_normal(sizes) if floating else generator.integers(2, size=sizes)
    return {named(value): values.astype(value.dtype.numpy())}


def _manifest(
    spec: Spec,
    task: Task | None,
    sources: Sequence[Source],
    checks: Sequence[Check],
    inputs: Mapping[str, str],
    figures: Mapping[str, float] = MappingProxyType({}),
) -> Manifest:
    hashes = {name: value for source in sources for name, value in source.version.hashes().items()}
    return Manifest(
        kind=spec.kind,
        task=task,
        inputs={**hashes, **inputs},
        recipe=dict(spec.body),
        checks=tuple(checks),
        members=tuple(source.version.label for source in sources),
        figures=dict(figures),
        made_by=f"ensemerge {__version__}",
    )
