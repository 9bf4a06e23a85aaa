import math
from itertools import permutations

import numpy as np
import pytest

from ensemerge.align import transport as module
from ensemerge.align.assignment import assign
from ensemerge.align.transport import sinkhorn, transport
from ensemerge.errors import CheckFailed, InvalidData


def similarities(first: int, second: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(first, second))


def correlations(first: int, second: int, noise: float, seed: int) -> np.ndarray:
    """Of units that two networks share, in another order and with noise."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(max(first, second), 64))
    seen = [generator.permutation(features) + noise * generator.normal(size=features.shape) for _ in range(2)]
    table: np.ndarray = np.corrcoef(np.concatenate([seen[0][:first], seen[1][:second]]))[:first, first:]
    return table


def worst_sum(plan: np.ndarray) -> float:
    """The largest relative error of a row's or a column's sum."""
    first, second = plan.shape
    errors = np.concatenate([plan.sum(axis=1) * first, plan.sum(axis=0) * second]) - 1
    return float(np.abs(errors).max())


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 4), (6, 9), (8, 8), (12, 5), (4, 8)])
def test_an_exact_plan_has_uniform_sums(first: int, second: int) -> None:
    plan = transport(similarities(first, second))
    assert plan.shape == (first, second)
    assert plan.min() >= 0
    assert worst_sum(plan) < 1e-14


def test_equal_widths_are_assigned() -> None:
    table = similarities(7, 7)
    np.testing.assert_array_equal(transport(table), np.eye(7)[assign(table)] / 7)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (2, 4), (3, 6)])
def test_an_exact_plan_has_the_largest_sum_of_all(first: int, second: int) -> None:
    # Corners of the set of plans are whole numbers of shares, so trying all assignments of shares tries them all.
    table = similarities(first, second, 3)
    shares = math.lcm(first, second)
    rows, columns = np.arange(shares) * first // shares, np.arange(shares) * second // shares
    best = max(table[rows, columns[list(order)]].sum() for order in permutations(range(shares))) / shares
    assert (transport(table) * table).sum() == pytest.approx(best)


@pytest.mark.parametrize(("first", "second"), [(17, 23), (12, 18), (9, 9), (1, 6)])
def test_the_linear_program_agrees_with_the_assignment(
    monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    table = similarities(first, second, 5)
    assigned = transport(table)
    monkeypatch.setattr(module, "SHARES", 0)
    programmed = transport(table)
    assert worst_sum(programmed) < 1e-14
    np.testing.assert_allclose(programmed, assigned, rtol=0, atol=1e-15)


def test_widths_beyond_both_limits_are_refused() -> None:
    with pytest.raises(InvalidData, match=r"\(650, 651\).*use sinkhorn"):
        transport(np.zeros((650, 651)))


@pytest.mark.parametrize("table", [np.full((2, 3), np.nan), np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.inf)])
def test_what_is_no_table_of_similarities_is_refused(table: np.ndarray) -> None:
    with pytest.raises(InvalidData, match="similarities"):
        transport(table)
    with pytest.raises(InvalidData, match="similarities"):
        sinkhorn(table, 0.1)


def sinkhorn_plainly(table: np.ndarray, regularization: float) -> np.ndarray:
    """Cuturi's algorithm 1 as it stands."""
    first, second = table.shape
    kernel = np.exp(table / regularization)
    right = np.ones(second)
    for _ in range(5000):
        left = 1 / first / (kernel @ right)
        right = 1 / second / (kernel.T @ left)
    plan: np.ndarray = left[:, None] * kernel * right
    return plan


@pytest.mark.parametrize(("first", "second"), [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("regularization", [0.3, 2.0, 100.0])
def test_sinkhorn_is_the_plain_iteration(first: int, second: int, regularization: float) -> None:
    table = similarities(first, second)
    expected = sinkhorn_plainly(table, regularization)
    np.testing.assert_allclose(sinkhorn(table, regularization, tolerance=1e-10), expected, rtol=1e-7)


@pytest.mark.parametrize("noise", [1.0, 30.0])
@pytest.mark.parametrize(("first", "second"), [(60, 60), (50, 64), (64, 50), (1, 7), (7, 1), (1, 1)])
def test_without_regularization_sinkhorn_comes_to_the_exact_plan(first: int, second: int, noise: float) -> None:
    table = correlations(first, second, noise, 0)
    exact = (transport(table) * table).sum()
    short = []
    for regularization in (1e-1, 1e-2, 1e-3, 1e-5):
        plan = sinkhorn(table, regularization)
        assert worst_sum(plan) <= 1.001e-6
        short.append(exact - (plan * table).sum())
        # Neither plan's entropy exceeds log(first·second), nor does the exact plan's fall below 0.
        assert short[-1] <= regularization * math.log(first * second) + 2e-6
    assert np.diff(short).max() <= 2e-6
    assert short[-1] <= 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_nearly_equal_widths_do_not_hold_sinkhorn_up(seed: int) -> None:
    # Here all rows but a few are settled at once, and the rest moves along chains through all of them.
    assert worst_sum(sinkhorn(correlations(63, 64, 3.0, seed), 1e-4)) <= 1.001e-6


def test_units_that_are_all_alike_are_spread_evenly() -> None:
    np.testing.assert_allclose(sinkhorn(np.full((3, 5), 7.0), 0.1), np.full((3, 5), 1 / 15))
    table = correlations(20, 20, 1.0, 0)
    table[:4] = 0  # dead units
    assert worst_sum(sinkhorn(table, 1e-3)) <= 1.001e-6


@pytest.mark.parametrize("regularization", [1.0, 0.25, 1e-2, 1e-4])
def test_ties_do_not_hold_sinkhorn_up(regularization: float) -> None:
    # Of two rows the curvature is singular to the last bit.
    assert worst_sum(sinkhorn(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), regularization)) <= 1.001e-6
    whole = np.random.default_rng(0).integers(0, 3, (4, 6))
    assert worst_sum(sinkhorn(whole, regularization)) <= 1.001e-6


def test_what_did_not_converge_is_an_error() -> None:
    with pytest.raises(CheckFailed, match="after 1 iterations") as caught:
        sinkhorn(correlations(30, 40, 1.0, 0), 1e-3, iterations=1)
    assert caught.value.difference > caught.value.bound == 1e-6


@pytest.mark.parametrize(
    ("regularization", "tolerance"), [(0.0, 1e-6), (-1.0, 1e-6), (math.nan, 1e-6), (math.inf, 1e-6), (0.1, 0.0)]
)
def test_a_regularization_must_be_positive(regularization: float, tolerance: float) -> None:
    with pytest.raises(InvalidData, match="expected a positive number"):
        sinkhorn(similarities(2, 3), regularization, tolerance=tolerance)


def test_a_regularization_must_be_told_from_zero() -> None:
    with pytest.raises(InvalidData, match="use transport"):
        sinkhorn(similarities(2, 3), 1e-300)
