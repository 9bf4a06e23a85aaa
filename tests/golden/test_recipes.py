"""The example recipes are understood as they stand: a model.yaml for each kind, and recipe files `merge-*.yaml`."""

import shutil
from pathlib import Path

import pytest

from ensemerge.ensemble.spec import parse_ensemble
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.recipe import parse_model_yaml, parse_recipes
from ensemerge.repository import Repository, Spec
from ensemerge_server.experiments.spec import parse_experiment

FOLDER = Path(__file__).parents[2] / "models" / "recipes"
RECIPES = sorted(FOLDER.glob("merge-*.yaml"))
SPECS = sorted(set(FOLDER.glob("*.yaml")) - set(RECIPES))


def parse_merge(spec: Spec) -> object:
    return parse_model_yaml(spec, METHODS)


PARSERS = {"ensemble": parse_ensemble, "merge": parse_merge, "experiment": parse_experiment}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_model_yaml_is_understood(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(path, tmp_path / "mine" / "model.yaml")
    spec = Repository(tmp_path).spec("mine")
    assert spec.kind == path.stem
    assert PARSERS[spec.kind](spec)


def test_every_kind_has_a_model_yaml() -> None:
    assert {path.stem for path in SPECS} == set(PARSERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_understood(path: Path) -> None:
    assert parse_recipes(path.read_text(), path.name, METHODS)
