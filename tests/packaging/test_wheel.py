"""What is in the wheel."""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "ensemerge": ROOT / "models",
    "ensemerge_client": ROOT / "clients" / "python",
    "ensemerge_protos": ROOT / "protos",
    "ensemerge_server": ROOT / "server",
}


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"{_information(wheel)}/METADATA"))


def _information(wheel: Path) -> str:
    """The wheel's folder about itself, such as ensemerge-0.1.0.dist-info."""
    return "-".join(wheel.stem.split("-")[:2]) + ".dist-info"


def test_the_top_level_is_our_packages_alone(names: set[str], wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, _information(wheel)}


def test_every_file_of_the_packages_is_there_and_no_other(names: set[str], wheel: Path) -> None:
    """So no tests and no benchmarks either; a file that git ignores is no file of ours."""
    files = {
        str(path.relative_to(room))
        for package, room in PACKAGES.items()
        for path in (room / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(_information(wheel))} == files


def test_what_is_not_python_is_there_too(names: set[str]) -> None:
    assert names >= {
        "ensemerge/report/page.html",
        "ensemerge_protos/ensemerge.proto",
        "ensemerge_protos/health.proto",
        "ensemerge_protos/inference.proto",
        "ensemerge_server/store/schema.sql",
        *(f"{package}/py.typed" for package in PACKAGES),
    }


def test_the_license_goes_along(names: set[str], metadata: Message, wheel: Path) -> None:
    licenses = f"{_information(wheel)}/licenses/"
    assert {name.removeprefix(licenses) for name in names if name.startswith(licenses)} == {"LICENSE"}
    assert metadata.get_all("License-File") == ["LICENSE"]


def test_only_the_workshop_asks_for_torch_and_onnx(metadata: Message) -> None:
    heavy = ("torch", "onnx>", "onnx-ir", "onnxscript")
    asking = {
        requirement.partition("extra == ")[2].strip("'\"")
        for requirement in metadata.get_all("Requires-Dist", [])
        if requirement.startswith(heavy)
    }
    assert asking == {"making", "workshop", "workshop-gpu", "demo", "demo-gpu", "all"}
