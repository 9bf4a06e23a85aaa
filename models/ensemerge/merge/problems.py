"""Several things that are wrong at once: a person mends a recipe in one go, not one error at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ensemerge.errors import InvalidSpec


class Problems:
    """What was found wrong so far, a line each."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Note a problem, once."""
        if line not in self.lines:
            self.lines.append(line)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Note an InvalidSpec that is raised inside, and go on after the block."""
        try:
            yield
        except InvalidSpec as error:
            for line in str(error).split("\n"):
                self.add(line)

    def raise_any(self) -> None:
        """Raises InvalidSpec with a line for each problem, if there is one."""
        if self.lines:
            raise InvalidSpec("\n".join(self.lines))


def few(names: list[str], limit: int = 3) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
