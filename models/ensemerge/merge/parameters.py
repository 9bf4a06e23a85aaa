"""The parameters of a recipe: what may stand there, and which value holds for one tensor.

A setting is a value, a list of values spread over the depth of the network (a gradient), or a list of conditions
`{filter, value}` of which the first that fits the tensor's name holds. Settings stand at several levels; the nearest
to the tensor that has something to say is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ensemerge.errors import InvalidSpec
from ensemerge.fields import Fields, describe, suggest
from ensemerge.merge.problems import Problems

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Condition:
    """A value, or a gradient, for the tensors whose name contains `filter`; None is every tensor."""

    filter: str | None
    value: Scalar | tuple[Scalar, ...]

    def holds(self, tensor: str) -> bool:
        return self.filter is None or self.filter in tensor


Setting = tuple[Condition, ...]
Settings = Mapping[str, Setting]


class Declaration(Protocol):
    """What a method says of one of its parameters."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> type: ...
    @property
    def per_model(self) -> bool: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def find(name: str, levels: Sequence[Settings], tensor: str, t: float) -> Scalar | None:
    """The value of a parameter for one tensor, at depth t in [0, 1]; None where no level says anything of it.

    `levels` go from the nearest to the farthest: source, slice, module, recipe.
    """
    for settings in levels:
        for condition in settings.get(name, ()):
            if condition.holds(tensor):
                return at_depth(condition.value, t)
    return None


def at_depth(value: Scalar | tuple[Scalar, ...], t: float) -> Scalar:
    """A gradient at t: linear between the two nearest numbers; anything else (switches, words) in steps."""
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    below = int(place)
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value):
        return value[below]
    above = min(below + 1, len(value) - 1)
    fraction = place - below
    return (1 - fraction) * float(value[below]) + fraction * float(value[above])


def parse_settings(
    body: Mapping[Any, Any], where: str, allowed: Sequence[Declaration] | None, elsewhere: Sequence[Declaration] = ()
) -> Settings:
    """Read a `parameters:` mapping. Raises InvalidSpec with a line for each problem.

    `allowed` are the parameters that may stand here, None to read any; those `elsewhere` are known, but not here.
    """
    problems = Problems()
    settings: dict[str, Setting] = {}
    for name, value in body.items():
        with problems.gathered():
            declaration = None if allowed is None else _declared(str(name), where, allowed, elsewhere)
            settings[str(name)] = _parse_setting(value, f"{where}: '{name}'", declaration)
    problems.raise_any()
    return settings


def _declared(name: str, where: str, allowed: Sequence[Declaration], elsewhere: Sequence[Declaration]) -> Declaration:
    for declaration in allowed:
        if declaration.name == name:
            return declaration
    if any(declaration.name == name for declaration in elsewhere):
        raise InvalidSpec(
            f"{where}: '{name}' is one value for all models, not one for each; move it to the `parameters` of the "
            "slice or of the recipe"
        )
    known = [declaration.name for declaration in allowed]
    ending = suggest(name, known) if known else "expected none, the method takes no such parameters"
    raise InvalidSpec(f"{where}: unknown parameter '{name}'; {ending}")


def _parse_setting(value: object, where: str, declaration: Declaration | None) -> Setting:
    entries = [value] if isinstance(value, Mapping) else value
    if isinstance(entries, list) and any(isinstance(entry, Mapping) for entry in entries):
        return tuple(_parse_condition(entry, f"{where}[{i}]", declaration) for i, entry in enumerate(entries))
    return (Condition(None, _parse_value(value, where, declaration)),)


def _parse_condition(entry: object, where: str, declaration: Declaration | None) -> Condition:
    fields = Fields(entry, where)
    pattern = fields.take("filter", str, None)
    rest = fields.rest()
    if set(rest) != {"value"}:
        unknown = [str(key) for key in rest if key != "value"]
        detail = f"unknown key '{unknown[0]}'; expected: filter, value" if unknown else "'value' is missing"
        raise InvalidSpec(f"{where}: {detail}")
    value = _parse_value(rest["value"], f"{where}: 'value'", declaration)
    return Condition(None if pattern in (None, "*") else pattern, value)


def _parse_value(value: object, where: str, declaration: Declaration | None) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(value, list):
        return checked_scalar(value, where, declaration)
    if not value:
        raise InvalidSpec(f"{where}: an empty list; expected a value, or at least one for a gradient")
    return tuple(checked_scalar(entry, f"{where}[{i}]", declaration) for i, entry in enumerate(value))


def checked_scalar(value: object, where: str, declaration: Declaration | None) -> Scalar:
    """One value of a parameter, of the declared kind and in its range. Raises InvalidSpec.

    YAML reads `1e-5` as a word; it is taken as the number that it was meant to be. So are 0 and 1 as switches, which
    old recipes hold.
    """
    if not isinstance(value, bool | int | float | str):
        raise InvalidSpec(f"{where}: expected a number or a switch, got {describe(value)}")
    if declaration is None:
        return value
    if declaration.kind is bool:
        return _switch(value, where)
    number = _number(value, where)
    if declaration.kind is int:
        if not number.is_integer():
            raise InvalidSpec(f"{where}: expected a whole number, got {describe(value)}")
        number = int(number)
    if not declaration.low <= number <= declaration.high:
        raise InvalidSpec(f"{where} is {number}; expected {_range(declaration)}")
    return number


def _switch(value: Scalar, where: str) -> bool:
    if value in (0, 1) or (isinstance(value, str) and value.lower() in ("true", "false")):
        return value.lower() == "true" if isinstance(value, str) else bool(value)
    raise InvalidSpec(f"{where}: expected true or false, got {describe(value)}")


def _number(value: Scalar, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str | bool) and math.isnan(number):
        raise InvalidSpec(f"{where}: expected a number, got {describe(value)}")
    if not math.isfinite(number):
        raise InvalidSpec(f"{where} is {value}; expected a finite number")
    return number


def _range(declaration: Declaration) -> str:
    if declaration.high == math.inf:
        return f"at least {declaration.low:g}"
    if declaration.low == -math.inf:
        return f"at most {declaration.high:g}"
    return f"a value from {declaration.low:g} to {declaration.high:g}"
