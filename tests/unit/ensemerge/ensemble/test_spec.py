from typing import Any

import pytest

from ensemerge.ensemble.spec import EnsembleSpec, parse_ensemble
from ensemerge.errors import InvalidSpec
from ensemerge.repository import Spec


def parse(**body: Any) -> EnsembleSpec:
    return parse_ensemble(Spec("both", "ensemble", None, body, "both/model.yaml"))


def test_members_are_enough() -> None:
    assert parse(members=["a", "b:2"]) == EnsembleSpec(("a", "b:2"), "mean_probability", "auto")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"members": ["a"], "combine": "mean_probabilty"}, "did you mean 'mean_probability'"),
        ({"members": ["a"], "plan": "fussed"}, "did you mean 'fused'"),
        ({"members": ["a", 3]}, "members: expected a string"),
        ({"members": ["a"], "weigths": [1]}, "unknown key 'weigths'"),
    ],
)
def test_what_is_not_understood_says_where(body: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        parse(**body)
