from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemerge_server.experiments.assignment import Split, position


def test_positions_never_change() -> None:
    # Frozen: a change here would move the users of every running experiment to other arms.
    positions = [position("digits", f"user-{number}") for number in range(3)]
    assert positions == pytest.approx([0.920225, 0.097262, 0.740968], abs=1e-6)


def test_shares_follow_the_weights() -> None:
    split = Split({"a": 10, "b": 30, "c": 60}, "salt")
    counts = Counter(split.arm(f"user-{number}") for number in range(20_000))
    # Binomial deviation at 20,000 units: 0.0035 at most; four of them.
    assert {arm: counts[arm] / 20_000 for arm in "abc"} == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6}, abs=0.014)


def test_another_salt_assigns_independently() -> None:
    first, second = Split({"a": 1, "b": 1}, "one"), Split({"a": 1, "b": 1}, "two")
    both = sum(first.arm(str(unit)) == second.arm(str(unit)) for unit in range(10_000))
    # Independent halves agree half of the time; the deviation is 0.005.
    assert both / 10_000 == pytest.approx(0.5, abs=0.02)


def test_an_arm_of_weight_zero_gets_nobody() -> None:
    split = Split({"a": 0, "b": 1}, "salt")
    assert {split.arm(str(unit)) for unit in range(1000)} == {"b"}


@given(st.text(), st.text(), st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_every_unit_has_one_arm_and_keeps_it(salt: str, unit: str, weights: list[float]) -> None:
    arms = {f"arm{number}": weight for number, weight in enumerate(weights)}
    assert Split(arms, salt).arm(unit) == Split(arms, salt).arm(unit)
    assert 0 <= position(salt, unit) <= 1
