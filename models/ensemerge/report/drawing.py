"""A picture of a network's graph, coloured by what moves together: one SVG that needs nothing else.

Boxes lie in layers, each below all that it reads (Sugiyama, Tagawa & Toda 1981, IEEE Transactions on Systems, Man and
Cybernetics 11(2)). A value that is read further down keeps one lane through the layers between, which all its readers
share. What only computes shapes is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import onnx_ir as ir
from scipy import sparse
from scipy.optimize import linprog

from ensemerge.graph.surgery import held
from ensemerge.graph.symmetry import Axis, Product, Space, Symmetry
from ensemerge.report.symmetry import INK, Colour, clean, colours

BOX_WIDTH, BOX_HEIGHT, LANE_WIDTH, GAP_WIDTH = 164, 38, 10, 16
MARGIN, LEGEND_STEP, SAMPLE_WIDTH, LETTER_WIDTH = 24, 24, 26, 7
SWEEPS = 8
# How much a step between two places wants to be upright, by how many of them are boxes.
PULLS = (8.0, 1.0, 3.0)
STRAIGHT_GAP, BENT_GAP, WIDEST_GAP = 14.0, 30.0, 52.0
STILL: Colour = (238, 240, 243)
SHADE = 0.72
LONGEST_OPERATOR, LONGEST_DETAIL, LONGEST_NAME = 22, 28, 36
TITLE = "Units that move together"
COUNTERS = frozenset({"Shape", "Size"})


@dataclass(eq=False)
class Place:
    """What takes room in a layer: a lane, or a box. `x` is its middle and `top` its upper edge, in pixels."""

    layer: int
    x: float = field(default=0.0, init=False)
    top: float = field(default=0.0, init=False)
    above: list[Place] = field(default_factory=list, init=False)
    below: list[Place] = field(default_factory=list, init=False)

    @property
    def width(self) -> int:
        return LANE_WIDTH

    @property
    def bottom(self) -> float:
        return self.top + BOX_HEIGHT


@dataclass(eq=False)
class Box(Place):
    """An input, an operator or an output: what it is called, what it holds, writes and reads."""

    name: str
    weights: tuple[str, ...] = ()
    writes: tuple[ir.Value, ...] = ()
    reads: tuple[ir.Value, ...] = ()
    node: ir.Node | None = None

    @property
    def width(self) -> int:
        return BOX_WIDTH

    @property
    def shown(self) -> tuple[ir.Value, ...]:
        """The values whose colours it has."""
        return self.writes or self.reads

    @property
    def corner(self) -> float:
        return BOX_HEIGHT / 2 if self.node is None else 7


@dataclass(frozen=True)
class Flow:
    """A value on its way to those that read it: steps from one layer to the next."""

    value: ir.Value
    steps: tuple[tuple[Place, Place], ...]


def draw_symmetry(model: ir.Model, symmetry: Symmetry) -> str:
    """The graph as SVG: boxes and edges in the colours of the free spaces of what they write, grey where none is."""
    boxes = _boxes(model, symmetry)
    layers, flows = _laid_out(boxes)
    paint = _Paint(symmetry)
    places = list(itertools.chain.from_iterable(layers))
    left = max((place.x + place.width / 2 for place in places), default=0.0) + 2 * MARGIN
    drawn = [*map(paint.flow, flows), *map(paint.box, boxes), *paint.legend(left)]
    lowest = max((place.bottom for place in places), default=0.0)
    width, height = left + paint.legend_width + MARGIN, max(lowest, paint.legend_height) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" fill="{_css(INK)}">',
            '<rect width="100%" height="100%" fill="white"/>',
            paint.mixtures(),
            *drawn,
            "</svg>",
            "",
        ]
    )


# What is drawn.


def _boxes(model: ir.Model, symmetry: Symmetry) -> list[Box]:
    """Inputs, all operators that depend on them, and outputs: each one layer below the lowest that it reads."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    boxes = [Box(0, name=value.name or "", writes=(value,)) for value in inputs]
    makers = {value: box for box in boxes for value in box.writes}
    for node in model.graph:
        reads = tuple(value for value in _read(node) if value in makers)
        if not reads or node.op_type in COUNTERS:
            continue
        writes = tuple(value for value in node.outputs if value.name)
        box = Box(_below(reads, makers), node.op_type, _weights(node, symmetry), writes, reads, node)
        makers |= dict.fromkeys(writes, box)
        boxes.append(box)
    outputs = [value for value in model.graph.outputs if value in makers]
    boxes += [Box(_below([value], makers), name=value.name or "", reads=(value,)) for value in outputs]
    _sink(boxes)
    return boxes


