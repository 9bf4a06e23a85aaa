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
# What a merge goes on from; all else in the folder is small, and written last.
WEIGHTS = (".safetensors", ".onnx.data")
NAME_BYTES = 255
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
    where `out` exists, where another process is at it, where something else has the folder's name, for a full disk.
    """
    refuse_existing(out)
    folder = aside(out)
    made = [parent for parent in folder.parents if not parent.exists()]
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _open_journal(folder) as journal:
        _hold(journal, out)
        staging = Staging(folder, journal, _begin(journal, f"{fingerprint} {_boot()}"))
        _clear(folder, WEIGHTS if staging.resumed else ())
        try:
            yield staging
        except Exception as error:
            shutil.rmtree(folder)
            _remove_empty(made)
            if isinstance(error, OSError):
                raise InvalidData(f"cannot write {out}: {error.strerror}; nothing was left behind") from error
            raise
        refuse_existing(out)  # what another program put there meanwhile stays, and so does the merge, aside
        folder.rename(out)
        (out / JOURNAL).unlink()


def aside(out: Path) -> Path:
    """Where a merge is made that will be `out`."""
    return out.parent / f".{out.name}.merging"


def staged_bytes(out: Path) -> int:
    """What an interrupted merge already takes on the disk."""
    folder = aside(out)
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*")) if folder.is_dir() else 0


def _refuse_foreign(folder: Path) -> None:
    """Raises InvalidData where the folder aside is none of ours: it would be emptied."""
    there = folder.is_symlink() or folder.exists()
    if there and (folder.is_symlink() or not folder.is_dir() or (_listed(folder) and not (folder / JOURNAL).is_file())):
        raise InvalidData(f"{folder} is no interrupted merge; move it away, or choose another --out")


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def _open_journal(folder: Path) -> IO[str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(folder / JOURNAL, flags, 0o666), "a+", encoding="utf-8")


def _remove_empty(folders: list[Path]) -> None:
    """The parents that were made for a merge that failed, the innermost first."""
    for folder in folders:
        if folder.is_dir() and not _listed(folder):
            folder.rmdir()


def refuse_existing(out: Path) -> None:
    """Raises InvalidData where something stands under the final name: a merge never overwrites."""
    if len(os.fsencode(aside(out).name)) > NAME_BYTES:
        raise InvalidData(f"{out.name} is too long for the name of a folder; expected {NAME_BYTES - 9} bytes at most")
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


def _clear(folder: Path, kept: tuple[str, ...]) -> None:
    """Remove what another merge left; of this one, what goes beside the weights, which is written anew."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _clear(entry, kept)
            if not _listed(entry):
                entry.rmdir()
        elif entry.name != JOURNAL and not entry.name.endswith(kept or ("\0",)):
            entry.unlink()


def _whole(lines: list[str]) -> Iterator[str]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # begun by one try and run into by the next
            continue


def _boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else f"process {os.getpid()}"
