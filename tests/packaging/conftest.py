"""The wheel of this tree, and clean environments that hold it: what somebody without the source gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support.graphs import write_linear

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 30
# A registry that is there answers at once; pip would try five times, for minutes.
IMPATIENT = ("--retries=0", "--timeout=15")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation: the build backend is among our development dependencies."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def build() -> Callable[[Path, Path], Path]:
    """Builds a wheel from one folder into another."""
    return build_wheel


@pytest.fixture(scope="session")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment in which the wheel was installed without any extra."""
    return _environment(tmp_path_factory.mktemp("base"), str(wheel))


@pytest.fixture(scope="session")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment in which the wheel was installed to serve."""
    return _environment(tmp_path_factory.mktemp("serving"), f"{wheel}[server]")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plain model, `linear`: `x` (batch, 4) to `logits` (batch, 3)."""
    folder = tmp_path_factory.mktemp("models")
    write_linear(folder, "linear")
    return folder


@pytest.fixture(scope="session")
def start() -> Callable[..., AbstractContextManager[dict[str, str]]]:
    """Runs the command of a server, in an environment of variables, and gives its addresses by name."""
    return _started


def build_wheel(source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


def _environment(folder: Path, requirement: str) -> Path:
    """A new environment with one requirement, fetched as our users would; skips where no registry can be reached."""
    venv.create(folder, symlinks=True)
    reachable = _pip(folder, "install", "--dry-run", "--no-deps", *IMPATIENT, "protobuf")
    if reachable.returncode != 0:
        pytest.skip(f"NOT TESTED from the wheel, no package registry: {reachable.stderr.splitlines()[-1]}")
    done = _pip(folder, "install", f"--constraint={ROOT / 'constraints.txt'}", requirement)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def _pip(environment: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", f"--python={environment}", "--disable-pip-version-check", *words]
    return subprocess.run(command, capture_output=True, text=True)


@contextmanager
def _started(command: Sequence[str | Path], variables: Mapping[str, str], log: Path) -> Iterator[dict[str, str]]:
    ports = ("--grpc-port=0", "--http-port=0", "--metrics-port=0")
    # CI=true would silence what a server does elsewhere: ONNX Runtime's telemetry, for one.
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--host=127.0.0.1", "--json", *ports],
            env={**inherited, **variables},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield json.loads(line)
    finally:
        process.stdout.close()
        process.terminate()
        process.wait(STOP_SECONDS)
