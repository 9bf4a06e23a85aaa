"""A network's symmetry as tables: what may move, what stays in place and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ensemerge.graph.symmetry import Space, Symmetry

Colour = tuple[int, int, int]  # red, green and blue, from 0 to 255

# Each hue is as far from those before it as can be, and neighbours differ in lightness too.
GOLDEN_DEGREES = 137.508
FIRST_HUE, CHROMA, LIGHTNESSES = 20.0, 0.1, (0.85, 0.79, 0.9)
INK: Colour = (32, 36, 43)  # dark enough to be read on all of them
# From lightness and two opponent colours to cones' answers, and from those to linear sRGB (Ottosson 2020, OKLab).
TO_CONES = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
TO_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
MOST_PLACES = 4
MOST_COUNTED_LOG10 = 6


def colours(symmetry: Symmetry) -> dict[str, Colour]:
    """A colour for each free space, by its name: the same for the same network, and light enough for dark letters."""
    return {
        space.name: _colour(LIGHTNESSES[at % len(LIGHTNESSES)], FIRST_HUE + at * GOLDEN_DEGREES)
        for at, space in enumerate(symmetry.free)
    }


def clean(name: str) -> str:
    """A name that a file brought along, fit for a terminal and for XML: nothing in it that cannot be seen."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def symmetry_tables(symmetry: Symmetry) -> list[Table | Text]:
    """What moves together, what stays in place and why, and how many orders of units there are."""
    tables: list[Table] = []
    if symmetry.free:
        tables.append(_free_table(symmetry))
    if reasons := _reasons(symmetry):
        tables.append(_frozen_table(reasons))
    if symmetry.without_rule:
        tables.append(_without_rule_table(symmetry.without_rule))
    spaced = [part for table in tables for part in (table, Text())]
    return [*spaced, Text(_orders(symmetry))]


def symmetry_facts(symmetry: Symmetry) -> dict[str, Any]:
    """The same for a script."""
    places = _places(symmetry)
    return {
        "spaces": [
            {"name": space.name, "size": space.size, "within": list(space.within), "axes": places[space.name]}
            for space in symmetry.free
        ],
        "frozen": [{"reason": reason, "axes": axes} for reason, axes in _reasons(symmetry).items()],
        "without_rule": dict(symmetry.without_rule),
        "orders_log10": orders_log10(symmetry),
    }


def orders_log10(symmetry: Symmetry) -> float:
    """The decimal logarithm of the number of elements of the group."""
    total = 0.0
    for space in symmetry.free:
        total += symmetry.size(space.within) * math.lgamma(space.size + 1) / math.log(10)
    return total


def _colour(lightness: float, hue: float) -> Colour:
    """A colour of OKLab, whose distances are those that people see; `hue` in degrees."""
    angle = math.radians(hue)
    cones = TO_CONES @ [lightness, CHROMA * math.cos(angle), CHROMA * math.sin(angle)]
    linear = np.clip(TO_LINEAR @ cones**3, 0.0, 1.0)
    red, green, blue = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return round(255 * red), round(255 * green), round(255 * blue)


def _free_table(symmetry: Symmetry) -> Table:
    """A row for each space; its number stands on its colour, here, in other rows and in the picture."""
    table = _table("Units that move together")
    table.add_column(no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    table.add_column("for each of", no_wrap=True)
    # Whatever the width, a name can be read to its end.
    table.add_column("space", overflow="fold", ratio=2)
    table.add_column("axes of weights", overflow="fold", ratio=3)
    places, samples = _places(symmetry), _samples(symmetry)
    for space in symmetry.free:
        axes = Text(_few(_gathered(places[space.name])))
        sample = samples[space.name]
        table.add_row(sample, str(space.size), _within(symmetry, space, samples), Text(clean(space.name)), axes)
    return table


def _samples(symmetry: Symmetry) -> dict[str, Text]:
    """A space's number on its colour."""
    found = {}
    digits = len(str(len(symmetry.free)))
    for number, (name, (red, green, blue)) in enumerate(colours(symmetry).items(), 1):
        found[name] = Text(
            f" {number:{digits}} ", style=f"rgb({INK[0]},{INK[1]},{INK[2]}) on rgb({red},{green},{blue})"
        )
    return found


def _within(symmetry: Symmetry, space: Space, samples: Mapping[str, Text]) -> Text:
    """How many units there are of each space within which this one lies: 3 of number 2."""
    parts = []
    for outer in space.within:
        size = symmetry.spaces[outer].size
        parts.append(Text.assemble(f"{size} of ", samples[outer]) if outer in samples else Text(f"{size} in place"))
    return Text(" × ").join(parts)


def _frozen_table(reasons: Mapping[str, Sequence[str]]) -> Table:
    table = _table("Axes that stay in place")
    table.add_column("axes", justify="right")
    table.add_column("reason")
    table.add_column("such as", overflow="fold")
    for reason, axes in reasons.items():
        table.add_row(str(len(axes)), Text(clean(reason)), Text(clean(axes[0])))
    return table


def _without_rule_table(counts: Mapping[str, int]) -> Table:
    table = _table("Operators without a rule: all that they touch stays in place")
    table.add_column("times", justify="right")
    table.add_column("operator", overflow="fold")
    for name, count in Counter(counts).most_common():
        table.add_row(str(count), Text(clean(name)))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )


def _orders(symmetry: Symmetry) -> str:
    power = orders_log10(symmetry)
    if not symmetry.free:
        return "No units may change places: only one order leaves the network as it is"
    count = f"{round(10**power):,}" if power < MOST_COUNTED_LOG10 else f"10^{power:.0f}"
    return f"{count} orders of units leave the network as it is"


def _places(symmetry: Symmetry) -> dict[str, list[str]]:
    """The axes of weights in which each space occurs, as `weight:axis`."""
    found: dict[str, list[str]] = {name: [] for name in symmetry.spaces}
    for weight, axes in symmetry.weights.items():
        for number, axis in enumerate(axes):
            for name in dict.fromkeys(name for factors in axis for name in factors):
                found[name].append(f"{weight}:{number}")
    return found


def _gathered(places: Sequence[str]) -> list[str]:
    """The same with a layer's weights taken together: `norm.*:0` for its weight, its bias and its statistics."""
    layers: dict[tuple[str, str], list[str]] = {}
    for place in places:
        weight, _, axis = place.rpartition(":")
        owner = weight.rpartition(".")[0] or weight
        layers.setdefault((owner, axis), []).append(place)
    return [members[0] if len(members) == 1 else f"{owner}.*:{axis}" for (owner, axis), members in layers.items()]


def _few(places: Sequence[str]) -> str:
    more = len(places) - MOST_PLACES
    return clean(", ".join(places[:MOST_PLACES])) + (f", +{more}" if more > 0 else "")


def _reasons(symmetry: Symmetry) -> dict[str, list[str]]:
    """The axes of weights that stay in place as a whole, by reason; the most frequent one first."""
    found: dict[str, list[str]] = {}
    for weight, axes in symmetry.weights.items():
        for number, axis in enumerate(axes):
            parts = [symmetry.spaces[name] for factors in axis for name in factors]
            reason = next((part.frozen for part in parts if part.frozen), None)
            if reason and not any(part.is_free for part in parts) and any(part.size > 1 for part in parts):
                found.setdefault(reason, []).append(f"{weight}:{number}")
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))