def _weights(node: ir.Node, symmetry: Symmetry) -> tuple[str, ...]:
    names = (value.name for value in node.inputs if value is not None and value.name)
    return tuple(name for name in names if name in symmetry.weights)


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """The values that decide what a node computes, those read inside its subgraphs included, each once."""
    attributes = node.attributes.values()
    graphs = [attribute.as_graph() for attribute in attributes if attribute.type == ir.AttributeType.GRAPH]
    inner = (value for graph in graphs for one in graph.all_nodes() for value in one.inputs)
    # Of its second input CastLike wants to know the type alone.
    outer = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    yield from dict.fromkeys(value for value in (*outer, *inner) if value is not None and held(value) is None)


def _below(values: Iterable[ir.Value], makers: Mapping[ir.Value, Box]) -> int:
    return 1 + max(makers[value].layer for value in values)


def _sink(boxes: Sequence[Box]) -> None:
    """Bring what comes from inputs that nothing else reads down to where it is wanted, such as a mask."""
    readers = _readers(boxes)
    loose: set[ir.Value] = set()
    for box in boxes:
        if all(value in loose and len(readers[value]) == 1 for value in box.reads):
            loose.update(box.writes)
    for box in reversed(boxes):
        wanted = [reader.layer for value in box.writes if value in loose for reader in readers.get(value, [])]
        box.layer = max(box.layer, min(wanted, default=0) - 1)


def _readers(boxes: Iterable[Box]) -> dict[ir.Value, list[Box]]:
    found: dict[ir.Value, list[Box]] = {}
    for box in boxes:
        for value in box.reads:
            found.setdefault(value, []).append(box)
    return found


# Where it is drawn.


