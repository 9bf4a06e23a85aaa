"""A picture of a network's graph, coloured by what moves together: one SVG, with nothing outside.

Operators lie in layers, each below all that it reads (Sugiyama, Tagawa & Toda 1981). Edges over several layers keep
a lane in each of them. What only computes shapes is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import onnx_ir as ir

from ensemerge.graph.surgery import held
from ensemerge.graph.symmetry import Space, Symmetry
from ensemerge.report.symmetry import colours

BOX_WIDTH, BOX_HEIGHT, LANE_WIDTH, GAP_WIDTH, LAYER_HEIGHT = 150, 38, 14, 18, 66
MARGIN, LEGEND_WIDTH, LEGEND_STEP = 24, 300, 24
SWEEPS = 6
STILL, INK, FAINT = "#eceef1", "#20242b", "#9aa3af"
LONGEST_NAME = 22
COUNTERS = frozenset({"Shape", "Size", "Constant", "Range"})


@dataclass(eq=False)
class Place:
    """A box, or the lane that an edge has in a layer. `x` is its middle."""

    node: ir.Node | None
    layer: int
    x: float = 0.0
    above: list[Place] = field(default_factory=list)
    below: list[Place] = field(default_factory=list)

    @property
    def width(self) -> int:
        return LANE_WIDTH if self.node is None else BOX_WIDTH

    @property
    def top(self) -> float:
        return MARGIN + self.layer * LAYER_HEIGHT

    @property
    def bottom(self) -> float:
        return self.top + BOX_HEIGHT


@dataclass(frozen=True)
class Edge:
    """A value on its way from the box that makes it to one that reads it, through the lanes between."""

    value: ir.Value
    places: tuple[Place, ...]


def draw_symmetry(model: ir.Model, symmetry: Symmetry) -> str:
    """The graph as SVG: boxes filled with the colours of the free spaces of what they write, grey where none is."""
    layers, edges = _laid_out(model)
    paint = _Paint(symmetry)
    right = max((place.x + place.width / 2 for layer in layers for place in layer), default=0)
    height = max(len(layers) * LAYER_HEIGHT, len(symmetry.free) * LEGEND_STEP + LEGEND_STEP) + 2 * MARGIN
    drawn = [paint.edge(edge) for edge in edges]
    drawn += [paint.box(place) for layer in layers for place in layer if place.node is not None]
    drawn += paint.legend(right + 2 * MARGIN)
    width = right + 2 * MARGIN + LEGEND_WIDTH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
    style = f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
    return "\n".join([head + style, '<rect width="100%" height="100%" fill="white"/>', *drawn, "</svg>", ""])


def _laid_out(model: ir.Model) -> tuple[list[list[Place]], list[Edge]]:
    """All boxes and lanes by layer, from left to right, and the edges."""
    boxes = _boxes(model)
    depth = max((box.layer for box in boxes.values()), default=-1) + 1
    layers: list[list[Place]] = [[] for _ in range(depth)]
    for box in boxes.values():
        layers[box.layer].append(box)
    edges = [edge for box in boxes.values() for edge in _edges(box, boxes, layers)]
    for _ in range(SWEEPS):
        for layer in layers:
            _ordered(layer, above=True)
        for layer in reversed(layers):
            _ordered(layer, above=False)
    _centred(layers)
    return layers, edges


def _boxes(model: ir.Model) -> dict[ir.Node, Place]:
    """The operators that depend on the inputs, each one layer below the lowest that it reads."""
    boxes: dict[ir.Node, Place] = {}
    given = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        values = [value for value in node.inputs if value is not None and held(value) is None]
        before = [boxes[maker] for value in values if (maker := value.producer()) in boxes and maker is not None]
        if node.op_type not in COUNTERS and (before or given & set(values)):
            boxes[node] = Place(node, max((box.layer for box in before), default=-1) + 1)
    return boxes


def _edges(box: Place, boxes: Mapping[ir.Node, Place], layers: Sequence[list[Place]]) -> list[Edge]:
    assert box.node is not None  # lanes read nothing
    edges = []
    for value in dict.fromkeys(value for value in box.node.inputs if value is not None):
        maker = value.producer()
        if maker is None or maker not in boxes:
            continue
        lanes = [Place(None, layer) for layer in range(boxes[maker].layer + 1, box.layer)]
        for lane in lanes:
            layers[lane.layer].append(lane)
        way = (boxes[maker], *lanes, box)
        for upper, lower in itertools.pairwise(way):
            upper.below.append(lower)
            lower.above.append(upper)
        edges.append(Edge(value, way))
    return edges


def _ordered(layer: list[Place], *, above: bool) -> None:
    """Sort a layer by where its neighbours lie, and put it side by side about its middle."""
    wanted = {}
    for place in layer:
        near = place.above if above else place.below
        wanted[place] = sum(other.x for other in near) / len(near) if near else place.x
    layer.sort(key=lambda place: wanted[place])
    x = 0.0
    for place in layer:
        place.x = max(x + place.width / 2, wanted[place])
        x = place.x + place.width / 2 + GAP_WIDTH
    shift = sum(wanted[place] - place.x for place in layer) / len(layer)
    for place in layer:
        place.x += shift


def _centred(layers: Sequence[Sequence[Place]]) -> None:
    left = min((place.x - place.width / 2 for layer in layers for place in layer), default=0.0)
    for layer in layers:
        for place in layer:
            place.x += MARGIN - left


class _Paint:
    """Boxes, edges and the legend in the colours of spaces."""

    def __init__(self, symmetry: Symmetry) -> None:
        self._symmetry = symmetry
        self._fills = {name: f"rgb{colour}" for name, colour in colours(symmetry).items()}

    def box(self, place: Place) -> str:
        node = place.node
        assert node is not None
        spaces = list(dict.fromkeys(space for value in node.outputs for space in self._free(value)))
        left, top = place.x - BOX_WIDTH / 2, place.top
        fills = [self._fills[space.name] for space in spaces] or [STILL]
        step = BOX_WIDTH / len(fills)
        stripes = "".join(
            f'<rect x="{left + at * step:.1f}" y="{top:.1f}" width="{step:.1f}" height="{BOX_HEIGHT}" fill="{fill}"/>'
            for at, fill in enumerate(fills)
        )
        frame = (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" fill="none" '
            f'stroke="{INK}" stroke-opacity=".45" rx="3"/>'
        )
        words = _text(place.x, top + 16, node.op_type, "600") + _text(place.x, top + 31, _weights(node), "400", 10)
        return f"<g><title>{escape(self._told(node, spaces))}</title>{stripes}{frame}{words}</g>"

    def edge(self, edge: Edge) -> str:
        free = self._free(edge.value)
        colour = self._fills[free[0].name] if free else FAINT
        path = [f"M {edge.places[0].x:.1f} {edge.places[0].bottom:.1f}"]
        for upper, lower in zip(edge.places, edge.places[1:], strict=False):
            middle = (upper.bottom + lower.top) / 2
            path.append(f"C {upper.x:.1f} {middle:.1f} {lower.x:.1f} {middle:.1f} {lower.x:.1f} {lower.top:.1f}")
            if lower.node is None:
                path.append(f"L {lower.x:.1f} {lower.bottom:.1f}")
        line = " ".join(path)
        name = escape(edge.value.name or "")
        dark = f'<path d="{line}" fill="none" stroke="{INK}" stroke-opacity=".35" stroke-width="3"/>'
        return f'<g><title>{name}</title>{dark}<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/></g>'

    def legend(self, left: float) -> list[str]:
        drawn = [_text(left, MARGIN + 8, "Units that move together", "600", anchor="start")]
        for number, space in enumerate(self._symmetry.free):
            top = MARGIN + LEGEND_STEP * (number + 1) - 6
            fill = self._fills[space.name]
            drawn.append(f'<rect x="{left:.0f}" y="{top}" width="16" height="16" rx="3" fill="{fill}" stroke="{INK}"/>')
            drawn.append(_text(left + 24, top + 12, self._named(space), "400", anchor="start"))
        return drawn

    def _named(self, space: Space) -> str:
        within = "".join(f" for each of {self._symmetry.spaces[outer].size}" for outer in space.within)
        return f"{space.size}{within} · {_short(space.name, LONGEST_NAME + 8)}"

    def _free(self, value: ir.Value) -> list[Space]:
        axes = self._symmetry.values.get(value.name or "", ())
        names = dict.fromkeys(name for axis in axes for factors in axis for name in factors)
        return [self._symmetry.spaces[name] for name in names if name in self._fills]

    def _told(self, node: ir.Node, spaces: Sequence[Space]) -> str:
        made = ", ".join(value.name or "" for value in node.outputs)
        moving = ", ".join(f"{space.name} ({space.size})" for space in spaces) or "nothing that may move"
        return f"{node.op_type} {node.name or ''} → {made}: {moving}"


def _weights(node: ir.Node) -> str:
    """The weights of a node by the layer that owns them, or how its output is called."""
    names = [value.name for value in node.inputs if value is not None and value.is_initializer() and value.name]
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    return _short(", ".join(owners) or node.outputs[0].name or "", LONGEST_NAME)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def _text(x: float, y: float, words: str, weight: str, size: int = 12, anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f"<text {place}>{escape(words)}</text>"
