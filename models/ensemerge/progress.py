"""How long work reports progress: `notify(stage, done, total)`, as often as it likes."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """For callers who do not want to know."""
