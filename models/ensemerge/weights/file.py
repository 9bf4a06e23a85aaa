"""Files of weights, read in stretches.

Stretches are read into memory of their own, not mapped: mapped pages count as the process's memory until each is given
back, they come by page faults that cost more than the copy, and a file that another program shortens would kill the
process instead of failing a read.
"""

from __future__ import annotations

import os
import resource
import stat
import weakref
from pathlib import Path

import torch

from ensemerge.errors import InvalidData


class WeightFile:
    """One open file. Safe to use from several threads. Raises InvalidData where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open(path)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidData(f"{path} is no regular file; expected a file of weights")
        self.size = status.st_size

    def window(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements from byte `offset`, `(count,)`. Raises InvalidData where the file has become shorter."""
        values = torch.empty(count, dtype=dtype)
        left = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
        while left:
            done = os.preadv(self._descriptor, [left], offset)  # the kernel gives at most 2 GiB at once
            if not done:
                raise InvalidData(f"{self.path} became shorter while it was read; nothing may write to it meanwhile")
            left, offset = left[done:], offset + done
        return values


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make it wait
    except OSError as error:
        if error.errno == 24 and _allow_more_files():  # a sharded checkpoint has hundreds of files
            return _open(path)
        raise InvalidData(f"{path} cannot be opened: {error.strerror}") from error


def _allow_more_files() -> bool:
    """Raise the limit of open files to what an administrator allows; whether that helped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft != hard
