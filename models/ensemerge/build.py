"""The workshop's composition root: from a model.yaml to a version of its model.

    build(Repository("models/repository"), "digits-merged")

Each kind that is built rather than exported has one function in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ensemerge import __version__
from ensemerge.ensemble.combiners import COMBINERS
from ensemerge.ensemble.compiler import EMITTERS, OUTPUT, Member, fuse, prove
from ensemerge.ensemble.spec import parse_ensemble
from ensemerge.errors import InvalidData, InvalidModel, InvalidSpec
from ensemerge.fields import suggest
from ensemerge.graph.files import batch_input, load, named, save
from ensemerge.graph.pairing import pair_weights
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import with_weights
from ensemerge.graph.tasks import infer_task
from ensemerge.merge.engine import merge_weights
from ensemerge.merge.methods import METHODS
from ensemerge.merge.recipe import Calibration, MergeRecipe, parse_recipe
from ensemerge.progress import Notify, silent
from ensemerge.repository import MODEL_FILE, Check, Manifest, Repository, Spec, Task, Version, parse_reference, sha256
from ensemerge.restore.batch_norm import DRIFT_BOUND, restore_batch_norm
from ensemerge.weights.reader import OnnxWeights, RenamedWeights


@dataclass(frozen=True)
class Source:
    """A model of the repository that goes into another: its version, its graph and what its output means."""

    version: Version
    model: ir.Model
    task: Task | None

    @property
    def label(self) -> str:
        return f"{self.version.name}:{self.version.number}"

    @property
    def hash(self) -> str:
        return sha256(self.version.model_path)


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
    recipe = parse_recipe(spec)
    sources = _open_sources(repository, [ingredient.model for ingredient in recipe.ingredients], spec)
    merged = _merge(sources, recipe, notify)
    checks: list[Check] = []
    if recipe.calibration is not None:
        merged, check = _restore(merged, recipe.calibration, repository.folder(spec.name), notify)
        checks.append(check)
    save(merged, folder / MODEL_FILE)
    Runner(folder / MODEL_FILE)  # a version that no runtime accepts is not published
    return _manifest(spec, spec.task or sources[0].task, sources, checks)


def _merge(sources: Sequence[Source], recipe: MergeRecipe, notify: Notify) -> ir.Model:
    """The first source's graph with the merged weights of all."""
    reference = sources[0].model
    readers = [RenamedWeights(OnnxWeights(source.model), pair_weights(reference, source.model)) for source in sources]
    weights = [ingredient.weight for ingredient in recipe.ingredients]
    merged: dict[str, np.ndarray] = {}
    for name, tensor in merge_weights(readers, weights, METHODS[recipe.method]):
        merged[name] = tensor.numpy()
        notify("merge weights", len(merged), len(readers[0].names))
    return with_weights(reference, merged)


def _restore(model: ir.Model, calibration: Calibration, folder: Path, notify: Notify) -> tuple[ir.Model, Check]:
    feeds = read_arrays(folder / calibration.data)
    restored = restore_batch_norm(model, feeds, notify)
    rows = len(next(iter(feeds.values())))
    detail = f"drift of {restored.layers} layers on {rows} rows of {calibration.data}, in deviations"
    return restored.model, Check("restored_batch_norm", restored.drift, DRIFT_BOUND, detail)


def _build_ensemble(repository: Repository, spec: Spec, folder: Path, notify: Notify) -> Manifest:
    ensemble = parse_ensemble(spec)
    sources = _open_sources(repository, ensemble.members, spec)
    members = [Member(source.label, source.model, _task_of(source)) for source in sources]
    fused = fuse(members, EMITTERS[ensemble.combine])
    save(fused, folder / MODEL_FILE)
    notify("compile and prove", 1, 2)
    check = prove(members, load(folder / MODEL_FILE), COMBINERS[ensemble.combine], _probe(fused))
    notify("compile and prove", 2, 2)
    task = Task("classification", OUTPUT, "probabilities", members[0].task.classes)
    return _manifest(spec, task, sources, [check])


BUILDERS: Mapping[str, Callable[[Repository, Spec, Path, Notify], Manifest]] = {
    "merge": _build_merge,
    "ensemble": _build_ensemble,
}


def read_arrays(path: Path) -> Arrays:
    """The arrays of an .npz file by name, never pickled objects. Raises InvalidData."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidData(f"{path} is no .npz of plain arrays that can be read: {error}") from error


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
    return Source(version, model, repository.spec(name).task or stated or infer_task(model))


def _task_of(source: Source) -> Task:
    if source.task is None:
        raise InvalidModel(
            f"the graph of '{source.label}' does not tell what its output means; state `task:` in its model.yaml"
        )
    return source.task


def _probe(model: ir.Model) -> Arrays:
    """Random rows that fit the network's input, for comparisons that hold on any input. Raises InvalidModel."""
    value = batch_input(model)
    shape = [17, *(value.shape or [])[1:]]
    if value.dtype is None or not value.dtype.is_floating_point() or not all(isinstance(axis, int) for axis in shape):
        raise InvalidModel(f"input '{value.name}' is {value.dtype} {shape}; expected floats of a fixed shape per row")
    values = np.random.default_rng(0).standard_normal([int(axis) for axis in shape])
    return {named(value): values.astype(value.dtype.numpy())}


def _manifest(spec: Spec, task: Task | None, sources: Sequence[Source], checks: Sequence[Check]) -> Manifest:
    return Manifest(
        kind=spec.kind,
        task=task,
        inputs={source.label: source.hash for source in sources},
        recipe=dict(spec.body),
        checks=tuple(checks),
        members=tuple(source.label for source in sources),
        made_by=f"ensemerge {__version__}",
    )
