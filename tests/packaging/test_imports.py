"""What an import brings along, seen in a fresh process. import-linter reads the code; this runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import google.protobuf
import pytest

WORKSHOP = {"torch", "onnx", "onnx_ir", "onnxscript"}
EVERY_MODULE = """
import importlib, pkgutil, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    importlib.import_module(module.name)
"""
TOGETHER = """
theirs = tritonclient.grpc.service_pb2.ModelInferRequest(model_name="digits", id="7")
ours = ensemerge_protos.inference_pb2.ModelInferRequest(model_name="digits", id="7")
assert ours.SerializeToString() == theirs.SerializeToString()
assert type(ours) is not type(theirs)
tritonclient.grpc.InferenceServerClient("localhost:1").close()
ensemerge_client.Client("localhost:1").close()
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    """The top-level packages, without Python's own, that `code` leaves in the modules of a fresh process."""
    output = run(f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))")
    modules = json.loads(output.splitlines()[-1])
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"__main__"}


# What the interpreter itself loads here, such as the hook of an editable install.
AT_START = loaded("pass")


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("ensemerge_client", WORKSHOP | {"onnxruntime", "yaml", "ensemerge", "ensemerge_server"}),
        ("ensemerge_server", WORKSHOP | {"sklearn", "rich", "ensemerge_client"}),
        ("ensemerge_protos", WORKSHOP | {"grpc"}),
    ],
)
def test_no_module_of_the_package_brings(package: str, never: set[str]) -> None:
    assert not loaded(EVERY_MODULE.format(package=package)) & never


def test_the_protos_need_protobuf_and_numpy_alone() -> None:
    assert loaded(EVERY_MODULE.format(package="ensemerge_protos")) - AT_START == {"ensemerge_protos", "google", "numpy"}


def test_the_dispatcher_brings_nothing() -> None:
    """`ensemerge --help` and an unknown command answer at once."""
    assert loaded("from ensemerge.cli import main; main(['--help'])") - AT_START == {"ensemerge"}


@pytest.mark.parametrize(
    "module",
    ["errors", "fields", "measures", "repository", "ensemble.combiners", "ensemble.spec", "merge.recipe"],
)
def test_what_the_server_takes_from_the_workshop_is_light(module: str) -> None:
    never = WORKSHOP | {"onnxruntime", "grpc", "google", "safetensors", "rich"}
    assert not loaded(f"import ensemerge.{module}") & never


@pytest.mark.parametrize(
    "imports",
    [
        "import ensemerge_client, ensemerge_protos.inference_pb2, tritonclient.grpc",
        "import tritonclient.grpc, ensemerge_client, ensemerge_protos.inference_pb2",
    ],
)
def test_our_client_and_tritons_live_in_one_process(imports: str) -> None:
    """Both define `inference.*`; ours stays out of protobuf's common pool."""
    run(f"{imports}\n{TOGETHER}")


def test_development_runs_on_protobuf_6() -> None:
    """tritonclient holds it there; test_installed.py runs on 7. If this moves, one of the two is no longer tested."""
    assert google.protobuf.__version__.partition(".")[0] == "6"
