"""Numbers that mergekit 0.1.5 gave (its `evaluate_setting`) stand beside ours."""

import pytest

from ensemerge.merge.parameters import Condition, Scalar, Settings, at_depth, find

GRADIENT = (0.0, 0.5, 0.3, 0.7, 1.0)


@pytest.mark.parametrize(
    ("t", "mergekit"),
    [(0, 0.0), (0.25, 0.5), (1 / 3, 0.43333333333333335), (0.5, 0.3), (0.9, 0.88), (1, 1.0)],
)
def test_a_gradient_is_linear_between_its_numbers(t: float, mergekit: float) -> None:
    assert at_depth(GRADIENT, t) == mergekit


@pytest.mark.parametrize(("t", "value"), [(0, True), (0.49, True), (0.5, False), (0.99, False), (1, True)])
def test_switches_go_in_steps(t: float, value: bool) -> None:
    assert at_depth((True, False, True), t) is value


def test_one_number_is_no_gradient() -> None:
    assert at_depth((0.5,), 1.0) == 0.5


SOURCE: Settings = {"weight": (Condition("attn", 1.0), Condition("mlp.up", 2.0))}
SLICE: Settings = {"weight": (Condition("mlp", 3.0),)}
RECIPE: Settings = {"weight": (Condition("norm", 4.0), Condition(None, 5.0), Condition("head", 6.0))}


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("l.0.attn.q", 1.0), ("l.0.mlp.up", 2.0), ("l.0.mlp.down", 3.0), ("l.0.norm", 4.0), ("head", 5.0)],
)
def test_the_nearest_level_with_a_filter_that_fits_holds(tensor: str, value: Scalar) -> None:
    assert find("weight", [SOURCE, SLICE, RECIPE], tensor, 0) == value


def test_where_no_level_says_anything_there_is_no_value() -> None:
    assert find("weight", [SOURCE, SLICE], "head", 0) is None
    assert find("density", [SOURCE, SLICE, RECIPE], "head", 0) is None


def test_a_condition_may_hold_a_gradient() -> None:
    settings: Settings = {"t": (Condition("mlp", (1.0, 0.0)), Condition(None, 0.5))}
    assert [find("t", [settings], "mlp", t) for t in (0, 0.25, 1)] == [1.0, 0.75, 0.0]
