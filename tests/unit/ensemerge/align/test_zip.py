from typing import Any

import numpy as np
import pytest

from ensemerge.align.zip import zip_groups, zip_units
from ensemerge.errors import InvalidData


def correlations(parts: int, units: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """Of units that every part holds in another order, with noise: `(parts·units, parts·units)`."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(units, 20))
    seen = [features[generator.permutation(units)] + noise * generator.normal(size=(units, 20)) for _ in range(parts)]
    return np.asarray(np.corrcoef(np.concatenate(seen)))


def zip_slowly(table: np.ndarray, models: int, keep: int, damping: float, budget: float) -> list[list[int]]:
    """The same greedy zip, looking at every pair anew each time: the members of each merged unit."""
    units = len(table) // models
    members = {unit: [unit] for unit in range(len(table))}
    similarity = {(i, j): table[i, j] for i in range(len(table)) for j in range(len(table)) if i != j}
    left = dict.fromkeys(range(models), int((len(table) - keep) / models * budget + 1e-9))
    while len(members) > keep:
        owners = {column: {unit // units for unit in members[column]} for column in members}
        full = sum(len(inside) > 1 for inside in members.values()) == keep
        allowed = [
            (i, j)
            for i in members
            for j in members
            if i < j
            and all(left[model] for model in owners[i] & owners[j])
            and not (full and len(members[i]) == len(members[j]) == 1)
        ]
        first, second = max(allowed, key=similarity.__getitem__)
        for model in owners[first] & owners[second]:
            left[model] -= 1
        members[first] += members.pop(second)
        for other in members.keys() - {first}:
            least = min(similarity[first, other], similarity[second, other])
            similarity[first, other] = similarity[other, first] = least * damping if least > 0 else least
    return [sorted(inside) for inside in members.values()]


@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize(
    ("models", "units", "keep", "budget"),
    [
        *((*sizes, budget) for sizes in [(2, 8, 8), (2, 8, 13), (3, 6, 6), (4, 4, 5)] for budget in (0.0, 0.3, 1.0)),
        (2, 8, 6, 1.0),
        (3, 8, 2, 1.0),
    ],
)
def test_a_zip_is_that_of_looking_at_every_pair(
    models: int, units: int, keep: int, budget: float, damping: float
) -> None:
    for seed in range(4):
        table = correlations(models, units, seed)
        zipped = zip_units(table, models, keep=keep, damping=damping, budget=budget)
        members = [np.flatnonzero(zipped.groups == group).tolist() for group in range(keep)]
        assert members == sorted(zip_slowly(table, models, keep, damping, budget))


def test_units_within_one_model_are_merged_too() -> None:
    table = correlations(1, 6, 0)
    zipped = zip_units(table, 1, keep=2, damping=1.0)
    expected = sorted(zip_slowly(table, 1, 2, 1.0, 1.0))
    assert [np.flatnonzero(zipped.groups == group).tolist() for group in range(2)] == expected


@pytest.mark.parametrize("seed", range(5))
def test_without_a_budget_two_models_are_matched_one_to_one(seed: int) -> None:
    zipped = zip_units(correlations(2, 16, seed), 2, budget=0.0)
    assert zipped.groups[:16].tolist() == list(range(16))
    assert sorted(zipped.groups[16:]) == list(range(16))


@pytest.mark.parametrize("models", [3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_without_a_budget_a_merged_unit_holds_one_of_every_model(seed: int, models: int) -> None:
    # Pairs such as AB, AC and BC, once begun, could not be merged any further.
    zipped = zip_units(correlations(models, 7, seed), models, budget=0.0)
    for group in range(7):
        owners = np.flatnonzero(zipped.groups == group) // 7
        assert owners.tolist() == list(range(models))


def test_a_budget_of_nothing_forbids_the_first_merge_within_a_model() -> None:
    table = np.eye(4)
    table[0, 1] = table[1, 0] = 0.99
    table[0, 2] = table[2, 0] = 0.1
    assert zip_units(table, 2, budget=1.0).groups.tolist() == [0, 0, 0, 1]
    assert zip_units(table, 2, budget=0.0).groups.tolist() == [0, 1, 0, 1]


def test_a_budget_is_spent_to_the_last_merge_and_no_further() -> None:
    # Units are like those of their own model alone. 0.58 of 100 merges is 57.99… in floating point.
    noise = np.random.default_rng(0).uniform(0, 0.1, (200, 200))
    own = np.kron(np.eye(2), np.ones((100, 100)))
    groups = zip_units(own + noise + noise.T, 2, damping=1.0, budget=0.58).groups
    assert [len(np.unique(model)) for model in (groups[:100], groups[100:])] == [71, 71]


def test_a_merged_unit_belongs_to_all_its_models() -> None:
    # Unit 3 is most like what 0 and 2 became, but 2 is of its own model.
    table = np.eye(4)
    table[0, 2] = table[2, 0] = 0.9
    table[0, 3] = table[3, 0] = table[2, 3] = table[3, 2] = 0.8
    assert zip_units(table, 2, damping=1.0, budget=0.0).groups.tolist() == [0, 1, 0, 1]
    assert zip_units(table, 2, damping=1.0, budget=1.0).groups.tolist() == [0, 1, 0, 0]


def test_damping_does_not_raise_what_is_negative() -> None:
    table = np.eye(4)
    table[0, 2] = table[2, 0] = -0.1
    for i, j, similarity in [(0, 1, -0.6), (1, 2, -0.6), (0, 3, -0.9), (2, 3, -0.9), (1, 3, -0.5)]:
        table[i, j] = table[j, i] = similarity
    # Halved, the merged unit's -0.6 to unit 1 would come before -0.5.
    assert zip_units(table, 2, damping=0.5).groups.tolist() == [0, 1, 0, 1]


def test_the_merge_of_a_network_with_itself_is_exact() -> None:
    table = correlations(1, 12, 0)
    zipped = zip_units(np.tile(table, (2, 2)), 2)
    np.testing.assert_array_equal(zipped.merge, np.tile(np.eye(12) / 2, (2, 1)))
    np.testing.assert_array_equal(zipped.unmerge, np.tile(np.eye(12), (2, 1)))


def test_merging_averages_and_unmerging_copies() -> None:
    zipped = zip_units(correlations(3, 10, 4), 3, keep=8)
    values = np.random.default_rng(0).normal(size=30)
    averages = zipped.merge.T @ values
    assert averages == pytest.approx([values[zipped.groups == group].mean() for group in range(8)])
    np.testing.assert_array_equal(zipped.unmerge @ averages, averages[zipped.groups])
    assert zipped.merge.dtype == zipped.unmerge.dtype == np.float64


def test_permuted_units_find_each_other() -> None:
    order = np.random.default_rng(1).permutation(20)
    table = correlations(1, 20, 1)
    moved = np.concatenate([np.arange(20), order])
    assert zip_units(table[np.ix_(moved, moved)], 2).groups.tolist() == moved.tolist()


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_dead_units_are_merged_with_something(damping: float) -> None:
    table = correlations(2, 10, 2)
    dead = [0, 3, 11, 12, 13]
    table[dead] = table[:, dead] = 0
    zipped = zip_units(table, 2, damping=damping, budget=0.0)
    assert sorted(zipped.groups) == sorted([*range(10), *range(10)])
    assert zip_units(np.zeros((20, 20)), 2, damping=damping).groups.max() == 9


def test_single_units() -> None:
    assert zip_units(np.zeros((3, 3)), 3).groups.tolist() == [0, 0, 0]
    assert zip_units(np.ones((1, 1), np.float32), 1).merge.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (np.full((4, 4), np.nan), {}, "16 of 16 similarities are NaN"),
        (np.zeros((0, 0)), {}, "none of them empty"),
        (np.zeros((4, 6)), {}, "expected a square of 2 equal parts"),
        (np.zeros((5, 5)), {}, "expected a square of 2 equal parts"),
        (np.triu(np.ones((4, 4))), {}, "not symmetric"),
        (np.eye(4), {"damping": 1.5}, "damping is 1.5; expected 0 to 1"),
        (np.eye(4), {"damping": float("nan")}, "damping is nan"),
        (np.eye(4), {"budget": -0.1}, "a budget from 0 to 1"),
        (np.eye(4), {"keep": 0}, "expected 1 to 4"),
        (np.eye(4), {"keep": 5}, "expected 1 to 4"),
        (np.eye(8), {"keep": 2, "budget": 0.2}, "2 must be merged within each model; a budget of 0.2 allows 0"),
    ],
)
def test_what_cannot_be_zipped_is_refused(table: np.ndarray, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        zip_units(table, 2, **settings)


def test_a_table_must_have_models() -> None:
    with pytest.raises(InvalidData, match="0 equal parts"):
        zip_units(np.eye(4), 0)


def test_the_table_is_left_as_it_was() -> None:
    table = correlations(2, 5, 0)
    before = table.copy()
    zip_units(table, 2)
    np.testing.assert_array_equal(table, before)


def heads(orders: list[np.ndarray], units: int, seed: int) -> np.ndarray:
    """Correlations of models that hold the same heads in these orders, and each head's units in another, with noise."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(len(orders[0]), units, 20))
    seen = [np.stack([head[generator.permutation(units)] for head in features[order]]) for order in orders]
    stacked = np.concatenate([model.reshape(-1, 20) for model in seen])
    return np.asarray(np.corrcoef(stacked + 0.3 * generator.normal(size=stacked.shape)))


@pytest.mark.parametrize("models", [2, 3])
def test_heads_are_matched_alike_for_all_their_units(models: int) -> None:
    generator = np.random.default_rng(models)
    orders = [np.arange(4), *(generator.permutation(4) for _ in range(models - 1))]
    zips = zip_groups([heads(orders, 3, 0), heads(orders, 5, 1)], models, 4, budget=0.0)
    for zipped, units in zip(zips, (3, 5), strict=True):
        places = zipped.groups.reshape(models, 4, units)
        assert zipped.keep == 4 * units
        for model, order in zip(places, orders, strict=True):
            # Every head holds exactly the merged units of its set.
            np.testing.assert_array_equal(np.sort(model), order[:, None] * units + np.arange(units))


def test_each_matched_set_keeps_the_units_of_one_group() -> None:
    zipped = zip_groups([correlations(2, 12, 0)], 2, 3, budget=1.0)[0]
    sets = zipped.groups.reshape(2, 3, 4) // 4
    assert (sets == sets[:, :, :1]).all()
    assert sets[0, :, 0].tolist() == [0, 1, 2]
    assert len(np.unique(zipped.groups)) == 12


def test_one_group_is_no_group() -> None:
    table = correlations(3, 9, 5)
    grouped = zip_groups([table], 3, 1, damping=0.7, budget=0.4)[0]
    np.testing.assert_array_equal(grouped.groups, zip_units(table, 3, damping=0.7, budget=0.4).groups)


def test_what_groups_have_in_common_decides_where_their_units_do_not() -> None:
    own = np.eye(4)
    own[0, 3] = own[3, 0] = own[1, 2] = own[2, 1] = 1.0
    zipped = zip_groups([np.zeros((8, 8))], 2, 2, own=own, budget=0.0)[0]
    assert (zipped.groups.reshape(2, 2, 2)[:, :, 0] // 2).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("tables", "models", "message"),
    [
        ([np.eye(10)], 2, "expected a square of 4 equal parts"),
        ([np.eye(8), np.full((4, 4), np.inf)], 2, "16 of 16 similarities"),
        ([], 2, "nothing to match groups by"),
        ([np.eye(8)], 1, "expected at least 2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tables: list[np.ndarray], models: int, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        zip_groups(tables, models, 2)
