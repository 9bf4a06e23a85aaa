"""A real server, in a process of its own, on free ports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc

from ensemerge_protos import health_pb2

STOP_SECONDS = 30


@dataclass(frozen=True)
class RunningServer:
    """A server that has announced itself."""

    process: subprocess.Popen[str]
    grpc: str
    http: str
    metrics: str

    def get(self, path: str) -> tuple[int, str]:
        """GET `path` of the HTTP port."""
        return _get(f"http://{self.http}{path}")

    def metrics_page(self) -> str:
        return _get(f"http://{self.metrics}/metrics")[1]

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 where there is none."""
        for line in self.metrics_page().splitlines():
            family, _, rest = line.partition("{")
            told, _, value = rest.rpartition("} ")
            if family == name and all(f'{key}="{text}"' in told.split(",") for key, text in labels.items()):
                return float(value)
            if not labels and line.startswith(f"{name} "):
                return float(line.split()[1])
        return 0.0

    def health(self, service: str) -> str:
        """What the gRPC health protocol says of `service`. Raises grpc.RpcError."""
        with grpc.insecure_channel(self.grpc) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            status = check(health_pb2.HealthCheckRequest(service=service)).status
        return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_SECONDS)


@contextmanager
def running(repository: Path, state: Path, *options: str) -> Iterator[RunningServer]:
    """Serve `repository` until the block ends."""
    ports = ("--grpc-port=0", "--http-port=0", "--metrics-port=0")
    command = [
        sys.executable,
        "-m",
        "ensemerge_server",
        str(repository),
        f"--state={state}",
        "--json",
        *ports,
        *options,
    ]
    state.mkdir(parents=True, exist_ok=True)
    with (state / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (state / "server.log").read_text()
        told = json.loads(line)
        yield RunningServer(process, told["grpc"], told["http"], told["metrics"])
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_SECONDS)


def _get(address: str) -> tuple[int, str]:
    try:
        with urlopen(address, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
