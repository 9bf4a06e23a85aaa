from typing import Any

import pytest

from ensemerge.errors import InvalidSpec
from ensemerge.merge.methods import METHODS
from ensemerge.merge.recipe import METHOD_NAMES, Calibration, Ingredient, MergeRecipe, parse_recipe
from ensemerge.repository import Spec


def parse(**body: Any) -> MergeRecipe:
    return parse_recipe(Spec("digits-merged", "merge", None, body, "digits-merged/model.yaml"))


def test_a_whole_recipe() -> None:
    recipe = parse(
        merge_method="linear",
        models=[{"model": "a"}, {"model": "b:2", "parameters": {"weight": 0.5}}],
        calibration={"data": "calibration.npz", "restore": "batch_norm"},
    )
    expected = (Ingredient("a", 1.0), Ingredient("b:2", 0.5))
    assert recipe == MergeRecipe("linear", expected, Calibration("calibration.npz", "batch_norm"))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"models": [{"model": "a"}], "merge_metod": "linear"}, "did you mean 'merge_method'"),
        ({"models": [{"model": "a"}], "merge_method": "liner"}, "did you mean 'linear'"),
        ({"models": [{"modle": "a"}]}, "'model' is missing; there is 'modle'"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "did you mean 'weight'"),
        ({"models": [{"model": "a", "parameters": {"weight": float("nan")}}]}, "expected a finite number"),
        ({"models": "a"}, "'models': expected a list"),
        ({"models": [{"model": "a"}], "calibration": {}}, "'data' is missing"),
        ({}, "'models' is missing"),
    ],
)
def test_a_recipe_that_is_not_understood_says_where(body: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        parse(**body)


def test_every_method_that_a_recipe_can_name_exists() -> None:
    assert set(METHOD_NAMES) == set(METHODS)
