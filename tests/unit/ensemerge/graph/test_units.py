import pytest

from ensemerge.graph.units import OVERLAP, Units, cut, product_of, sum_of, tie


def sizes(units: list[Units]) -> list[int]:
    return [unit.size for unit in units]


def test_tied_units_are_one_and_freeze_together() -> None:
    a, b, c = Units(4), Units(4), Units(4)
    tie(a, b)
    tie(c, b)
    assert a.root is b.root is c.root
    a.freeze("because")
    assert c.frozen == "because"


def test_what_meets_a_frozen_axis_is_frozen() -> None:
    a, b = Units(4), Units(4, "input")
    tie(a, b)
    assert a.frozen == "input"


def test_an_axis_that_meets_a_product_becomes_one() -> None:
    heads, units, packed = Units(3), Units(4), Units(12)
    tie(packed, product_of([heads, units]))
    assert [factor.root for factor in packed.factors] == [heads.root, units.root]


def test_products_are_cut_to_their_common_factors() -> None:
    a, b = product_of([Units(6), Units(4)]), product_of([Units(2), Units(12)])
    tie(a, b)
    assert sizes(a.factors) == sizes(b.factors) == [2, 3, 4]
    assert [factor.root for factor in a.factors] == [factor.root for factor in b.factors]


def test_products_without_common_factors_stay_in_place() -> None:
    a, b = product_of([Units(4), Units(6)]), product_of([Units(6), Units(4)])
    tie(a, b)
    assert {leaf.frozen for leaf in (*a.leaves, *b.leaves)} == {OVERLAP}


def test_concatenations_are_cut_where_either_ends() -> None:
    a, b = sum_of([Units(5), Units(3)]), sum_of([Units(2), Units(6)])
    tie(a, b)
    assert sizes(a.terms) == [2, 3, 3]
    assert [term.root for term in a.terms] == [term.root for term in b.terms]


def test_an_axis_that_meets_a_concatenation_becomes_one() -> None:
    whole = Units(8)
    first, second = cut(whole, [3, 5])
    assert [term.root for term in whole.terms] == [first.root, second.root]


def test_a_product_distributes_over_a_concatenation() -> None:
    outer, inner = Units(5), Units(4)
    a, b = product_of([outer, inner]), sum_of([Units(8), Units(12)])
    tie(a, b)
    assert [sizes(term.factors) for term in a.terms] == [[2, 4], [3, 4]]
    assert sizes(outer.terms) == [2, 3]


@pytest.mark.parametrize("terms", [[3, 17], [10, 10]])
def test_a_product_that_is_cut_within_an_outer_unit_stays_in_place(terms: list[int]) -> None:
    a, b = product_of([Units(5), Units(4)]), sum_of([Units(size) for size in terms])
    tie(a, b)
    assert all(leaf.frozen for leaf in (*a.leaves, *b.leaves))


def test_units_of_size_one_are_no_factors() -> None:
    large = Units(4)
    assert product_of([Units(1), large, Units(1)]) is large
    assert product_of([]).size == 1


def test_axes_of_different_sizes_cannot_be_tied() -> None:
    with pytest.raises(ValueError, match="4 and 5"):
        tie(Units(4), Units(5))
