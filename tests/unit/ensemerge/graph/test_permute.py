import numpy as np
import pytest

from ensemerge.errors import InvalidData
from ensemerge.graph.permute import compose, identity, inverse, move, random_permutations
from ensemerge.graph.symmetry import Axis, Space, Symmetry

SPACES = [
    Space("heads", 3),
    Space("units", 4, within=("heads",)),
    Space("width", 5),
    Space("groups", 2),
    Space("inner", 3, within=("groups",)),
    Space("input", 2, frozen="it is an input"),
]


def one(*names: str) -> Axis:
    return (names,)


# A projection into heads, its bias, a grouped kernel whose inner units lie on another axis than the groups, and a
# matrix that reads a concatenation.
WEIGHTS: dict[str, tuple[Axis, ...]] = {
    "projection": (one("heads", "units"), one("width")),
    "bias": (one("heads", "units"),),
    "grouped": (one("groups", "width"), one("inner")),
    "joined": ((("width",), ("heads", "units")), one("input")),
}
SYMMETRY = Symmetry({space.name: space for space in SPACES}, WEIGHTS, {}, frozenset(), {}, {})
ARRAYS = {
    "projection": np.arange(60.0).reshape(12, 5),
    "bias": np.arange(12.0),
    "grouped": np.arange(30.0).reshape(10, 3),
    "joined": np.arange(34.0).reshape(17, 2),
    "unknown": np.arange(3.0),
}


def drawn(seed: int) -> dict[str, np.ndarray]:
    return random_permutations(SYMMETRY, np.random.default_rng(seed))


def equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_units_of_a_head_have_their_own_order_and_move_with_it() -> None:
    order = {"heads": np.array([2, 0, 1]), "units": np.array([[1, 0, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]])}
    moved = move(SYMMETRY, ARRAYS, order)["bias"]
    assert moved.tolist() == [9, 8, 10, 11, 0, 1, 2, 3, 7, 6, 5, 4]


def test_units_within_groups_on_another_axis() -> None:
    order = {"groups": np.array([1, 0]), "inner": np.array([[2, 1, 0], [0, 1, 2]])}
    moved = move(SYMMETRY, ARRAYS, order)["grouped"]
    # The second group came first, and its inner units are turned round.
    assert moved[0].tolist() == ARRAYS["grouped"][5][::-1].tolist()
    assert moved[5].tolist() == ARRAYS["grouped"][0].tolist()


def test_parts_of_a_concatenation_move_by_themselves() -> None:
    moved = move(SYMMETRY, ARRAYS, {"width": np.array([4, 3, 2, 1, 0])})["joined"]
    assert np.array_equal(moved[:5], ARRAYS["joined"][:5][::-1])
    assert np.array_equal(moved[5:], ARRAYS["joined"][5:])


def test_the_inverse_leads_back() -> None:
    moved = move(SYMMETRY, ARRAYS, drawn(0))
    assert not equal(moved, ARRAYS)
    assert equal(move(SYMMETRY, moved, inverse(SYMMETRY, drawn(0))), ARRAYS)


def test_composition_is_one_after_the_other() -> None:
    both = move(SYMMETRY, move(SYMMETRY, ARRAYS, drawn(1)), drawn(2))
    assert equal(move(SYMMETRY, ARRAYS, compose(SYMMETRY, drawn(1), drawn(2))), both)


def test_what_is_frozen_is_not_drawn() -> None:
    assert set(drawn(0)) == {"heads", "units", "width", "groups", "inner"}
    assert drawn(0)["units"].shape == (3, 4)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"nothing": np.arange(3)}, "no space 'nothing'"),
        ({"heads": np.arange(4)}, r"'heads': expected whole numbers \(3,\)"),
        ({"heads": np.array([0.0, 1.0, 2.0])}, "whole numbers"),
        ({"heads": np.array([0, 0, 2])}, "each of 0 to 2 once"),
        ({"input": np.array([1, 0])}, "must stay in place: it is an input"),
    ],
)
def test_what_is_no_permutation_of_a_space(order: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        move(SYMMETRY, ARRAYS, order)


def test_weights_that_are_not_touched_are_not_copied() -> None:
    moved = move(SYMMETRY, ARRAYS, {"inner": identity(SYMMETRY, SPACES[4])[:, ::-1]})
    assert moved["bias"] is ARRAYS["bias"]
    assert moved["unknown"] is ARRAYS["unknown"]
