"""The index of a checkpoint in several files, as Hugging Face writes it: which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ensemerge.errors import InvalidData

INDEX_BYTES_LIMIT = 100_000_000


class _Repeated(ValueError):
    pass


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON without a key twice in one object and without NaN. Raises InvalidData."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _Repeated as error:
        raise InvalidData(f"{where}: the key '{error}' is there twice; expected each name once") from error
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{where} is not JSON: {error}") from error


def read_json(path: Path) -> Any:
    """A small JSON file. Raises InvalidData."""
    try:
        if path.stat().st_size > INDEX_BYTES_LIMIT:
            raise InvalidData(f"{path} is larger than {INDEX_BYTES_LIMIT} bytes; expected a small JSON file")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}") from error


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by name; each lies in the index's own folder. Raises InvalidData.

    A file may be a link to elsewhere, as in Hugging Face's cache; a path in the index may not.
    """
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InvalidData(f"{path}: expected an object with a 'weight_map' from tensors to files")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or leaves_folder(shard):
            raise InvalidData(f"{path}: tensor '{tensor}' is said to be in {shard!r}; expected a file of the folder")
    for shard in sorted(set(shards.values())):
        if not (path.parent / shard).is_file():
            raise InvalidData(f"{path} names the file '{shard}', which is missing; download it again")
    return shards


def leaves_folder(path: str) -> bool:
    """Whether a relative path could lead out of the folder that it starts in."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    return (
        not path
        or "\0" in path
        or posix.is_absolute()
        or bool(windows.anchor)
        or ".." in (*posix.parts, *windows.parts)
    )


def check_shard(index: Path, shards: Mapping[str, str], shard: str, names: Iterable[str]) -> None:
    """Compare what a file holds with what the index says of it. Raises InvalidData."""
    expected = {name for name, file in shards.items() if file == shard}
    there = set(names)
    if missing := sorted(expected - there):
        raise InvalidData(f"{index} says that '{shard}' holds tensor '{missing[0]}', but it does not")
    if extra := sorted(there - expected):
        raise InvalidData(f"'{shard}' holds tensor '{extra[0]}', which {index} does not say; expected an index of all")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
