"""The least that a merge can take: touch every byte of the inputs once, write the output once. Two threads, no torch.

    python benchmarks/merging_bound.py OUT FOLDER...

Prints one JSON line: the seconds without the start of Python.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = 4 << 20


def main(out: Path, folders: list[Path]) -> None:
    """Read all, write as much as one folder holds, and say how long it took."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    threads = len(os.sched_getaffinity(0))
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_touch, files))
        list(pool.map(lambda k: _write(out, k, size // threads), range(threads)))
    print(json.dumps({"seconds": time.perf_counter() - began}))


def _touch(file: Path) -> int:
    """The sum of all bytes, in windows, so that every page is read."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        words = np.frombuffer(mapped, np.int64, count=len(mapped) // 8)
        total = sum(int(words[at : at + PIECE // 8].sum()) for at in range(0, len(words), PIECE // 8))
        del words
    return total


def _write(out: Path, worker: int, size: int) -> None:
    piece = memoryview(bytearray(PIECE))
    with out.open("r+b" if out.exists() else "w+b") as opened:
        for at in range(0, size, PIECE):
            os.pwrite(opened.fileno(), piece[: min(PIECE, size - at)], worker * size + at)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
