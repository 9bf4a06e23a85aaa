"""The demo's server: a process of its own, as anybody would run it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemerge.errors import Unavailable

STOP_SECONDS = 30.0


@contextmanager
def running_server(repository: Path) -> Iterator[dict[str, Any]]:
    """Serve `repository` on free ports; yields the addresses by name. Stops with SIGTERM. Raises Unavailable.

    Its store is temporary: a quickstart leaves nothing in the user's folders.
    """
    with tempfile.TemporaryDirectory(prefix="ensemerge-demo-") as state, (Path(state) / "log").open("w+") as log:
        command = [sys.executable, "-m", "ensemerge_server", str(repository), "--state", state, "--json"]
        ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
        process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603
        assert process.stdout is not None  # it was asked for
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise Unavailable(f"the server did not start: {log.read()[-2000:]}")
            yield json.loads(line)
        finally:
            process.stdout.close()
            process.terminate()
            process.wait(STOP_SECONDS)
