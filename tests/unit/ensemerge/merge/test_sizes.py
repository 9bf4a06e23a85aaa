import pytest

from ensemerge.errors import InvalidSpec
from ensemerge.merge.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("5GB", 5 * 10**9), ("1.5 g", 3 << 29), ("4096", 4096), ("2k", 2048)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "MiB", "-1GB", "12 parsecs", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"--memory: .*512MiB"):
        parse_size(text, "--memory")


def test_sizes_are_shown_in_the_largest_unit_that_fits() -> None:
    assert [show_size(size) for size in (0, 1023, 1536, 5 << 20, 3 << 31)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "6.0 GiB",
    ]


def test_no_size_is_larger_than_a_file_can_be() -> None:
    assert parse_size(str(2**63), "--memory") == 2**63
    for text in ("9" * 400, "9" * 400 + "TB", "9000000TiB"):
        with pytest.raises(InvalidSpec, match=r"--memory: '9.* is more than any machine has"):
            parse_size(text, "--memory")
