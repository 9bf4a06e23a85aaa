"""What a `kind: merge` model.yaml says: the part of mergekit's recipe language that the methods here need, and ours.

merge_method: linear
models:
  - model: digits-a                     # a model of this repository, optionally name:version
  - {model: digits-b, parameters: {weight: 0.5}}
calibration: {data: calibration.npz, restore: batch_norm}     # ours: what is re-estimated after merging, on what
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields
from ensemerge.repository import Spec

METHOD_NAMES = ("linear",)
RESTORERS = ("batch_norm",)


@dataclass(frozen=True)
class Ingredient:
    """One model of a merge and its weight."""

    model: str
    weight: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Unlabelled inputs (an .npz beside model.yaml, arrays `(rows, …)` by input name) and what they restore."""

    data: str
    restore: str


@dataclass(frozen=True)
class MergeRecipe:
    """A merge as data."""

    method: str
    ingredients: tuple[Ingredient, ...]
    calibration: Calibration | None = None


def parse_recipe(spec: Spec) -> MergeRecipe:
    """Read the body of a `kind: merge` model.yaml. Raises InvalidSpec."""
    fields = spec.fields()
    method = fields.choose("merge_method", METHOD_NAMES, "linear")
    models = fields.take("models", list)
    calibration = fields.take("calibration", dict, None)
    fields.finish()
    ingredients = tuple(_ingredient(entry, f"{spec.where}: models[{i}]") for i, entry in enumerate(models))
    where = f"{spec.where}: calibration"
    return MergeRecipe(method, ingredients, None if calibration is None else _calibration(calibration, where))


def _ingredient(entry: object, where: str) -> Ingredient:
    fields = Fields(entry, where)
    model = fields.take("model", str)
    parameters = Fields(fields.take("parameters", dict, {}), f"{where}: parameters")
    fields.finish()
    weight = parameters.take("weight", float, 1.0)
    parameters.finish()
    if not math.isfinite(weight):
        raise InvalidSpec(f"{where}: weight is {weight}; expected a finite number")
    return Ingredient(model, weight)


def _calibration(entry: object, where: str) -> Calibration:
    fields = Fields(entry, where)
    calibration = Calibration(fields.take("data", str), fields.choose("restore", RESTORERS, "batch_norm"))
    fields.finish()
    return calibration
