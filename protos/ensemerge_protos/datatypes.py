"""The protocol's names of dtypes and their numpy forms, and how strings travel: what both sides must agree on."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

import numpy as np

# BYTES is an array of Python objects: strings on the way in, strings or bytes on the way out.
NUMPY: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
NAMES = {dtype: name for name, dtype in NUMPY.items()}

_LENGTH = struct.Struct("<I")


def pack_strings(values: Iterable[bytes]) -> bytes:
    """BYTES elements one after another: four bytes of length, little-endian, then the element."""
    return b"".join(_LENGTH.pack(len(value)) + value for value in values)


def unpack_strings(raw: bytes) -> Iterator[bytes]:
    """The elements that `pack_strings` wrote. Raises ValueError where `raw` ends too early."""
    place = 0
    while place < len(raw):
        if len(raw) - place < _LENGTH.size:
            raise ValueError("incomplete string length indicator")
        (length,) = _LENGTH.unpack_from(raw, place)
        place += _LENGTH.size
        if len(raw) - place < length:
            raise ValueError(f"incomplete string data: expected {length} bytes, got {len(raw) - place}")
        yield raw[place : place + length]
        place += length
