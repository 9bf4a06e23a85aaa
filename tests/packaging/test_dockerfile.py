"""The images, as far as they can be tested where no container runs: what the Dockerfile says, and its commands.

hadolint reads it in `make check`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml

from ensemerge_server.settings import Settings

ROOT = Path(__file__).parents[2]
IMAGES = ("serve", "serve-gpu", "workshop")
Stage = dict[str, str]


def _stages(text: str) -> dict[str, Stage]:
    """Instructions by keyword, by stage; of several with one keyword in a stage, all in one text."""
    stages: dict[str, Stage] = {}
    stage: Stage = {}
    code = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(str.strip, code.splitlines()):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stage = stages.setdefault(rest.rpartition(" AS ")[2], {})
        stage[keyword] = f"{stage[keyword]}\n{rest}" if keyword in stage else rest
    return stages


STAGES = _stages((ROOT / "Dockerfile").read_text())
SERVE = STAGES["serve"]


def variables(stage: Stage) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(stage["ENV"]))


def words(stage: Stage, keyword: str) -> list[str]:
    """The command of an instruction in its JSON form, behind its options."""
    command: list[str] = json.loads(stage[keyword][stage[keyword].index("[") :])
    return command


@pytest.mark.parametrize("image", IMAGES)
def test_images_do_not_run_as_root(image: str) -> None:
    """By number: Kubernetes' runAsNonRoot cannot judge a name."""
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", STAGES[image]["USER"])


def test_a_build_without_a_target_gives_the_server() -> None:
    assert list(STAGES)[-1] == "serve"


def test_the_servers_differ_in_nothing_but_the_device() -> None:
    gpu = STAGES["serve-gpu"]
    own = {"FROM", "COPY", "ENV"}
    assert {key: gpu[key] for key in gpu.keys() - own} == {key: SERVE[key] for key in SERVE.keys() - own}
    assert variables(gpu) == variables(SERVE) | {"ENSEMERGE_DEVICE": "cuda"}


def test_ports_are_the_servers_own() -> None:
    assert SERVE["EXPOSE"] == f"{Settings.http_port} {Settings.grpc_port} {Settings.metrics_port}"


@pytest.mark.parametrize(
    ("image", "extra"), [("serve", "server"), ("serve-gpu", "server-gpu"), ("workshop", "workshop")]
)
def test_images_install_an_extra_that_exists(image: str, extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.findall(r'"\$1\[(.+?)\]"', STAGES[f"{image}-environment"]["RUN"]) == [extra]
    assert extra in extras


def test_the_build_context_holds_the_wheel(wheel: Path, build: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    """A file that .dockerignore forgets is a file that the images lack."""
    everything, *exceptions, caches = [line for line in _lines(ROOT / ".dockerignore") if not line.startswith("#")]
    assert (everything, caches) == ("*", "**/__pycache__")
    for exception in exceptions:
        assert exception.startswith("!")
        _copy(ROOT / exception[1:], tmp_path / "context" / exception[1:])
    assert _names(build(tmp_path / "context", tmp_path / "dist")) == _names(wheel)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_the_image_serves_is_healthy_and_writes_its_state_alone(
    serving: Path,
    repository: Path,
    start: Callable[..., AbstractContextManager[dict[str, str]]],
    tmp_path: Path,
) -> None:
    """The image's entry point, variables and health check, word for word but for where things are."""
    state = tmp_path / "state"
    state.mkdir()
    places = {"/opt/ensemerge/bin:$PATH": f"{serving}:{os.environ['PATH']}", "/state": str(state)}
    environment = {name: places.get(value, value) for name, value in variables(SERVE).items()}
    command, *arguments = words(SERVE, "ENTRYPOINT")
    arguments[arguments.index("/models")] = str(repository)

    def health(port: str) -> int:
        probe, *code = words(SERVE, "HEALTHCHECK")
        return subprocess.run([serving / probe, *code], env={"ENSEMERGE_HTTP_PORT": port}, timeout=30).returncode

    with start([serving / command, *arguments], environment, tmp_path / "log") as addresses:
        port = addresses["http"].rpartition(":")[2]
        assert health(port) == 0
    assert health(port) != 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert {path.name.partition("-")[0] for path in state.iterdir()} == {"store.sqlite"}


def test_the_example_has_a_read_only_root_and_keeps_state_in_a_volume() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["serve"]
    assert service["read_only"] is True
    assert service["build"]["target"] == "serve"
    assert {volume.split(":", 1)[1] for volume in service["volumes"]} == {"/models:ro", SERVE["VOLUME"]}
    # Longer than the server's own patience with requests in flight, or Docker kills it before.
    assert float(service["stop_grace_period"].removesuffix("s")) > Settings.drain_seconds


def test_prometheus_is_sent_to_the_metrics_port() -> None:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in jobs for entry in job["static_configs"] for target in entry["targets"]]
    assert targets == [f"serve:{Settings.metrics_port}"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_prometheus_understands_the_example() -> None:
    done = subprocess.run(["promtool", "check", "config", ROOT / "deploy" / "prometheus.yml"], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