def _laid_out(boxes: Sequence[Box]) -> tuple[list[list[Place]], list[Flow]]:
    """All places by layer, from left to right, and what passes between them."""
    layers: list[list[Place]] = [[] for _ in range(max((box.layer for box in boxes), default=-1) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    makers = {value: box for box in boxes for value in box.writes}
    flows = [_flow(value, makers[value], readers, layers) for value, readers in _readers(boxes).items()]
    for upper, lower in itertools.chain.from_iterable(flow.steps for flow in flows):
        upper.below.append(lower)
        lower.above.append(upper)
    _order(layers)
    _place(layers)
    _stack(layers)
    return layers, flows


def _flow(value: ir.Value, maker: Box, readers: Sequence[Box], layers: Sequence[list[Place]]) -> Flow:
    """A value's way; its lanes get their places in the layers."""
    way: list[Place] = [maker]
    for layer in range(maker.layer + 1, max(reader.layer for reader in readers)):
        way.append(Place(layer))
        layers[layer].append(way[-1])
    ends = [(way[reader.layer - 1 - maker.layer], reader) for reader in readers]
    return Flow(value, (*itertools.pairwise(way), *ends))


def _order(layers: Sequence[list[Place]]) -> None:
    """Sort every layer by the mean of its neighbours, downwards and upwards in turn, so that few edges cross."""
    for _ in range(SWEEPS):
        for before, layer in itertools.pairwise(layers):
            _sort(layer, before, {place: place.above for place in layer})
        for after, layer in itertools.pairwise(reversed(layers)):
            _sort(layer, after, {place: place.below for place in layer})


def _sort(layer: list[Place], other: Sequence[Place], neighbours: Mapping[Place, Sequence[Place]]) -> None:
    rank = {place: at for at, place in enumerate(other)}
    own = {place: at for at, place in enumerate(layer)}
    means = {
        place: sum(rank[one] for one in near) / len(near) if near else float(own[place])
        for place, near in neighbours.items()
    }
    layer.sort(key=lambda place: means[place])


def _place(layers: Sequence[Sequence[Place]]) -> None:
    """Set every `x` so that the steps lean little in all (Gansner et al. 1993, IEEE Transactions on Software
    Engineering 19(3)).

    Absolute distances are summed, not squares: one step leans and a hundred are upright, where a hundred would lean
    a little.
    """
    places = list(itertools.chain.from_iterable(layers))
    if not places:
        return  # a network without inputs: a linear program has at least one variable
    number = {place: at for at, place in enumerate(places)}
    steps = [(number[place], number[other]) for place in places for other in place.below]
    pulls = [PULLS[isinstance(places[upper], Box) + isinstance(places[lower], Box)] for upper, lower in steps]
    beside = [(number[left], number[right]) for layer in layers for left, right in itertools.pairwise(layer)]
    room = [(places[left].width + places[right].width) / 2 + GAP_WIDTH for left, right in beside]
    found = _upright(len(places), steps, pulls, beside, room)
    left = min(x - place.width / 2 for place, x in zip(places, found, strict=True))
    for place, x in zip(places, found, strict=True):
        place.x = float(x) - left + MARGIN


def _upright(
    count: int,
    steps: Sequence[tuple[int, int]],
    pulls: Sequence[float],
    beside: Sequence[tuple[int, int]],
    room: Sequence[float],
) -> np.ndarray:
    """Positions `(count,) float64` with the least sum of leans times pulls, when neighbours have their room."""
    leans, apart = _differences(steps, count), _differences(beside, count)
    absolute = sparse.identity(len(steps))
    nothing = sparse.csr_matrix((len(beside), len(steps)))
    # Leans are the absolute values of differences: not below either sign of them.
    limits = sparse.vstack(
        [sparse.hstack([leans, -absolute]), sparse.hstack([-leans, -absolute]), sparse.hstack([-apart, nothing])]
    )
    bounds = np.concatenate([np.zeros(2 * len(steps)), -np.array(room)])
    costs = np.concatenate([np.zeros(count), np.array(pulls)])
    solved = linprog(costs, A_ub=limits.tocsr(), b_ub=bounds, method="highs")
    assert solved.success  # room can always be made to the right
    positions: np.ndarray = solved.x[:count]
    return positions


def _differences(pairs: Sequence[tuple[int, int]], count: int) -> sparse.csr_matrix:
    """`(pairs, count)`: what each pair's second position is more than its first."""
    rows = np.repeat(np.arange(len(pairs)), 2)
    columns = np.array(pairs, dtype=int).reshape(-1)
    return sparse.csr_matrix((np.tile([-1.0, 1.0], len(pairs)), (rows, columns)), shape=(len(pairs), count))


def _stack(layers: Sequence[Sequence[Place]]) -> None:
    """Set every `top`: layers lie close where all is upright, and further apart where edges have a way to go."""
    top = float(MARGIN)
    for layer in layers:
        for place in layer:
            place.top = top
        bend = max((abs(place.x - other.x) for place in layer for other in place.below), default=0.0)
        gap = STRAIGHT_GAP if bend < 1 else min(BENT_GAP + bend / 12, WIDEST_GAP)
        top += BOX_HEIGHT + gap


# How it is drawn.


class _Paint:
    """Boxes, edges and the legend, in the colours of spaces."""

    def __init__(self, symmetry: Symmetry) -> None:
        self._symmetry = symmetry
        self._colours = colours(symmetry)
        self._numbers = {name: number for number, name in enumerate(self._colours, 1)}
        self._mixtures: dict[str, str] = {}

    @property
    def legend_width(self) -> int:
        return SAMPLE_WIDTH + LETTER_WIDTH * max(map(len, [TITLE, *map(self._entry, self._symmetry.free)]))

    @property
    def legend_height(self) -> int:
        return MARGIN + LEGEND_STEP * (len(self._colours) + 2)

    def box(self, box: Box) -> str:
        spaces = list(dict.fromkeys(space for value in box.shown for space in self._free(value)))
        left, edge = box.x - BOX_WIDTH / 2, self._colours[spaces[0].name] if spaces else STILL
        told = "\n".join(self._told(box))
        return (
            f"<g><title>{escape(told)}</title>"
            f'<rect x="{left:.1f}" y="{box.top:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="{box.corner:g}" '
            f'fill="{self._fill(spaces)}" stroke="{_css(_shaded(edge))}"/>'
            f"{_text(box.x, box.top + 16, _short(clean(box.name), LONGEST_OPERATOR), weight=600)}"
            f"{_text(box.x, box.top + 30, _short(self._detail(box), LONGEST_DETAIL), size=10)}</g>"
        )

    def flow(self, flow: Flow) -> str:
        free = self._free(flow.value)
        colour = _shaded(self._colours[free[0].name] if free else STILL)
        told = "\n".join(self._described(flow.value))
        path = " ".join(_curve(upper, lower) for upper, lower in flow.steps)
        line = f'<path d="{path}" fill="none" stroke="{_css(colour)}" stroke-width="2.5" stroke-linejoin="round"/>'
        return f"<g><title>{escape(told)}</title>{line}</g>"

    def legend(self, left: float) -> Iterator[str]:
        yield _text(left, MARGIN + 10, TITLE, weight=600, anchor="start")
        for space in self._symmetry.free:
            number = self._numbers[space.name]
            yield _legend_row(left, number, self._colours[space.name], str(number), self._entry(space))
        yield _legend_row(left, len(self._numbers) + 1, STILL, "", "stays in place")

    def mixtures(self) -> str:
        """The fills of boxes with several spaces; call it when all boxes are drawn."""
        return f"<defs>{''.join(self._mixtures.values())}</defs>"

    def _entry(self, space: Space) -> str:
        within = "".join(f", for each of {self._symmetry.spaces[outer].size}" for outer in space.within)
        return f"{space.size}{within}: {_short(clean(space.name), LONGEST_NAME)}"

    def _fill(self, spaces: Sequence[Space]) -> str:
        parts = [self._colours[space.name] for space in spaces]
        if len(parts) < 2:
            return _css(parts[0] if parts else STILL)
        # Named after what it is: where a page holds several pictures, equal names mean equal fills.
        name = "mix" + "".join(_css(part).replace("#", "-") for part in parts)
        stops = "".join(
            f'<stop offset="{at / len(parts):.4f}" stop-color="{_css(part)}"/>'
            f'<stop offset="{(at + 1) / len(parts):.4f}" stop-color="{_css(part)}"/>'
            for at, part in enumerate(parts)
        )
        self._mixtures[name] = f'<linearGradient id="{name}">{stops}</linearGradient>'
        return f"url(#{name})"

    def _detail(self, box: Box) -> str:
        """The layers that own a box's weights, or the shape of what it writes."""
        if box.weights:
            return clean(", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in box.weights)))
        return self._shape(box.shown[0])

    def _told(self, box: Box) -> Iterator[str]:
        yield clean(box.name if box.node is None else f"{box.name} {box.node.name or ''}")
        yield from (f"holds {clean(name)}" for name in box.weights)
        for value in box.shown:
            yield from self._described(value)

    def _described(self, value: ir.Value) -> Iterator[str]:
        """A value and of which spaces its axes are made, line by line."""
        yield f"{clean(value.name or '')}: {self._shape(value)}"
        for number, axis in enumerate(self._axes(value)):
            if any(self._symmetry.size(factors) > 1 for factors in axis):
                yield f"axis {number}: {' + '.join(map(self._product, axis))}"

    def _product(self, factors: Product) -> str:
        return " × ".join(self._space(self._symmetry.spaces[name]) for name in factors)

    def _space(self, space: Space) -> str:
        if space.name in self._numbers:
            return f"{space.size} of {self._numbers[space.name]}, {clean(space.name)}"
        return f"{space.size} in place ({clean(space.frozen)})" if space.frozen else str(space.size)

    def _shape(self, value: ir.Value) -> str:
        """As the graph states it; where it does not, as it was when the network was run to derive the symmetry."""
        if value.shape is not None:
            return " × ".join(_size(size) for size in value.shape) or "a number"
        sizes = [str(sum(map(self._symmetry.size, axis))) for axis in self._axes(value)]
        return f"{' × '.join(sizes)}, as run" if sizes else ""

    def _axes(self, value: ir.Value) -> tuple[Axis, ...]:
        return self._symmetry.values.get(value.name or "", ())

    def _free(self, value: ir.Value) -> list[Space]:
        """The coloured spaces of a value's axes, in order."""
        names = dict.fromkeys(name for axis in self._axes(value) for factors in axis for name in factors)
        return [self._symmetry.spaces[name] for name in names if name in self._colours]


def _curve(upper: Place, lower: Place) -> str:
    """From the lower edge of a place to the upper edge of the next, and through it where it is a lane."""
    middle = (upper.bottom + lower.top) / 2
    start = f"M{upper.x:.1f} {upper.bottom:.1f}"
    bend = f"C{upper.x:.1f} {middle:.1f} {lower.x:.1f} {middle:.1f} {lower.x:.1f} {lower.top:.1f}"
    return f"{start}{bend}" if isinstance(lower, Box) else f"{start}{bend}V{lower.bottom:.1f}"


def _size(size: int | ir.SymbolicDim) -> str:
    return str(size) if isinstance(size, int) else clean(size.value or "?")


def _legend_row(left: float, row: int, colour: Colour, number: str, words: str) -> str:
    top = MARGIN + LEGEND_STEP * row - 4
    sample = (
        f'<rect x="{left:.1f}" y="{top}" width="{SAMPLE_WIDTH}" height="17" rx="5" fill="{_css(colour)}" '
        f'stroke="{_css(_shaded(colour))}"/>'
    )
    mark = _text(left + SAMPLE_WIDTH / 2, top + 12, number, size=10)
    return f"<g>{sample}{mark}{_text(left + SAMPLE_WIDTH + 8, top + 13, words, anchor='start')}</g>"


def _text(x: float, y: float, words: str, *, weight: int = 400, size: int = 12, anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f"<text {place}>{escape(words)}</text>"


def _short(text: str, longest: int) -> str:
    """The end of a long text: what tells names apart stands there."""
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _shaded(colour: Colour) -> Colour:
    """Dark enough for a line on white."""
    red, green, blue = (round(SHADE * part) for part in colour)
    return red, green, blue
