"""What a `kind: experiment` model.yaml says.

arms: {ensemble: {model: digits-ensemble, weight: 50}, merged: {model: digits-merged, weight: 50}}
unit: user_id             # the request parameter that keeps a caller on one arm
mode: split
salt: digits-2026-11      # optional, the experiment's name by default: a new salt assigns all units anew
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields
from ensemerge.repository import Spec

MODES = ("split",)
# Arms become values of a metrics label and keys in reports.
_ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Arm:
    """One side of an experiment: a model of this repository and its weight among the arms."""

    model: str
    weight: float


@dataclass(frozen=True)
class ExperimentSpec:
    """An experiment as data."""

    arms: dict[str, Arm]
    unit: str
    salt: str


def parse_experiment(spec: Spec) -> ExperimentSpec:
    """Read the body of a `kind: experiment` model.yaml. Raises InvalidSpec."""
    fields = spec.fields()
    entries = fields.take("arms", dict)
    unit = fields.take("unit", str)
    fields.choose("mode", MODES, "split")
    salt = fields.take("salt", str, spec.name)
    fields.finish()
    arms = {str(name): _arm(str(name), entry, f"{spec.where}: arms.{name}") for name, entry in entries.items()}
    if len(arms) < 2 or not sum(arm.weight for arm in arms.values()) > 0:
        raise InvalidSpec(f"{spec.where}: expected at least two arms, their weights above zero in sum")
    return ExperimentSpec(arms, unit, salt)


def _arm(name: str, entry: object, where: str) -> Arm:
    if not _ARM.fullmatch(name):
        raise InvalidSpec(f"{where}: an arm's name has letters, digits, '.', '_' and '-', at most 64")
    fields = Fields(entry, where)
    arm = Arm(fields.take("model", str), fields.take("weight", float, 1.0))
    fields.finish()
    if not (math.isfinite(arm.weight) and arm.weight >= 0):
        raise InvalidSpec(f"{where}: weight is {arm.weight}; expected a number from 0 up")
    return arm
