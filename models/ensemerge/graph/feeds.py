"""Inputs from a file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from ensemerge.errors import InvalidData
from ensemerge.graph.run import Arrays


def read_arrays(path: Path) -> Arrays:
    """The arrays of an .npz file by name, never pickled objects. Raises InvalidData."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidData(f"{path} is no .npz of plain arrays that can be read: {error}") from error
