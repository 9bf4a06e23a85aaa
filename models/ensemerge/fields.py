"""Read a mapping that a person wrote, strictly: every key is asked for, every other key is an error.

fields = Fields({"members": ["a", "b"], "combin": "vote"}, "digits/model.yaml")
fields.take("members", list)
fields.take("combine", str, default="mean_probability")
fields.finish()     # InvalidSpec: digits/model.yaml: unknown key 'combin'; did you mean 'combine'? …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, overload

from ensemerge.errors import InvalidSpec

T = TypeVar("T")
_REQUIRED: Any = object()
_NAMES = {dict: "a mapping", list: "a list", str: "a string", bool: "true or false", int: "a whole number"}


class Fields:
    """One mapping of a YAML or JSON file, and where it stands, for the messages."""

    def __init__(self, mapping: object, where: str, *, taken: Sequence[str] = ()) -> None:
        """`taken` are keys that were read before; they count as known when an unknown one gets a suggestion."""
        if not isinstance(mapping, Mapping):
            raise InvalidSpec(f"{where}: expected a mapping of keys to values, got {describe(mapping)}")
        self._left = dict(mapping)
        self._asked = list(taken)
        self.where = where

    @overload
    def take(self, key: str, kind: type[T]) -> T: ...
    @overload
    def take(self, key: str, kind: type[T], default: None) -> T | None: ...
    @overload
    def take(self, key: str, kind: type[T], default: T) -> T: ...

    def take(self, key: str, kind: type[T], default: T | None = _REQUIRED) -> T | None:
        """The value of `key`, which must be of `kind` (`float` accepts whole numbers). Raises InvalidSpec.

        With a default of None the key may also be there and empty.
        """
        self._asked.append(key)
        if key not in self._left:
            if default is _REQUIRED:
                raise InvalidSpec(f"{self.where}: '{key}' is missing{self._nearest_left(key)}")
            return default
        if default is None and self._left[key] is None:
            del self._left[key]
            return None
        return checked(self._left.pop(key), kind, f"{self.where}: '{key}'")

    def choose(self, key: str, choices: Iterable[str], default: str) -> str:
        """The value of `key`, which must be one of `choices`. Raises InvalidSpec."""
        value = self.take(key, str, default)
        names = list(choices)
        if value not in names:
            raise InvalidSpec(f"{self.where}: '{key}' is '{value}'; {suggest(value, names)}")
        return value

    def rest(self) -> dict[str, Any]:
        """Take everything that was not asked for: it is somebody else's to read."""
        rest, self._left = self._left, {}
        return rest

    def finish(self) -> None:
        """Every key must have been asked for by now. Raises InvalidSpec with a line for each that was not."""
        lines = [f"{self.where}: unknown key '{key}'; {suggest(str(key), self._asked)}" for key in self._left]
        if lines:
            raise InvalidSpec("\n".join(lines))

    def _nearest_left(self, key: str) -> str:
        near = get_close_matches(key, [str(left) for left in self._left], n=1)
        return f"; there is '{near[0]}', did you mean that?" if near else ""


def checked(value: object, kind: type[T], what: str) -> T:
    """`value`, if it is of `kind`; `what` names it in the error. Raises InvalidSpec."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # In Python True is an int; in a file that a person wrote it is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidSpec(f"{what}: expected {_NAMES.get(kind, 'a number')}, got {describe(value)}")
    return value


def suggest(word: str, known: Sequence[str]) -> str:
    """The end of an error message for a `word` that is none of the `known` ones."""
    near = get_close_matches(word, known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return f"{guess}expected one of: {', '.join(known)}"


def describe(value: object) -> str:
    """A value in an error message: its kind and, cut to a line, what it is."""
    text = repr(value)
    return f"{_NAMES.get(type(value), 'a ' + type(value).__name__)} {text if len(text) < 80 else text[:77] + '…'}"
