"""A merge in the making: a folder aside, a journal of what is in it, one rename at the end.

Nothing stands under the final name before all of it does. What a killed merge leaves is a hidden folder beside it; the
same merge, started again, goes on from there. The journal is believed only within one boot of the machine: a killed
process loses nothing that it wrote, a lost power supply may.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

from ensemerge.errors import InvalidData

JOURNAL = "merge.journal"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Staging:
    """The folder aside, held by one process at a time."""

    def __init__(self, folder: Path, journal: IO[str], done: set[str]) -> None:
        self.folder = folder
        self._journal = journal
        self._done = done
        self._lock = Lock()

    @property
    def resumed(self) -> int:
        """How many tensors an earlier try had written."""
        return len(self._done)

    def holds(self, name: str) -> bool:
        """Whether the tensor was written whole before."""
        return name in self._done

    def add(self, name: str) -> None:
        """The tensor is written whole."""
        with self._lock:
            self._journal.write(json.dumps(name) + "\n")
            self._journal.flush()

    def under(self, folder: str) -> _Below:
        """The journal of one of several models in the folder."""
        return _Below(self, f"{folder}/" if folder else "")


@dataclass(frozen=True)
class _Below:
    """A journal whose names have a folder before them."""

    staging: Staging
    prefix: str

    def holds(self, name: str) -> bool:
        return self.staging.holds(self.prefix + name)

    def add(self, name: str) -> None:
        self.staging.add(self.prefix + name)


@contextmanager
def staged(out: Path, fingerprint: str) -> Iterator[Staging]:
    """A folder that becomes `out` when the block ends well. `fingerprint` tells one merge from another.

    After an error the folder goes; after an interruption it stays, for the same merge to go on. Raises InvalidData
    where `out` exists, where another process is at it, and for a full disk.
    """
    refuse_existing(out)
    folder = out.parent / f".{out.name}.merging"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JOURNAL).open("a+", encoding="utf-8") as journal:
        _hold(journal, out)
        staging = Staging(folder, journal, _begin(journal, f"{fingerprint} {_boot()}"))
        if not staging.resumed:
            _clear(folder)
        try:
            yield staging
            (folder / JOURNAL).unlink()
            refuse_existing(out)
            folder.rename(out)
        except Exception as error:
            shutil.rmtree(folder)
            if isinstance(error, OSError):
                raise InvalidData(f"cannot write {out}: {error.strerror}; nothing was left behind") from error
            raise


def refuse_existing(out: Path) -> None:
    """Raises InvalidData where something stands under the final name: a merge never overwrites."""
    if out.exists() or out.is_symlink():
        raise InvalidData(f"{out} exists; expected a new folder. Remove it, or choose another --out")


def _hold(journal: IO[str], out: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidData(f"another process is merging into {out}; wait for it, or choose another --out") from error


def _begin(journal: IO[str], fingerprint: str) -> set[str]:
    """The tensors that the journal holds; of another merge, none: it is emptied and given a new first line."""
    journal.seek(0)
    lines = journal.read().split("\n")
    if lines[0] == fingerprint:
        return set(_whole(lines[1:-1]))  # what follows the last line's end was cut off
    journal.seek(0)
    journal.truncate()
    journal.write(fingerprint + "\n")
    journal.flush()
    return set()


def _clear(folder: Path) -> None:
    """Remove what another merge left."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()


def _whole(lines: list[str]) -> Iterator[str]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # begun by one try and run into by the next
            continue


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else f"process {os.getpid()}"
