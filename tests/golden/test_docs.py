"""What the documents promise: the metrics they list, the settings and commands they name, the files they point to."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ensemerge.repository import Repository
from ensemerge_server.catalogue import Catalogue
from ensemerge_server.lifecycle import Lifecycle
from ensemerge_server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def test_the_page_on_operating_lists_every_metric(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.watch(Catalogue(Repository(tmp_path), {}), Lifecycle())
    families = {family.name for family in text_string_to_metric_families(metrics.page().decode())}
    listed = re.findall(r"^\| `(ensemerge_\w+)` \|", (ROOT / "docs" / "operating.md").read_text(), re.M)
    assert sorted(listed) == sorted(families)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_exist(page: Path) -> None:
    known = {entry.name for entry in entry_points(group="ensemerge.commands")}
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    named = re.findall(r"^(?:\S+/)?ensemerge ([a-z]+)", "\n".join(blocks), re.M)
    named += re.findall(r"`ensemerge ([a-z]+)", page.read_text())
    assert set(named) <= known
