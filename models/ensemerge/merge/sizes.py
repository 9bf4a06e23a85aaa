"""Amounts of memory as people write them: 512MiB, 2GB."""

from __future__ import annotations

import re

from ensemerge.errors import InvalidSpec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LARGEST = 2**63  # bytes, which no file and no memory has
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str, what: str) -> int:
    """Bytes. KB, MB, GB count in thousands; KiB, MiB, GiB, and K, M, G alone, in 1,024s. Raises InvalidSpec."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise InvalidSpec(f"{what}: '{text}' is no size; expected a number and a unit, such as 512MiB or 5GB")
    size = float(match[1]) * _UNITS[unit]  # infinite where the number has more digits than a float holds
    if size > LARGEST:
        raise InvalidSpec(f"{what}: '{text:.40}' is more than any machine has; expected a size such as 512MiB or 5GB")
    return int(size)


def show_size(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
