"""The models of a recipe, found and opened: their weights, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ensemerge.errors import EnsemergeError
from ensemerge.merge.companions import read_config
from ensemerge.merge.naming import ModelNames
from ensemerge.merge.problems import Problems
from ensemerge.merge.recipe import Recipe
from ensemerge.merge.references import ModelPath, ModelReference, locate
from ensemerge.merge.vocabulary import (
    ModelVocabulary,
    VocabularyPlan,
    mapped_readers,
    model_vocabulary,
    plan_vocabulary,
)
from ensemerge.weights.adapters import AdaptedWeights
from ensemerge.weights.open import onnx_file, open_weights
from ensemerge.weights.prepared import CastWeights
from ensemerge.weights.reader import WeightReader


@dataclass(frozen=True)
class OpenModel:
    """One model: where it lies, its weights with adapter and preparation, its config.json."""

    path: Path
    reader: WeightReader
    config: Mapping[str, Any] | None
    onnx: Path | None = None  # the file, where the weights are a graph's

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def names(self) -> ModelNames:
        return ModelNames(self.reader.names, self.reader.ties, self.config)

    @property
    def vocabulary(self) -> ModelVocabulary:
        shapes = {name: self.reader.info(name).shape for name in self.reader.names}
        return model_vocabulary(self.folder, shapes, self.config)


@dataclass(frozen=True)
class Library:
    """Where the names of a recipe lead: the recipe's folder, and merges of the same file that are done."""

    folder: Path
    made: Mapping[str, Path] = field(default_factory=dict)

    def path(self, model: ModelPath) -> Path:
        """Raises NotFound."""
        made = self.made.get(model.path) if model.revision is None else None
        return made or locate(model, self.folder)

    def open(self, reference: ModelReference) -> OpenModel:
        """Raises NotFound, InvalidData, InvalidModel."""
        path = self.path(reference.model)
        reader: WeightReader = open_weights(path)
        if reference.lora is not None:
            reader = AdaptedWeights(reader, self.path(reference.lora))
        return OpenModel(path, reader, read_config(path) if path.is_dir() else None, onnx_file(path))


def open_models(recipe: Recipe, library: Library) -> dict[str, OpenModel]:
    """Every model of the recipe by its text. Raises InvalidSpec with a line for each that cannot be opened."""
    problems, found = Problems(), {}
    for reference in recipe.references():
        try:
            found[str(reference)] = library.open(reference)
        except (EnsemergeError, OSError) as error:
            problems.add(f"{reference}: {error}")
    problems.raise_any()
    return found


def with_vocabulary(
    recipe: Recipe, models: Mapping[str, OpenModel], library: Library
) -> tuple[dict[str, OpenModel], VocabularyPlan | None]:
    """The models with the rows of the merged vocabulary, and that vocabulary. Raises InvalidSpec, InvalidModel."""
    vocabularies = {name: model.vocabulary for name, model in models.items()}
    plan = plan_vocabulary(recipe, vocabularies, _elsewhere(recipe, models, library))
    if plan is None:
        return dict(models), None
    readers = mapped_readers(plan, {name: model.reader for name, model in models.items()})
    return {name: replace(model, reader=readers[name]) for name, model in models.items()}, plan


def _elsewhere(recipe: Recipe, models: Mapping[str, OpenModel], library: Library) -> dict[str, Path]:
    """A tokenizer may come from a model whose weights are not merged."""
    source = recipe.tokenizer.source if recipe.tokenizer else None
    if not isinstance(source, ModelReference) or str(source) in models:
        return {}
    return {str(source): library.path(source.model)}


def cast_on_load(models: Mapping[str, OpenModel], dtype: str | None) -> dict[str, OpenModel]:
    """As mergekit reads: every weight rounded to the recipe's `dtype` before anything is computed."""
    if dtype is None:
        return dict(models)
    return {
        name: replace(model, reader=CastWeights(model.reader, getattr(torch, dtype))) for name, model in models.items()
    }
