"""The pages of a file that torch has mapped, given back as soon as they have been used."""

from __future__ import annotations

import ctypes
import mmap
import threading

# A page fault maps cached pages around it too: those of a window of this size (fault_around_bytes in the kernel), and
# since Linux 6.18 all that the page cache holds in one piece, which can be as much as a huge page.
FAULT_AROUND_BYTES = max(64 << 10, mmap.PAGESIZE)
HUGE_PAGE_BYTES = 2 << 20

# How much is given back before what other threads' faults brought back in the meantime is looked for.
SWEEP_BYTES = 16 << 20


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Pages:
    """The pages of a private map of a file, at the addresses `first:end`; never of memory that is no file.

    Dropping a page that another thread still reads does no harm: it comes again from the page cache.
    """

    def __init__(self, first: int, end: int) -> None:
        self._first, self._end = first, end
        self._lock = threading.Lock()
        self._unswept, self._low, self._high = 0, end, first

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether a stretch of memory is part of the map."""
        return self._first <= address and address + nbytes <= self._end

    def give_back(self, address: int, nbytes: int) -> None:
        """Drop a stretch, with the whole of the pages in which it begins and ends.

        Faults of neighbours can bring pages of the stretch back afterwards. Those are dropped after every
        `SWEEP_BYTES`, so that what is left over does not grow with the file.
        """
        if not nbytes:
            return
        self._drop(address, address + nbytes, FAULT_AROUND_BYTES)
        with self._lock:
            self._unswept += nbytes
            self._low, self._high = min(self._low, address), max(self._high, address + nbytes)
            if self._unswept < SWEEP_BYTES:
                return
            low, high = self._low, self._high
            self._unswept, self._low, self._high = 0, self._end, self._first
        self._drop(low, high, HUGE_PAGE_BYTES)

    def _drop(self, low: int, high: int, granularity: int) -> None:
        start = max(self._first, low // granularity * granularity)
        stop = min(self._end, -(-high // granularity) * granularity)
        _libc.madvise(start, stop - start, mmap.MADV_DONTNEED)
