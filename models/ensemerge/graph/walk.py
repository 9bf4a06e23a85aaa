"""Walk a graph from its inputs to its outputs and find out which axes of which values consist of the same units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.graph.files import named
from ensemerge.graph.surgery import held
from ensemerge.graph.trace import Trace
from ensemerge.graph.units import Units, cut, product_of, tie


@dataclass(frozen=True)
class Varying:
    """An axis whose units depend on the place along another axis: the heads of queries, keys and values, packed."""

    index: Units  # the other axis
    choices: tuple[Units, ...]  # the units at each of its places

    @property
    def size(self) -> int:
        return self.choices[0].size


@dataclass(frozen=True)
class Copies:
    """An axis along which all is equal: its units are nobody's, and everyone who reads it gets others."""

    size: int


Dim = Units | Varying


class Walk:
    """What is known so far. Rules read the axes of a node's inputs, tie them, and set those of its outputs."""

    def __init__(self, model: ir.Model, trace: Trace, fixed: Collection[str]) -> None:
        self.trace = trace
        self.model = model
        self.dims: dict[ir.Value, list[Dim | Copies]] = {}
        self.meetings: list[list[Units]] = []  # units that occur together without being one value
        self.summed: set[tuple[ir.Value, int]] = set()  # axes of weights that operators sum over: their inputs
        self.read: list[list[ir.Value]] = []  # what operators that mix units read, one after the other
        self.without_rule: dict[str, int] = {}  # operators without a rule, and how often they occur
        self._fixed = fixed
        self.indexed = _indexed_axes(self)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        tensor = held(value)
        return tuple(self.trace.shapes[named(value)]) if tensor is None else tuple(tensor.numpy().shape)

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """The whole numbers that a value holds, flattened; None where they are many or not there."""
        if value is None:
            return None
        tensor = held(value)
        array = tensor.numpy() if tensor is not None else self.trace.numbers.get(named(value))
        return None if array is None or array.dtype.kind not in "iub" else [int(n) for n in np.ravel(array)]

    def axes(self, value: ir.Value) -> list[Dim]:
        """The axes of a value. Those of a weight are its own, those of an input stay in place."""
        if value not in self.dims:
            self.dims[value] = list(self._first_seen(value))
        return [Units(dim.size) if isinstance(dim, Copies) else dim for dim in self.dims[value]]

    def units(self, value: ir.Value) -> list[Units]:
        """The axes of a value as plain units: varying ones stay in place."""
        return [_plain(dim) for dim in self.axes(value)]

    def set(self, value: ir.Value, dims: Sequence[Dim | Copies]) -> None:
        if value.name:  # outputs that nobody wants have none
            self.dims[value] = list(dims)

    def fresh(self, value: ir.Value, reason: str | None) -> list[Units]:
        """New axes for a value, which stay in place where a reason is given."""
        return [Units(size, reason) for size in self.shape(value)]

    def meet(self, units: Sequence[Units]) -> None:
        """These occur together in something that the operator computes on the way, such as a mean."""
        self.meetings.append(list(units))

    def mix(self, units: Sequence[Units], along: Collection[int]) -> None:
        """What lies at the places along these axes goes into one another: all else has one order for all of them."""
        self.meet([unit for at, unit in enumerate(units) if at not in along])

    def knows(self, value: ir.Value) -> bool:
        """Whether a value is a tensor that was seen: sequences, for example, have no axes."""
        return held(value) is not None or named(value) in self.trace.shapes

    def freeze(self, value: ir.Value, reason: str) -> None:
        for unit in self.units(value):
            unit.freeze(reason)

    def probe(self, *values: ir.Value) -> None:
        """An operator sums over units of these values: a place to look at activations."""
        self.read.append([value for value in values if held(value) is None])

    def is_settled(self, value: ir.Value) -> bool:
        """Whether a value is the same for all inputs, whatever they hold and however long they are."""
        waiting, seen = [value], set()
        while waiting:
            one = waiting.pop()
            node = one.producer()
            if one in seen or held(one) is not None:
                continue
            seen.add(one)
            if node is None or subgraphs(node):
                return False
            sizes = _sizes_read(self, node)
            if not all(self._is_static(*place) for place in sizes or ()):
                return False
            if sizes is None:
                waiting += [before for before in node.inputs if before is not None]
        return True

    def _is_static(self, value: ir.Value, axis: int) -> bool:
        """Whether the size of an axis is that of a weight: inputs, places and copies may be more or fewer."""
        if held(value) is not None:
            return True
        dim = self.dims[value][axis]
        units = dim.choices[0] if isinstance(dim, Varying) else dim
        return isinstance(units, Units) and not any(leaf.frozen for leaf in units.leaves)

    def _first_seen(self, value: ir.Value) -> Sequence[Units]:
        tensor = held(value)
        if tensor is None:
            return self.fresh(value, "it is an input")
        if not tensor.dtype.is_floating_point():
            return self.fresh(value, "it meets a table of whole numbers, which stays as it is")
        return self.fresh(value, "it is equal in all networks" if named(value) in self._fixed else None)


