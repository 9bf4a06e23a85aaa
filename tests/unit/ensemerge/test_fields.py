import pytest

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields


def test_an_unknown_key_is_named_with_a_suggestion() -> None:
    fields = Fields({"membres": ["a"]}, "digits/model.yaml")
    fields.take("members", list, [])
    with pytest.raises(InvalidSpec, match=r"digits/model\.yaml: unknown key 'membres'; did you mean 'members'\?"):
        fields.finish()


def test_every_unknown_key_has_a_line() -> None:
    fields = Fields({"membres": 1, "combin": 2}, "model.yaml")
    fields.take("members", list, [])
    fields.take("combine", str, "")
    with pytest.raises(InvalidSpec) as raised:
        fields.finish()
    lines = str(raised.value).split("\n")
    assert [line.split(";")[0] for line in lines] == [
        f"model.yaml: unknown key '{key}'" for key in ("membres", "combin")
    ]


def test_a_missing_key_points_at_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidSpec, match=r"'members' is missing; there is 'membres', did you mean that\?"):
        Fields({"membres": ["a"]}, "model.yaml").take("members", list)


@pytest.mark.parametrize(
    ("value", "kind"), [("3", int), (True, int), (1.5, int), (["a"], str), (1, bool), ("x", float), (None, str)]
)
def test_a_value_of_another_type_is_refused(value: object, kind: type) -> None:
    with pytest.raises(InvalidSpec, match="'key': expected"):
        Fields({"key": value}, "model.yaml").take("key", kind)


def test_a_whole_number_is_a_number() -> None:
    assert Fields({"weight": 2}, "model.yaml").take("weight", float) == 2.0


def test_an_empty_value_is_an_absent_one_where_absence_is_allowed() -> None:
    assert Fields({"seed": None}, "manifest.json").take("seed", int, None) is None


def test_a_choice_outside_the_list_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"'mode' is 'splt'; did you mean 'split'\? expected one of: split, shadow"):
        Fields({"mode": "splt"}, "model.yaml").choose("mode", ["split", "shadow"], "split")


def test_a_list_is_no_mapping() -> None:
    with pytest.raises(InvalidSpec, match="expected a mapping of keys to values, got a list"):
        Fields([1, 2], "model.yaml")
