"""A network's symmetry as tables: what may move, what stays in place and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ensemerge.graph.symmetry import Space, Symmetry

# Each hue is as far from those before it as can be.
GOLDEN_DEGREES = 137.508
MOST_NAMES = 4


def colours(symmetry: Symmetry) -> dict[str, tuple[int, int, int]]:
    """A colour for each free space, red, green and blue from 0 to 255: light enough for dark letters."""
    return {space.name: _light(number * GOLDEN_DEGREES) for number, space in enumerate(symmetry.free)}


def _light(hue: float) -> tuple[int, int, int]:
    """The colour of a hue in degrees, at the lightness 0.78 and the saturation 0.65."""
    spread = 0.65 * (1 - abs(2 * 0.78 - 1))
    parts = []
    for offset in (0, 8, 4):
        k = (offset + hue / 30) % 12
        parts.append(0.78 - spread / 2 * max(-1.0, min(k - 3, 9 - k, 1.0)))
    red, green, blue = (round(255 * part) for part in parts)
    return red, green, blue


def symmetry_tables(symmetry: Symmetry) -> list[Table | Text]:
    """What `ensemerge align --explain` prints."""
    shown: list[Table | Text] = [_spaces(symmetry), _frozen(symmetry)]
    if symmetry.without_rule:
        shown.append(_without_rule(symmetry))
    return [*shown, Text(f"10^{orders_log10(symmetry):.0f} orders of units leave the network as it is")]


def symmetry_facts(symmetry: Symmetry) -> dict[str, Any]:
    """The same as data."""
    places = _places(symmetry)
    return {
        "spaces": [
            {"name": space.name, "size": space.size, "within": list(space.within), "axes": places[space.name]}
            for space in symmetry.free
        ],
        "frozen": [
            {"reason": reason, "axes": axes} for reason, axes in sorted(_reasons(symmetry).items(), key=_most_axes)
        ],
        "without_rule": dict(symmetry.without_rule),
        "orders_log10": orders_log10(symmetry),
    }


def orders_log10(symmetry: Symmetry) -> float:
    """The logarithm of the number of elements of the group."""
    total = 0.0
    for space in symmetry.free:
        total += symmetry.size(space.within) * math.lgamma(space.size + 1) / math.log(10)
    return total


def _spaces(symmetry: Symmetry) -> Table:
    table = _table("Units that move together", "", "space", "units", "for each of", "axes of weights")
    places, fills = _places(symmetry), colours(symmetry)
    for space in symmetry.free:
        red, green, blue = fills[space.name]
        sample = Text("  ", style=f"on #{red:02x}{green:02x}{blue:02x}")
        table.add_row(sample, space.name, str(space.size), _within(symmetry, space), _few(places[space.name]))
    return table


def _within(symmetry: Symmetry, space: Space) -> str:
    return " × ".join(f"{symmetry.spaces[outer].size} of {outer}" for outer in space.within)


def _frozen(symmetry: Symmetry) -> Table:
    table = _table("Axes that stay in place", "reason", "axes", "such as")
    for reason, axes in sorted(_reasons(symmetry).items(), key=_most_axes):
        table.add_row(reason, str(len(axes)), axes[0])
    return table


def _without_rule(symmetry: Symmetry) -> Table:
    table = _table("Operators without a rule: all that they touch stays in place", "operator", "times")
    for name, count in Counter(symmetry.without_rule).most_common():
        table.add_row(name, str(count))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("units", "axes", "times") else "left")
    return table


def _places(symmetry: Symmetry) -> dict[str, list[str]]:
    """The axes of weights in which each space occurs, as `weight:axis`."""
    found: dict[str, list[str]] = {name: [] for name in symmetry.spaces}
    for weight, axes in symmetry.weights.items():
        for number, axis in enumerate(axes):
            for name in dict.fromkeys(name for factors in axis for name in factors):
                found[name].append(f"{weight}:{number}")
    return found


def _reasons(symmetry: Symmetry) -> Mapping[str, list[str]]:
    """The axes of weights that stay in place as a whole, by reason."""
    found: dict[str, list[str]] = {}
    for weight, axes in symmetry.weights.items():
        for number, axis in enumerate(axes):
            parts = [symmetry.spaces[name] for factors in axis for name in factors]
            reason = next((part.frozen for part in parts if part.frozen), None)
            if reason and not any(part.is_free for part in parts) and any(part.size > 1 for part in parts):
                found.setdefault(reason, []).append(f"{weight}:{number}")
    return found


def _most_axes(entry: tuple[str, Sequence[str]]) -> int:
    return -len(entry[1])


def _few(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f", +{more}" if more > 0 else "")
