"""The server's settings: one frozen value, read once, from an environment that is given as an argument.

Each field can be set by an environment variable (`ENSEMERGE_GRPC_PORT`) and by an option of `ensemerge serve`
(`--grpc-port`), which wins.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ensemerge.errors import InvalidSpec

PREFIX = "ENSEMERGE_"


@dataclass(frozen=True)
class Settings:
    """How one server runs. Ports of 0 let the system choose; sizes are in the unit that ends their name."""

    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    name: str = "ensemerge"
    device: str = "auto"
    """`auto` takes CUDA where ONNX Runtime offers it; `cpu` and `cuda` insist."""
    threads: int = 0
    """Threads for one run of a model; 0 takes every core that this process may use, and one for models so quick that
    more would slow them down."""
    batch_rows: int = 64
    """A batch takes waiting requests up to this many rows."""
    queue_requests: int = 128
    """Requests that may wait for one model; fewer than `in_flight`, or a slow model shuts out the others."""
    in_flight: int = 256
    """Calls answered at the same time; the next one is refused."""
    message_bytes: int = 64 << 20
    id_bytes: int = 1024
    state: str = ""
    """Folder of the prediction and label store; empty takes one of this repository's own in the user's state folder."""
    drain_seconds: float = 30.0
    """How long requests in flight may take to finish after SIGTERM."""

    @classmethod
    def read(cls, environment: Mapping[str, str], options: Mapping[str, object]) -> Settings:
        """Settings from `environment`, overridden by those `options` that are not None. Raises InvalidSpec."""
        values: dict[str, object] = {}
        for setting in fields(cls):
            variable = PREFIX + setting.name.upper()
            if options.get(setting.name) is not None:
                values[setting.name] = options[setting.name]
            elif variable in environment:
                values[setting.name] = _converted(environment[variable], type(setting.default), variable)
        settings = cls(**values)  # type: ignore[arg-type]  # _converted returns each field's own type
        settings._validate()
        return settings

    def _validate(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidSpec(f"device is '{self.device}'; expected auto, cpu or cuda")
        for name in ("grpc_port", "http_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InvalidSpec(f"{name} is {getattr(self, name)}; expected a port from 0 to 65535")
        for name in ("batch_rows", "queue_requests", "in_flight", "message_bytes", "id_bytes"):
            if getattr(self, name) < 1:
                raise InvalidSpec(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.queue_requests >= self.in_flight:
            raise InvalidSpec(
                f"queue_requests is {self.queue_requests} and in_flight {self.in_flight}; expected fewer to wait for "
                "one model than are answered in all, or one slow model shuts out the others"
            )
        if self.threads < 0:
            raise InvalidSpec(f"threads is {self.threads}; expected 0 for as many as pay, or a number")
        if not 0 <= self.drain_seconds < math.inf:
            raise InvalidSpec(f"drain_seconds is {self.drain_seconds}; expected a number of seconds from 0 up")

    def state_folder(self, repository: Path, environment: Mapping[str, str]) -> Path:
        """Where this server keeps its store: a folder of this repository's own. The repository is never written."""
        if self.state:
            return Path(self.state)
        base = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        digest = hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:8]
        return base / "ensemerge" / f"{repository.resolve().name}-{digest}"

    def address(self, port: int) -> str:
        """`host:port`, an IPv6 host in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def _converted(text: str, kind: type, variable: str) -> object:
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidSpec(f"{variable} is '{text}'; expected a value like {kind.__name__}") from error


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container where there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
