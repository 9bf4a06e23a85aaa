"""Processes on a core of their own, and the processor time they use. Linux only: it reads /proc."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ensemerge.errors import Unavailable

STOP_SECONDS = 30.0
REST_SECONDS = 0.2
REST_ATTEMPTS = 100
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """A server: its process, and the addresses it announced by name."""

    pid: int
    addresses: Mapping[str, str]

    def cpu_seconds(self) -> float:
        """Processor time so far, user and system, of all its threads."""
        # The command's name stands in brackets and may hold spaces: count the fields behind it.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def cpu_seconds_at_rest(self) -> float:
        """Processor time once nothing happens any more. Raises Unavailable when the process does not come to rest.

        The server writes predictions to its store after the answers have left: that belongs to their cost.
        """
        seconds = self.cpu_seconds()
        for _ in range(REST_ATTEMPTS):
            time.sleep(REST_SECONDS)
            before, seconds = seconds, self.cpu_seconds()
            if seconds - before <= 1 / _TICKS_PER_SECOND:
                return seconds
        raise Unavailable(
            f"process {self.pid} is still busy {REST_ATTEMPTS * REST_SECONDS:.0f} s after its last request; "
            "expected it to come to rest: its processor time cannot be told"
        )


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread, and the processes that it starts meanwhile, on `core`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(command: Sequence[str], core: int, log: Path) -> Iterator[Running]:
    """Run a server that announces its addresses as one line of JSON on `core`. Raises Unavailable."""
    with log.open("w+") as errors:
        with pinned(core):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None  # it was asked for
        try:
            line = process.stdout.readline()
            if not line:
                raise Unavailable(f"{' '.join(command)} did not start: {log.read_text()[-2000:]}")
            yield Running(process.pid, json.loads(line))
        finally:
            process.stdout.close()
            process.terminate()
            process.wait(STOP_SECONDS)
