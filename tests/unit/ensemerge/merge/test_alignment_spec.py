"""What a recipe may say of alignment, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ensemerge.errors import InvalidSpec
from ensemerge.merge.alignment_spec import Alignment, split_alignment

TWO = ["one", "other"]


@pytest.mark.parametrize(
    ("body", "rest", "alignment"),
    [
        ({"merge_method": "linear"}, {"merge_method": "linear"}, None),
        ({"merge_method": "linear", "align": "weights"}, {"merge_method": "linear"}, Alignment()),
        ({"merge_method": "ties", "align": {}}, {"merge_method": "ties"}, Alignment()),
        (
            {"merge_method": "slerp", "align": {"by": "both", "alpha": "auto", "starts": 3}},
            {"merge_method": "slerp"},
            Alignment("both", None, starts=3),
        ),
        (
            {"merge_method": "mudsc", "parameters": {"alpha": 1, "weight": 2}},
            {"merge_method": "mudsc", "parameters": {"weight": 2}},
            Alignment("both", 1.0),
        ),
        (
            {"merge_method": "mudsc", "parameters": None},
            {"merge_method": "mudsc", "parameters": None},
            Alignment("both"),
        ),
        (
            {"merge_method": "zipit", "models": TWO, "parameters": {"budget": 0}},
            {"merge_method": "zipit", "models": TWO, "parameters": {}},
            Alignment("activations", matching="zip", budget=0.0),
        ),
        (
            {"merge_method": "ot_fusion", "parameters": {"regularization": 0.1}},
            {"merge_method": "ot_fusion", "parameters": {}},
            Alignment(matching="transport", regularization=0.1),
        ),
    ],
)
def test_forms(body: dict[str, Any], rest: dict[str, Any], alignment: Alignment | None) -> None:
    before = {**body}
    assert split_alignment(body, "here") == (rest, alignment)
    assert body == before


def test_what_is_no_mapping_is_left_to_whoever_reads_the_recipe() -> None:
    assert split_alignment(["linear"], "here") == (["linear"], None)


NAN, INFINITE = float("nan"), float("inf")
ZIP = {"matching": "zip"}


@pytest.mark.parametrize(
    ("align", "said"),
    [
        (None, "here: align: expected a mapping of keys to values, got a NoneType None"),
        (True, "expected a mapping of keys to values, got true or false"),
        ([], "expected a mapping of keys to values, got a list"),
        ("wieghts", "did you mean 'weights'"),
        ({"by": None}, "'by': expected a string"),
        ({"bye": 1}, "unknown key 'bye'; did you mean 'by'"),
        ({1: 2}, "unknown key '1'"),
        ({"by": "both", "alpha": None}, "'alpha': expected a number"),
        ({"by": "both", "alpha": True}, "'alpha': expected a number, got true or false"),
        ({"by": "both", "alpha": "0.5"}, "'alpha': expected a number from 0 to 1, or 'auto', got a string"),
        ({"by": "both", "alpha": NAN}, "here: align: 'alpha' is nan; expected a number from 0 to 1, or 'auto'"),
        ({"by": "both", "alpha": -0.1}, "'alpha' is -0.1"),
        ({"starts": -1}, "'starts' is -1; expected at least 0"),
        ({"starts": 1.5}, "'starts': expected a whole number"),
        ({**ZIP, "damping": NAN}, "'damping' is nan; expected a value from 0 to 1"),
        ({**ZIP, "budget": 1.5}, "'budget' is 1.5; expected a value from 0 to 1"),
        ({"matching": "transport", "regularization": NAN}, "'regularization' is nan; expected at least 0, and finite"),
        ({"matching": "transport", "regularization": INFINITE}, "'regularization' is inf"),
        ({"matching": "transport", "by": "both"}, "a transport compares weights, expected 'weights'"),
        ({"alpha": 0.3}, "'alpha' changes nothing with `by: weights`; drop it, or set `by: both`"),
        ({"budget": 0.3}, "'budget' changes nothing with `matching: align`"),
        ({"damping": 0.3, "matching": "transport"}, "'damping' changes nothing with `matching: transport`"),
        ({**ZIP, "regularization": 0.3}, "'regularization' changes nothing with `matching: zip`"),
    ],
)
def test_what_align_may_not_be(align: object, said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        split_alignment({"merge_method": "linear", "models": TWO, "align": align}, "here")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"merge_method": "mudsc", "align": "weights"}, "'mudsc' aligns by itself; leave out 'align'"),
        (
            {"merge_method": "weight_matching", "parameters": {"alpha": 0.2}},
            "'alpha' changes nothing with `by: weights`",
        ),
        ({"merge_method": "ties", "align": ZIP}, "a zip is merged by its mean, not by 'ties'"),
        ({"merge_method": "zipit", "base_model": "base"}, "a zip has no base model"),
        ({"merge_method": "zipit", "parameters": {"normalize": False}}, "leave out 'normalize'"),
        (
            {"merge_method": "zipit", "models": ["one", {"model": "other", "parameters": {"weight": 0.9}}]},
            "all networks count the same in a zip; leave out 'weight'",
        ),
    ],
)
def test_what_does_not_go_together(body: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        split_alignment({"models": TWO, **body}, "here")
    assert str(caught.value).startswith("here: ")
    assert said in str(caught.value)
