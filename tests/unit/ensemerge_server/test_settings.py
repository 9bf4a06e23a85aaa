from pathlib import Path

import pytest

from ensemerge.errors import InvalidSpec
from ensemerge_server.settings import Settings, usable_cores


def test_an_option_beats_the_environment_and_that_the_default() -> None:
    environment = {"ENSEMERGE_GRPC_PORT": "9001", "ENSEMERGE_HOST": "0.0.0.0", "PATH": "/bin"}
    settings = Settings.read(environment, {"grpc_port": 9002, "host": None})
    assert (settings.grpc_port, settings.host, settings.http_port) == (9002, "0.0.0.0", 8000)


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"ENSEMERGE_GRPC_PORT": "many"}, "ENSEMERGE_GRPC_PORT is 'many'; expected a value like int"),
        ({"ENSEMERGE_GRPC_PORT": "70000"}, "expected a port from 0 to 65535"),
        ({"ENSEMERGE_DEVICE": "tpu"}, "device is 'tpu'; expected auto, cpu or cuda"),
        ({"ENSEMERGE_THREADS": "-1"}, "threads is -1; expected 0"),
        ({"ENSEMERGE_DRAIN_SECONDS": "nan"}, "drain_seconds is nan"),
        ({"ENSEMERGE_IN_FLIGHT": "64"}, "queue_requests is 128 and in_flight 64; expected fewer to wait"),
        ({"ENSEMERGE_QUEUE_REQUESTS": "0"}, "queue_requests is 0; expected at least 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(environment: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        Settings.read(environment, {})


def test_each_repository_has_a_state_folder_of_its_own() -> None:
    environment = {"XDG_STATE_HOME": "/var/state"}
    folders = {Settings().state_folder(Path(path), environment) for path in ("/srv/a/b", "/srv/a-b", "/srv/c/b")}
    assert len(folders) == 3
    assert all(folder.parent == Path("/var/state/ensemerge") for folder in folders)
    assert Settings(state="/data").state_folder(Path("/srv/models"), environment) == Path("/data")


def test_an_ipv6_host_stands_in_brackets() -> None:
    assert (Settings(host="::1").address(8001), Settings().address(1)) == ("[::1]:8001", "127.0.0.1:1")


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1
