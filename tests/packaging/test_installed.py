"""The wheel at work, far from its source: in an environment that holds it and what it asked for."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Messages of all three protos, both ways.
CLIENT = """
import json, sys
import google.protobuf, numpy
from ensemerge_client import Client, Label
with Client(sys.argv[1]) as client:
    result = client.infer("linear", {"x": numpy.zeros((2, 4), "float32")})
    labels = client.send_labels([Label(result.prediction_id, row=0, truth=1)])
print(json.dumps({
    "protobuf": google.protobuf.__version__,
    "shape": result["logits"].shape,
    "labels": len(labels),
    "modules": sorted(name for name in sys.modules if "." not in name),
}))
"""
INSTALLED = "import importlib.util, sys; print([bool(importlib.util.find_spec(name)) for name in sys.argv[1:]])"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command where no source lies about."""
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


def test_help_lists_every_command_and_says_what_it_does(base: Path) -> None:
    lines = {line.split()[0]: line.split()[1:] for line in run(base / "ensemerge", "--help").stdout.splitlines()[2:]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(lines) == set(project["entry-points"]["ensemerge.commands"])
    assert all(lines.values())


@pytest.mark.parametrize(("command", "extra"), [("serve", "server"), ("build", "workshop"), ("demo", "demo")])
def test_a_command_without_its_extra_says_which_to_install(base: Path, command: str, extra: str) -> None:
    done = run(base / "ensemerge", command, "--help")
    assert done.returncode == 2
    assert f"pip install 'ensemerge[{extra}]'" in done.stderr


def test_the_server_is_not_the_demo(serving: Path) -> None:
    done = run(serving / "ensemerge", "demo")
    assert done.returncode == 2
    assert "pip install 'ensemerge[demo]'" in done.stderr


@pytest.mark.parametrize("command", ["call", "label"])
def test_the_base_is_the_client(base: Path, command: str) -> None:
    assert run(base / "ensemerge", command, "--help").returncode == 0
    found = run(base / "python", "-c", INSTALLED, "ensemerge_client", "onnxruntime", "torch", "onnx", "yaml")
    assert found.stdout.strip() == "[True, False, False, False, False]"


def test_the_server_comes_without_torch_and_onnx(serving: Path) -> None:
    found = run(serving / "python", "-c", INSTALLED, "onnxruntime", "torch", "onnx", "onnx_ir", "onnxscript")
    assert found.stdout.strip() == "[True, False, False, False, False]"


def test_server_and_client_work_on_protobuf_7(
    serving: Path,
    base: Path,
    repository: Path,
    start: Callable[..., AbstractContextManager[dict[str, str]]],
    tmp_path: Path,
) -> None:
    """pip takes the newest protobuf that we allow. The development environment stays on 6: see test_imports.py."""
    command = [serving / "ensemerge", "serve", repository, "--state", tmp_path / "state"]
    with start(command, {}, tmp_path / "log") as addresses:
        done = run(base / "python", "-c", CLIENT, addresses["grpc"])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["protobuf"].partition(".")[0], told["shape"], told["labels"]) == ("7", [2, 3], 1)
    assert not {"ensemerge", "ensemerge_server", "onnxruntime", "torch"} & set(told["modules"])
    assert (tmp_path / "state" / "store.sqlite").is_file()
