from itertools import combinations, permutations, product

import numpy as np
import pytest

from ensemerge.align.assignment import assign, assign_groups, match_cycle_consistent, total_similarity
from ensemerge.errors import InvalidData

Similarities = dict[tuple[int, int], np.ndarray]


def value(table: np.ndarray, columns: np.ndarray) -> float:
    return float(table[np.arange(len(table)), columns].sum())


def best_value(table: np.ndarray) -> float:
    return max(value(table, np.array(order)) for order in permutations(range(len(table))))


@pytest.mark.parametrize("units", [1, 2, 5])
def test_an_assignment_has_the_largest_sum_of_all(units: int) -> None:
    table = np.random.default_rng(units).normal(size=(units, units))
    found = assign(table)
    assert found.dtype == np.int64
    assert value(table, found) == pytest.approx(best_value(table))


def test_entry_i_is_the_column_of_row_i() -> None:
    assert assign(np.array([[0, 9, 0], [0, 0, 9], [9, 0, 0]])).tolist() == [1, 2, 0]


def test_dead_units_are_assigned_to_what_is_left() -> None:
    table = np.zeros((4, 4), np.float32)
    table[1, 2] = table[3, 0] = 1
    found = assign(table)
    assert sorted(found) == [0, 1, 2, 3]
    assert (found[1], found[3]) == (2, 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.array([[0, np.nan], [1, 0]]), "1 of 4 similarities are NaN or infinite.*zero variance"),
        (np.array([[0, 1], [-np.inf, np.inf]]), "2 of 4 similarities"),
        (np.zeros((2, 3)), r"\(2, 3\); expected \(2, 2\)"),
        (np.zeros((0, 0)), r"none of them empty; got float64 \(0, 0\)"),
        (np.zeros(4), r"along 2 axes.*got float64 \(4,\)"),
        (np.zeros((2, 2), complex), "got complex128"),
    ],
)
def test_what_is_no_table_of_similarities_is_refused(table: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        assign(table)


def grouped_value(own: np.ndarray, inner: list[np.ndarray], groups: np.ndarray, units: list[np.ndarray]) -> float:
    matched = sum(
        value(table[row, :, column], chosen[row])
        for table, chosen in zip(inner, units, strict=True)
        for row, column in enumerate(groups)
    )
    return value(own, groups) + matched


def test_groups_and_their_units_have_the_largest_sum_of_all() -> None:
    generator = np.random.default_rng(1)
    own = generator.normal(size=(3, 3))
    inner = [generator.normal(size=(3, 2, 3, 2)), generator.normal(size=(3, 3, 3, 3))]
    groups, units = assign_groups(own, inner)
    assert [chosen.shape for chosen in units] == [(3, 2), (3, 3)]
    orders = [list(permutations(range(table.shape[1]))) for table in inner]
    best = max(
        grouped_value(own, inner, np.array(order), [np.array(first), np.array(second)])
        for order in permutations(range(3))
        for first, second in product(product(orders[0], repeat=3), product(orders[1], repeat=3))
    )
    assert grouped_value(own, inner, groups, units) == pytest.approx(best)


def test_groups_that_were_moved_together_with_their_units_are_found() -> None:
    generator = np.random.default_rng(2)
    heads = np.array([2, 0, 3, 1])
    orders = [np.array([generator.permutation(units) for _ in heads]) for units in (3, 5)]
    tables = []
    for order in orders:
        groups, units = order.shape
        table = np.zeros((groups, units, groups, units))
        table[np.arange(groups)[:, None], np.arange(units), heads[:, None], order] = 1
        tables.append(table)
    found, nested = assign_groups(None, tables)
    assert found.tolist() == heads.tolist()
    for got, order in zip(nested, orders, strict=True):
        np.testing.assert_array_equal(got, order)


def test_the_groups_own_similarity_counts_beside_their_units() -> None:
    table = np.zeros((2, 1, 2, 1))
    table[0, 0, 0, 0] = table[1, 0, 1, 0] = 1
    crossed = np.array([[0.0, 1.5], [1.5, 0.0]])
    assert assign_groups(None, [table])[0].tolist() == [0, 1]
    assert assign_groups(crossed, [table])[0].tolist() == [1, 0]
    assert assign_groups(crossed, [])[0].tolist() == [1, 0]
    assert crossed.tolist() == [[0.0, 1.5], [1.5, 0.0]]  # only read


@pytest.mark.parametrize(
    ("own", "inner", "message"),
    [
        (None, [], "nothing to match groups by"),
        (np.zeros((2, 3)), [], r"\(2, 3\); expected \(2, 2\)"),
        (None, [np.zeros((2, 3, 2, 4))], r"expected \(2, 3, 2, 3\)"),
        (np.zeros((2, 2)), [np.zeros((3, 1, 3, 1))], r"expected \(2, 1, 2, 1\)"),
        (None, [np.full((2, 1, 2, 1), np.nan)], "4 of 4 similarities"),
    ],
)
def test_groups_that_do_not_fit_are_refused(own: np.ndarray | None, inner: list[np.ndarray], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        assign_groups(own, inner)


def planted(models: int, units: int, noise: float, seed: int) -> tuple[Similarities, list[np.ndarray]]:
    """Models that hold the same units in different order, and noise; and the maps into model 0's order."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(units, 20))
    maps = [np.arange(units), *(generator.permutation(units) for _ in range(models - 1))]
    seen = [(features + noise * generator.normal(size=features.shape))[np.argsort(order)] for order in maps]
    return {(a, b): seen[a] @ seen[b].T for a, b in combinations(range(models), 2)}, maps


@pytest.mark.parametrize("models", [2, 3, 5])
def test_a_common_order_is_found_under_noise(models: int) -> None:
    similarities, maps = planted(models, 30, 0.5, models)
    for got, expected in zip(match_cycle_consistent(similarities, models), maps, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_maps_compose_where_assignments_of_pairs_do_not() -> None:
    similarities, _ = planted(3, 30, 2.0, 0)
    alone = {pair: assign(table) for pair, table in similarities.items()}
    assert (alone[1, 2][alone[0, 1]] != alone[0, 2]).any()
    maps = match_cycle_consistent(similarities, 3)
    assert maps[0].tolist() == list(range(30))
    between = {(a, b): maps[b][np.argsort(maps[a])] for a, b in similarities}
    np.testing.assert_array_equal(between[1, 2][between[0, 1]], between[0, 2])
    assert sorted(maps[1]) == sorted(maps[2]) == list(range(30))


@pytest.mark.parametrize("seed", range(4))
def test_a_common_order_is_worth_more_than_following_any_one_model(seed: int) -> None:
    similarities, _ = planted(4, 12, 2.0, seed)
    both = similarities | {(b, a): table.T for (a, b), table in similarities.items()}
    maps = match_cycle_consistent(similarities, 4)
    total = total_similarity(similarities, maps)
    for leader in range(4):
        following = [assign(both[leader, other]) if other != leader else np.arange(12) for other in range(4)]
        assert total >= total_similarity(similarities, following) - 1e-9
    # Nor does any one model gain by moving.
    for model in range(4):
        table = np.sum([both[other, model][maps[other]] for other in range(4) if other != model], axis=0)
        assert value(table, maps[model]) == pytest.approx(value(table, assign(table)))


@pytest.mark.parametrize("seed", range(12))
def test_a_small_common_order_is_the_best_of_all(seed: int) -> None:
    # Starting from model 0 alone would miss it for seed 10.
    similarities, _ = planted(3, 4, 2.0, seed)
    orders = [np.array(order) for order in permutations(range(4))]
    best = max(total_similarity(similarities, [orders[0], *others]) for others in product(orders, repeat=2))
    assert total_similarity(similarities, match_cycle_consistent(similarities, 3)) == pytest.approx(best)


def test_two_models_are_assigned() -> None:
    table = np.random.default_rng(3).normal(size=(9, 9))
    first, second = match_cycle_consistent({(0, 1): table}, 2)
    assert first.tolist() == list(range(9))
    np.testing.assert_array_equal(second, assign(table))


@pytest.mark.parametrize(
    ("shapes", "models", "message"),
    [
        ({}, 1, "1 models: expected at least 2"),
        ({(0, 1): (2, 2)}, 3, r"got \[\(0, 1\)\]"),
        ({(1, 0): (2, 2)}, 2, r"the pairs \[\(0, 1\)\]"),
        ({(0, 1): (2, 3)}, 2, r"models 0 and 1 is \(2, 3\)"),
        ({(0, 1): (2, 2), (0, 2): (3, 3), (1, 2): (2, 2)}, 3, "models 0 and 2"),
    ],
)
def test_similarities_of_some_pairs_only_are_refused(
    shapes: dict[tuple[int, int], tuple[int, int]], models: int, message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        match_cycle_consistent({pair: np.zeros(shape) for pair, shape in shapes.items()}, models)
