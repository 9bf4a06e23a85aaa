"""An experiment is a servable around its arms: it picks one, passes the request on, and says which it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ensemerge.ensemble.combiners import OUTPUT
from ensemerge.errors import InvalidSpec
from ensemerge.repository import Task
from ensemerge_server.experiments.assignment import Split
from ensemerge_server.experiments.scale import Probabilities
from ensemerge_server.experiments.spec import ExperimentSpec
from ensemerge_server.servable import Done, Request, Servable, with_parameters


class Experiment:
    """Splits requests among `arms` by a unit that sticks.

    Without the unit's parameter, or with an empty one, the request's id decides, and without that chance. The reply's
    `assignment` says which.
    """

    def __init__(self, name: str, arms: Mapping[str, Servable], split: Split, unit: str) -> None:
        self.name = name
        self.signature = next(iter(arms.values())).signature
        self._arms = arms
        self._split = split
        self._unit = unit

    def submit(self, request: Request, done: Done) -> None:
        assignment, unit = self._unit_of(request)
        arm = self._split.arm(unit)
        told = {"experiment": self.name, "arm": arm, "assignment": assignment}
        self._arms[arm].submit(request, lambda outcome: done(with_parameters(outcome, told)))

    def _unit_of(self, request: Request) -> tuple[str, str]:
        unit = str(request.parameters.get(self._unit, ""))
        if unit:
            return "unit", unit
        if request.id:
            return "request", request.id
        return "random", os.urandom(8).hex()


@dataclass(frozen=True)
class ArmModel:
    """What serves one arm, and what its answers mean."""

    servable: Servable
    task: Task | None


def build_experiment(name: str, spec: ExperimentSpec, arms: Mapping[str, ArmModel]) -> tuple[Experiment, Task | None]:
    """An experiment over `arms`, and its answers' task. Raises InvalidSpec when the arms cannot be compared."""
    split = Split({arm: entry.weight for arm, entry in spec.arms.items()}, spec.salt)
    first = next(iter(arms.values()))
    if all(arm.servable.signature == first.servable.signature and arm.task == first.task for arm in arms.values()):
        return Experiment(name, {arm: model.servable for arm, model in arms.items()}, split, spec.unit), first.task
    task = _common_task(name, arms)
    wrapped = {arm: Probabilities(model.servable, _task(name, arm, model)) for arm, model in arms.items()}
    signatures = {arm: servable.signature for arm, servable in wrapped.items()}
    expected = next(iter(signatures.values()))
    for arm, signature in signatures.items():
        if signature != expected:
            raise InvalidSpec(f"{name}: arm '{arm}' takes and gives {signature}; expected {expected}, as the first arm")
    return Experiment(name, wrapped, split, spec.unit), task


def _common_task(name: str, arms: Mapping[str, ArmModel]) -> Task:
    tasks = {arm: _task(name, arm, model) for arm, model in arms.items()}
    first = next(iter(tasks.values()))
    for arm, task in tasks.items():
        if task.classes != first.classes:
            raise InvalidSpec(f"{name}: arm '{arm}' has classes {task.classes}; expected {first.classes}")
    return replace(first, output=OUTPUT, scale="probabilities")


def _task(name: str, arm: str, model: ArmModel) -> Task:
    if model.task is None or model.task.kind != "classification":
        raise InvalidSpec(
            f"{name}: arm '{arm}' gives other outputs than the first and is no classification; "
            "expected arms of one signature, or classifications (state `task:` in the model's model.yaml)"
        )
    return model.task
