import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemerge_protos.datatypes import NAMES, NUMPY, pack_strings, unpack_strings


@given(st.lists(st.binary(max_size=50)))
def test_strings_come_back_as_they_were(values: list[bytes]) -> None:
    assert list(unpack_strings(pack_strings(values))) == values


@given(st.binary(max_size=100))
def test_any_bytes_are_strings_or_an_error(raw: bytes) -> None:
    try:
        values = list(unpack_strings(raw))
    except ValueError:
        return
    assert pack_strings(values) == raw


def test_names_and_dtypes_are_one_to_one() -> None:
    assert {NAMES[dtype] for dtype in NUMPY.values()} == set(NUMPY)


def test_a_length_beyond_the_end_is_told() -> None:
    with pytest.raises(ValueError, match="expected 5 bytes, got 1"):
        list(unpack_strings(b"\x05\x00\x00\x00a"))
