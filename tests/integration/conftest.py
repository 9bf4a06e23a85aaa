"""One repository with every kind of model, and one server on it for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.graphs import publish_family, write_linear
from support.servers import RunningServer, running

from ensemerge.repository import Repository
from ensemerge_client import Client

EXPERIMENT = {
    "kind": "experiment",
    "arms": {"ensemble": {"model": "ensemble"}, "merged": {"model": "merged"}},
    "unit": "user_id",
}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, their ensemble and their merge, an experiment on both, a model that somebody copied there."""
    repository = Repository(tmp_path_factory.mktemp("models"))
    publish_family(repository)
    repository.write_spec("digits", EXPERIMENT)
    write_linear(repository.root, "plain")
    return repository.root


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(repository, tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.grpc, timeout_seconds=20) as client:
        yield client
