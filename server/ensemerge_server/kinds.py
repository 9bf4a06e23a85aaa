"""How each kind of model is loaded: from its model.yaml to something that answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ensemerge.ensemble.spec import parse_ensemble
from ensemerge.merge.recipe import parse_model_yaml
from ensemerge.repository import Repository, Spec, Task, Version, parse_reference
from ensemerge_server.batching import Batcher
from ensemerge_server.catalogue import Builder, Deployed, Resolve
from ensemerge_server.experiments.experiment import ArmModel, build_experiment
from ensemerge_server.experiments.spec import parse_experiment
from ensemerge_server.servable import Annotated, Servable, Signature
from ensemerge_server.session import open_session
from ensemerge_server.settings import Settings

log = logging.getLogger(__name__)

Validate = Callable[[Spec], object]


@dataclass(frozen=True)
class FileKind:
    """A kind whose versions are ONNX files: plain models, and what the workshop built.

    `validate` reads the rest of model.yaml, so that a key nobody knows is refused here as it is at build time.
    """

    repository: Repository
    settings: Settings
    validate: Validate

    def __call__(self, spec: Spec, resolve: Resolve) -> Deployed:
        self.validate(spec)
        version = self.repository.version(spec.name)
        version.verify()
        session = open_session(version.model_path, self.settings)
        batcher = Batcher(
            session,
            str(version.number),
            batch_rows=self.settings.batch_rows,
            queue_requests=self.settings.queue_requests,
        )
        task = spec.task or (version.manifest.task if version.manifest else None)
        _check_task(spec, task, session.signature)
        where = f"{session.provider}, {session.threads} threads"
        log.info("loaded %s:%d (%s) on %s", spec.name, version.number, spec.kind, where)
        return Deployed(spec.name, version.number, spec.kind, task, _with_members(batcher, version), batcher.close)


def experiment_kind(spec: Spec, resolve: Resolve) -> Deployed:
    """An experiment owns no model: its arms are those of the repository, shared with whoever calls them directly."""
    experiment = parse_experiment(spec)
    arms = {}
    for arm, entry in experiment.arms.items():
        deployed = resolve(*parse_reference(entry.model))
        arms[arm] = ArmModel(deployed.servable, deployed.task)
    servable, task = build_experiment(spec.name, experiment, arms)
    task = spec.task or task
    _check_task(spec, task, servable.signature)
    return Deployed(spec.name, 1, spec.kind, task, servable)


def builders(repository: Repository, settings: Settings) -> Mapping[str, Builder]:
    """Every kind that a model.yaml can name."""
    return {
        "onnx": FileKind(repository, settings, lambda spec: spec.fields().finish()),
        "ensemble": FileKind(repository, settings, parse_ensemble),
        "merge": FileKind(repository, settings, parse_model_yaml),
        "experiment": experiment_kind,
    }


def _check_task(spec: Spec, task: Task | None, signature: Signature) -> None:
    """What the task says of the output must be so: labels are scored by it. Raises InvalidSpec."""
    if task is not None:
        outputs = {output.name: output.shape for output in signature.outputs}
        shapes = {name: [axis if axis >= 0 else None for axis in shape] for name, shape in outputs.items()}
        task.check(shapes, f"{spec.where}: task")


def _with_members(servable: Servable, version: Version) -> Servable:
    """An ensemble's answers name its members. So do a merge's: the models whose weights are in it."""
    members = version.manifest.members if version.manifest else ()
    return Annotated(servable, {"members": ",".join(members)}) if members else servable
