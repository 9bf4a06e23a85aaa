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
        ({"ENSEMERGE_QUEUE_REQUESTS": "0"}, "queue_requests is 0; expected at least 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(environment: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        Settings.read(environment, {})


def test_each_repository_has_a_state_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert Settings().state_folder(Path("/srv/models")) == Path("/var/state/ensemerge/srv-models")
    assert Settings(state="/data").state_folder(Path("/srv/models")) == Path("/data")


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1