def _plain(dim: Dim) -> Units:
    if isinstance(dim, Units):
        return dim
    for choice in dim.choices:
        choice.freeze("it is read together with the parts that it is packed with")
    return Units(dim.size, "it is packed")


def regroup(walk: Walk, value: ir.Value, sizes: Sequence[int], marked: Collection[int] = ()) -> list[Dim]:
    """The axes of a value after a reshape to `sizes`. An axis in `marked` will be indexed: its places may differ."""
    dims = walk.axes(value)
    made: list[Dim] = []
    for ours, theirs in matching_groups([dim.size for dim in dims], sizes):
        old = [dims[axis] for axis in ours]
        if len(old) == len(theirs) == 1:
            made.append(old[0])
            continue
        whole = product_of([_plain(dim) for dim in old])
        new = [sizes[axis] for axis in theirs]
        leading = next((at for at, size in enumerate(new) if size != 1), None)
        if leading is not None and theirs[leading] in marked and len(new) - leading > 1:
            made += _unpacked(whole, new, leading)
        else:
            parts = [Units(size) for size in new]
            if new:
                tie(whole, product_of(parts))
            made += parts
    return made


def _unpacked(whole: Units, sizes: Sequence[int], leading: int) -> list[Dim]:
    """Each place along the leading axis has units of its own."""
    places, rest = sizes[leading], sizes[leading + 1 :]
    index = Units(places, "its places are read one by one")
    rows = [[Units(size) for size in rest] for _ in range(places)]
    for row, stretch in zip(rows, cut(whole, [whole.size // places] * places), strict=True):
        tie(stretch, product_of(row))
    varying = [Varying(index, tuple(column)) for column in zip(*rows, strict=True)]
    return [*(Units(1) for _ in range(leading)), index, *varying]


def _sizes_read(walk: Walk, node: ir.Node) -> list[tuple[ir.Value, int]] | None:
    """The axes, each of some value, whose sizes a node answers with; None for one that does something else."""
    if node.op_type == "Shape":
        value = _first(node)
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        return [(value, axis) for axis in range(len(walk.shape(value)))[start:end]]
    if node.op_type == "Size":
        return [(_first(node), axis) for axis in range(len(walk.shape(_first(node))))]
    before = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
    if before is None or before.op_type != "Shape" or node.inputs[1] is None or held(node.inputs[1]) is None:
        return None
    places = _sizes_read(walk, before) or []
    return [places[number] for number in walk.numbers(node.inputs[1]) or []]


def matching_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a shape became which of another: the shortest stretches with equal products, in order.

    Raises ValueError for empty tensors, which have no such stretches.
    """
    if 0 in (*old, *new):
        raise ValueError(f"an empty tensor: {list(old)} to {list(new)}")
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        ours, theirs = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(ours), j + len(theirs)
        left = old[ours[0]] if ours else 1
        right = new[theirs[0]] if theirs else 1
        while left != right:
            if left < right:
                left, ours, i = left * old[i], [*ours, i], i + 1
            else:
                right, theirs, j = right * new[j], [*theirs, j], j + 1
        groups.append((ours, theirs))
    return groups


def _indexed_axes(walk: Walk) -> dict[ir.Value, set[int]]:
    """Axes of reshaped values whose places are taken one by one later on."""
    found: dict[ir.Value, set[int]] = {}
    for node in walk.model.graph:
        if node.op_type not in ("Gather", "Slice", "Split") or node.inputs[0] is None:
            continue
        for axis in _axes_read(walk, node):
            place = _origin(walk, node.inputs[0], axis)
            if place is not None:
                found.setdefault(place[0], set()).add(place[1])
    return found


def _axes_read(walk: Walk, node: ir.Node) -> list[int]:
    value = node.inputs[0]
    if value is None or named(value) not in walk.trace.shapes:
        return []
    if node.op_type == "Slice":
        axes = [axis for axis, *_ in cuts(walk, node) or []]
    else:
        axes = [node.attributes["axis"].as_int() if "axis" in node.attributes else 0]
    return [axis % len(walk.shape(value)) for axis in axes]


def _origin(walk: Walk, value: ir.Value, axis: int) -> tuple[ir.Value, int] | None:
    """The reshaped value and its axis from which an axis comes, through operators that only move axes."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type == "Reshape":
            return node.outputs[0], axis
        step = _MOVES.get(node.op_type)
        before = None if step is None else step(walk, node, axis)
        if before is None:
            return None
        axis, node = before, node.inputs[0].producer()
    return None


def _before_transpose(walk: Walk, node: ir.Node, axis: int) -> int:
    return permutation(walk, node)[axis]


def _before_squeeze(walk: Walk, node: ir.Node, axis: int) -> int | None:
    gone = squeezed(walk, node)
    return [at for at in range(len(walk.shape(_first(node)))) if at not in gone][axis]


def _before_unsqueeze(walk: Walk, node: ir.Node, axis: int) -> int | None:
    added = unsqueezed(walk, node)
    kept = [at for at in range(len(walk.shape(node.outputs[0]))) if at not in added]
    return kept.index(axis) if axis in kept else None


_MOVES: dict[str, Callable[[Walk, ir.Node, int], int | None]] = {
    "Transpose": _before_transpose,
    "Squeeze": _before_squeeze,
    "Unsqueeze": _before_unsqueeze,
    "Identity": lambda walk, node, axis: axis,
}


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # operators have their data
    return value


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of an operator that branches or loops."""
    attributes = node.attributes.values()
    return [attribute.as_graph() for attribute in attributes if attribute.type == ir.AttributeType.GRAPH]


def permutation(walk: Walk, node: ir.Node) -> list[int]:
    """For each axis of a Transpose's output, the input's."""
    given = node.attributes.get("perm")
    rank = len(walk.shape(_first(node)))
    return list(given.as_ints()) if given is not None else list(range(rank))[::-1]


def squeezed(walk: Walk, node: ir.Node) -> set[int]:
    """The axes that a Squeeze drops."""
    shape = walk.shape(_first(node))
    given = axes_of(walk, node, 1)
    return {axis % len(shape) for axis in given} if given else {axis for axis, size in enumerate(shape) if size == 1}


def unsqueezed(walk: Walk, node: ir.Node) -> set[int]:
    """The axes of its output that an Unsqueeze adds."""
    rank = len(walk.shape(node.outputs[0]))
    return {axis % rank for axis in axes_of(walk, node, 1) or []}


def axes_of(walk: Walk, node: ir.Node, position: int) -> list[int] | None:
    """The axes that a node names, as an attribute or as its input number `position`; None where it names none."""
    return _listed(walk, node, "axes", position)


def cuts(walk: Walk, node: ir.Node) -> list[tuple[int, int, int, int]] | None:
    """What a Slice takes: axis, start, end and step of each axis that it cuts; None where it is not known."""
    starts, ends, axes, steps = (
        _listed(walk, node, name, at) for at, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    if starts is None or ends is None:
        return None
    return list(zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True))


def _listed(walk: Walk, node: ir.Node, name: str, position: int) -> list[int] | None:
    """Whole numbers that older operators have as an attribute, and newer ones as an input."""
    if name in node.attributes:
        return list(node.attributes[name].as_ints())
    return walk.numbers(node.inputs[position]) if len(node.inputs) > position else None
