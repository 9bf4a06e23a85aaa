"""Load in a closed loop: so many requests, so many of them on the way at any time, and how long each one took.

h2load (Debian: nghttp2-client) is a C program that costs a fraction of what the server costs. Without it our own
AsyncClient must do, which costs about as much as the server and may saturate first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemerge.errors import CheckFailed, ExecutionFailed
from ensemerge_client import messages
from ensemerge_client.calls import MODEL_INFER

CONNECTIONS = 4


@dataclass(frozen=True)
class Question:
    """The request that is sent over and over: a model, and one row of inputs."""

    model: str
    inputs: Mapping[str, np.ndarray]

    @property
    def message(self) -> bytes:
        return messages.infer_request(self.model, self.inputs).SerializeToString()


@dataclass(frozen=True)
class Load:
    """What came of it: from the first request sent to the last reply, and `(requests,)` latencies."""

    seconds: float
    latencies_seconds: np.ndarray

    @property
    def requests_per_second(self) -> float:
        return len(self.latencies_seconds) / self.seconds


Generate = Callable[[str, Question, int, int], Load]
"""`generate(address, question, in_flight, requests)`. Raises ExecutionFailed, CheckFailed."""


def best_generator() -> str:
    """The name of the better one of the two that this machine has."""
    return "h2load" if shutil.which("h2load") else "AsyncClient"


def h2load(address: str, question: Question, in_flight: int, requests: int) -> Load:
    """Load from h2load: `in_flight` streams, spread over at most `CONNECTIONS` connections.

    It knows HTTP and not gRPC, whose errors are HTTP successes: whoever calls this checks that the answers were OK.
    """
    connections = min(CONNECTIONS, in_flight)
    with tempfile.TemporaryDirectory(prefix="ensemerge-load-") as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        # Not compressed, then the length: how gRPC frames a message in HTTP/2.
        body.write_bytes(b"\0" + len(question.message).to_bytes(4, "big") + question.message)
        command = ["h2load", f"--requests={requests}", f"--clients={connections}"]
        command += [f"--max-concurrent-streams={in_flight // connections}", f"--data={body}", f"--log-file={log}"]
        command += ["--header=content-type: application/grpc", "--header=te: trailers"]
        _run([*command, f"http://{address}{MODEL_INFER}"])
        return _read_log(log, requests)


def _read_log(log: Path, requests: int) -> Load:
    """The log's columns: start in microseconds since the epoch, HTTP status, microseconds until the reply's end."""
    started, status, took = np.loadtxt(log, dtype=np.int64, ndmin=2).T
    failed = requests - int((status == 200).sum())
    if failed:
        message = f"{failed} of {requests} requests failed; expected HTTP status 200 for all of them"
        raise CheckFailed(message, difference=failed, bound=0)
    return Load(float((started + took).max() - started.min()) / 1e6, took / 1e6)


def async_client(address: str, question: Question, in_flight: int, requests: int) -> Load:
    """Load from our AsyncClient, in a process of its own."""
    script = Path(__file__).with_name("async_load.py")
    with tempfile.TemporaryDirectory(prefix="ensemerge-load-") as folder:
        body = Path(folder, "body")
        body.write_bytes(question.message)
        printed = _run([sys.executable, str(script), address, str(body), str(in_flight), str(requests)])
    told = json.loads(printed)
    return Load(told["seconds"], np.array(told["latencies_seconds"]))


GENERATORS: Mapping[str, Generate] = {"h2load": h2load, "AsyncClient": async_client}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        printed = (done.stderr or done.stdout)[-2000:]
        raise ExecutionFailed(f"{command[0]} ended with status {done.returncode}; expected 0. It printed: {printed}")
    return done.stdout
