"""The example recipes are understood as they stand."""

import shutil
from pathlib import Path

import pytest

from ensemerge.ensemble.spec import parse_ensemble
from ensemerge.merge.recipe import parse_recipe
from ensemerge.repository import Repository
from ensemerge_server.experiments.spec import parse_experiment

RECIPES = sorted((Path(__file__).parents[2] / "models" / "recipes").glob("*.yaml"))
PARSERS = {"ensemble": parse_ensemble, "merge": parse_recipe, "experiment": parse_experiment}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_understood(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(recipe, tmp_path / "mine" / "model.yaml")
    spec = Repository(tmp_path).spec("mine")
    assert spec.kind == recipe.stem
    assert PARSERS[spec.kind](spec)


def test_every_kind_has_a_recipe() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(PARSERS)
