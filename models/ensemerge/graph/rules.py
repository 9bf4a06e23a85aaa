"""One rule per operator: which axes of what it reads and writes consist of the same units.

A rule ties axes, sets those of the outputs, and freezes what the operator makes depend on the order of units. The
shapes and the meaning of inputs are those of the ONNX specification, up to opset 24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import onnx_ir as ir

from ensemerge.graph.units import Units, cut, product_of, sum_of, tie
from ensemerge.graph.walk import (
    Copies,
    Dim,
    Varying,
    Walk,
    axes_of,
    cuts,
    permutation,
    regroup,
    squeezed,
    subgraphs,
    unsqueezed,
)

Rule = Callable[[Walk, ir.Node], None]
INPUT_ORDER = "the operator depends on the order along it"


def apply_rule(walk: Walk, node: ir.Node) -> None:
    """What a node says of its axes. An operator without a rule freezes all that it reads and writes."""
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None or not all(walk.knows(value) for value in node.inputs if value is not None):
        _refuse(walk, node)
        return
    try:
        rule(walk, node)
    except ValueError:  # axes meet that cannot: an operator used in a way that its rule does not know
        _refuse(walk, node)
        return
    for value in node.outputs:
        if value.name in walk.trace.shapes and not _is_explained(walk, value):
            _refuse(walk, node)


def _is_explained(walk: Walk, value: ir.Value) -> bool:
    """Whether the rule has said of what the axes of an output consist, or nobody wants to know."""
    if value not in walk.dims:
        return not value.uses() and not value.is_graph_output()
    return [dim.size for dim in walk.axes(value)] == list(walk.shape(value))


def _refuse(walk: Walk, node: ir.Node) -> None:
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    walk.without_rule[name] = walk.without_rule.get(name, 0) + 1
    _freeze_all(walk, node, f"there is no rule for {name} here")


def _freeze_all(walk: Walk, node: ir.Node, reason: str) -> None:
    inner = [value for graph in subgraphs(node) for step in graph.all_nodes() for value in step.inputs]
    for value in (*node.inputs, *inner):
        if value is not None and (value in walk.dims or value.is_initializer()):
            walk.freeze(value, reason)
    for value in node.outputs:
        if value.name in walk.trace.shapes:
            walk.set(value, walk.fresh(value, reason))


def _data(node: ir.Node, position: int = 0) -> ir.Value:
    value = node.inputs[position]
    assert value is not None  # the specification demands it
    return value


def _optional(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


# Element by element.


def _same(walk: Walk, node: ir.Node) -> None:
    """The output has the axes of the first input."""
    walk.set(node.outputs[0], walk.axes(_data(node)))


def _elementwise(walk: Walk, node: ir.Node) -> None:
    """Axes that are not broadcast are the same."""
    given = [walk.axes(value) for value in node.inputs if value is not None]
    walk.set(node.outputs[0], _broadcast(given))


def _broadcast(given: Sequence[Sequence[Dim]]) -> list[Dim]:
    columns = list(zip_longest(*(reversed(dims) for dims in given)))[::-1]
    return [_meet([dim for dim in column if dim is not None and dim.size != 1]) for column in columns]


def _meet(dims: Sequence[Dim]) -> Dim:
    if not dims:
        return Units(1)
    if len(dims) == 1:
        return dims[0]
    if all(isinstance(dim, Varying) for dim in dims):
        return _meet_varying([dim for dim in dims if isinstance(dim, Varying)])
    plain = [_units(dim) for dim in dims]
    for unit in plain[1:]:
        tie(plain[0], unit)
    return plain[0]


def _meet_varying(dims: Sequence[Varying]) -> Varying:
    for other in dims[1:]:
        tie(dims[0].index, other.index)
        for ours, theirs in zip(dims[0].choices, other.choices, strict=True):
            tie(ours, theirs)
    return dims[0]


def _units(dim: Dim) -> Units:
    if isinstance(dim, Units):
        return dim
    for choice in dim.choices:
        choice.freeze("it meets a part that it is packed with")
    return Units(dim.size, "it is packed")


def _positions(walk: Walk, node: ir.Node) -> None:
    """Sine and cosine of what depends on no data are tables of positions: each column has a frequency of its own."""
    if not _depends_on_data(_data(node)):
        walk.freeze(_data(node), "it is a table of positions: rotary pairs are locked")
    _same(walk, node)


def _depends_on_data(value: ir.Value) -> bool:
    """Whether floats that are given, or looked up by whole numbers that are, go into a value."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if one in seen or one.is_initializer():
            continue
        seen.add(one)
        if node is None:
            if one.dtype is None or one.dtype.is_floating_point():
                return True
        elif node.op_type not in ("Shape", "Size", "Constant"):
            if node.op_type == "Gather" and one.dtype is not None and one.dtype.is_floating_point():
                return True
            waiting += [before for before in node.inputs if before is not None]
    return False


# Sums over an axis.


def _matmul(walk: Walk, node: ir.Node) -> None:
    """The last axis of the first meets the last but one of the second."""
    left, right = _data(node), _data(node, 1)
    walk.probe(left, right)
    ours, theirs = walk.units(left), walk.units(right)
    if not ours or not theirs:
        return
    tie(ours[-1], theirs[-2] if len(theirs) > 1 else theirs[-1])
    walk.summed |= {(left, len(ours) - 1), (right, max(len(theirs) - 2, 0))}
    batch = _broadcast([ours[:-2], theirs[:-2]])
    walk.mix(ours, {len(ours) - 1})
    walk.mix(theirs, {max(len(theirs) - 2, 0)})
    walk.meet([*(_units(dim) for dim in batch), ours[-1]])
    rows = ours[-2:-1]
    columns = theirs[-1:] if len(theirs) > 1 else []
    walk.set(node.outputs[0], [*batch, *rows, *columns])


def _gemm(walk: Walk, node: ir.Node) -> None:
    left, right = _data(node), _data(node, 1)
    walk.probe(left, right)
    ours, theirs = walk.units(left), walk.units(right)
    ours = ours[::-1] if _int(node, "transA", 0) else ours
    theirs = theirs[::-1] if _int(node, "transB", 0) else theirs
    tie(ours[1], theirs[0])
    walk.summed |= {(left, 1 - _int(node, "transA", 0)), (right, _int(node, "transB", 0))}
    for summed in (ours[:1], ours[1:], theirs[1:]):
        walk.meet(summed)
    made = [ours[0], theirs[1]]
    bias = _optional(node, 2)
    walk.set(node.outputs[0], made if bias is None else _broadcast([made, walk.axes(bias)]))


def _conv(walk: Walk, node: ir.Node) -> None:
    """The weight is `(out, in / groups, …)`; out and in are groups × channels of a group."""
    data, weight = _data(node), _data(node, 1)
    walk.probe(data)
    image, kernel = walk.units(data), walk.units(weight)
    _freeze(kernel[2:], "it is a place in a kernel")
    _freeze(image[2:], "it is a place in an image")
    walk.summed.add((weight, 1))
    group, inner = Units(_int(node, "group", 1)), Units(kernel[0].size // _int(node, "group", 1))
    tie(image[1], product_of([group, kernel[1]]))
    tie(kernel[0], product_of([group, inner]))
    _meet_channels(walk, group, image[1], kernel[0])
    _finish_conv(walk, node, image[0], kernel[0])


def _conv_transpose(walk: Walk, node: ir.Node) -> None:
    """The weight is `(in, out / groups, …)`."""
    data, weight = _data(node), _data(node, 1)
    walk.probe(data)
    image, kernel = walk.units(data), walk.units(weight)
    _freeze(kernel[2:], "it is a place in a kernel")
    _freeze(image[2:], "it is a place in an image")
    walk.summed.add((weight, 0))
    group, inner = Units(_int(node, "group", 1)), Units(kernel[0].size // _int(node, "group", 1))
    tie(image[1], kernel[0])
    tie(kernel[0], product_of([group, inner]))
    out = product_of([group, kernel[1]])
    _meet_channels(walk, group, image[1], out)
    _finish_conv(walk, node, image[0], out)


def _meet_channels(walk: Walk, group: Units, into: Units, out: Units) -> None:
    """Channels are summed over all places, and those of a group for each channel that comes out of it."""
    for units in (group, into, out):
        walk.meet([units])


def _finish_conv(walk: Walk, node: ir.Node, batch: Units, out: Units) -> None:
    bias = _optional(node, 2)
    if bias is not None:
        tie(walk.units(bias)[0], out)
    places = [Units(size, "it is a place in an image") for size in walk.shape(node.outputs[0])[2:]]
    walk.set(node.outputs[0], [batch, out, *places])


def _einsum(walk: Walk, node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "." in equation or "->" not in equation:
        _freeze_all(walk, node, "Einsum has no rule for this equation")
        return
    terms, result = equation.split("->")
    given = [(value, term) for value, term in zip(node.inputs, terms.split(","), strict=True) if value is not None]
    letters: dict[str, Units] = {}
    for value, term in given:
        for letter, unit in zip(term, walk.units(value), strict=True):
            tie(letters.setdefault(letter, unit), unit)
    walk.probe(*(value for value, _ in given))
    walk.summed |= {(value, axis) for value, term in given for axis, letter in enumerate(term) if letter not in result}
    _meet_letters(walk, letters, [term for _, term in given], result)
    walk.set(node.outputs[0], [letters[letter] for letter in result])


def _meet_letters(walk: Walk, letters: Mapping[str, Units], terms: Sequence[str], result: str) -> None:
    """What is kept is beside what is summed; what is summed is the same in all terms, beside what these share."""
    for term in terms:
        walk.meet([letters[letter] for letter in term if letter in result])
    for summed in sorted(letters.keys() - set(result)):
        shared = set.intersection(*(set(term) for term in terms if summed in term))
        walk.meet([letters[letter] for letter in sorted(shared)])


def _freeze(units: Sequence[Units], reason: str) -> None:
    for unit in units:
        unit.freeze(reason)


# Normalisation.


def _batch_norm(walk: Walk, node: ir.Node) -> None:
    dims = walk.axes(_data(node))
    channels = _units(dims[1])
    for value in node.inputs[1:]:
        assert value is not None
        tie(channels, walk.units(value)[0])
    walk.set(node.outputs[0], [dims[0], channels, *dims[2:]])


def _instance_norm(walk: Walk, node: ir.Node) -> None:
    units = walk.units(_data(node))
    for value in node.inputs[1:3]:
        assert value is not None
        tie(units[1], walk.units(value)[0])
    walk.meet(units[:2])
    walk.set(node.outputs[0], units)


def _group_norm(walk: Walk, node: ir.Node) -> None:
    """Scale and bias are one number per channel, or before opset 21 per group."""
    units = walk.units(_data(node))
    groups = Units(_int(node, "num_groups", 1))
    tie(units[1], product_of([groups, Units(units[1].size // groups.size)]))
    for value in node.inputs[1:3]:
        assert value is not None
        scale = walk.units(value)[0]
        tie(scale, units[1] if scale.size == units[1].size else groups)
    walk.meet([units[0], groups])
    walk.set(node.outputs[0], units)


def _layer_norm(walk: Walk, node: ir.Node) -> None:
    """Mean and deviation over the axes from `axis` on, which the order of units does not change."""
    units = walk.units(_data(node))
    first = _int(node, "axis", -1) % len(units)
    made = _broadcast([units, *(walk.axes(value) for value in node.inputs[1:3] if value is not None)])
    walk.meet(units[:first])
    walk.set(node.outputs[0], made)
    for value in node.outputs[1:]:
        walk.set(value, [*units[:first], *(Units(1) for _ in units[first:])])


def _along(walk: Walk, node: ir.Node) -> None:
    """Something over one axis that the order of its units does not change, and that keeps the axis."""
    units = walk.units(_data(node))
    axis = _int(node, "axis", -1) % len(units)
    walk.mix(units, {axis})
    walk.set(node.outputs[0], units)


def _reduce(walk: Walk, node: ir.Node) -> None:
    units = walk.units(_data(node))
    given = axes_of(walk, node, 1)
    if not given and _int(node, "noop_with_empty_axes", 0):
        walk.set(node.outputs[0], units)
        return
    gone = {axis % len(units) for axis in given} if given else set(range(len(units)))
    kept = _int(node, "keepdims", 1)
    made = [Units(1) if at in gone else unit for at, unit in enumerate(units) if kept or at not in gone]
    walk.set(node.outputs[0], made)


def _first_of(walk: Walk, node: ir.Node) -> None:
    """ArgMax and ArgMin answer with a place."""
    units = walk.units(_data(node))
    axis = _int(node, "axis", 0) % len(units)
    units[axis].freeze(INPUT_ORDER)
    kept = _int(node, "keepdims", 1)
    walk.set(node.outputs[0], [Units(1) if at == axis else u for at, u in enumerate(units) if kept or at != axis])


def _ordered(walk: Walk, node: ir.Node) -> None:
    """CumSum."""
    units = walk.units(_data(node))
    axes = {axis % len(units) for axis in walk.numbers(_data(node, 1)) or range(len(units))}
    _freeze([units[axis] for axis in axes], INPUT_ORDER)
    walk.mix(units, axes)
    walk.set(node.outputs[0], units)


def _spatial(walk: Walk, node: ir.Node) -> None:
    """Channels are kept, places in the image are not."""
    units = walk.units(_data(node))
    _freeze(units[2:], "it is a place in an image")
    sizes = walk.shape(node.outputs[0])
    places = [Units(size, "it is a place in an image") for size in sizes[2:]]
    if sizes[1] != units[1].size:
        units[1].freeze(INPUT_ORDER)
        units[1] = Units(sizes[1], INPUT_ORDER)
    walk.mix(units, range(2, len(units)))
    for value in node.inputs[1:]:
        if value is not None:
            walk.freeze(value, "it is a size")
    walk.set(node.outputs[0], [units[0], units[1], *places])


def _across_channels(walk: Walk, node: ir.Node) -> None:
    """LRN: channels that are neighbours go into one number."""
    units = walk.units(_data(node))
    units[1].freeze(INPUT_ORDER)
    walk.mix(units, {1})
    walk.set(node.outputs[0], units)


# Other shapes.


def _reshape(walk: Walk, node: ir.Node) -> None:
    made = node.outputs[0]
    walk.set(made, regroup(walk, _data(node), walk.shape(made), walk.indexed.get(made, ())))


def _transpose(walk: Walk, node: ir.Node) -> None:
    dims = walk.axes(_data(node))
    walk.set(node.outputs[0], [dims[axis] for axis in permutation(walk, node)])


def _squeeze(walk: Walk, node: ir.Node) -> None:
    gone = squeezed(walk, node)
    walk.set(node.outputs[0], [dim for axis, dim in enumerate(walk.axes(_data(node))) if axis not in gone])


def _unsqueeze(walk: Walk, node: ir.Node) -> None:
    dims = iter(walk.axes(_data(node)))
    added = unsqueezed(walk, node)
    rank = len(walk.shape(node.outputs[0]))
    walk.set(node.outputs[0], [Units(1) if axis in added else next(dims) for axis in range(rank)])


def _expand(walk: Walk, node: ir.Node) -> None:
    """Copies along an axis may change places as they like."""
    dims = walk.axes(_data(node))
    sizes = walk.shape(node.outputs[0])
    dims = [*(Units(1) for _ in range(len(sizes) - len(dims))), *dims]
    made = [dim if dim.size == size else Copies(size) for dim, size in zip(dims, sizes, strict=True)]
    walk.set(node.outputs[0], made)


def _tile(walk: Walk, node: ir.Node) -> None:
    units, sizes = walk.units(_data(node)), walk.shape(node.outputs[0])
    made = [
        unit if unit.size == size else product_of([Units(size // unit.size), unit])
        for unit, size in zip(units, sizes, strict=True)
    ]
    walk.set(node.outputs[0], made)


def _constant_shape(walk: Walk, node: ir.Node) -> None:
    """All elements are equal."""
    walk.set(node.outputs[0], [Copies(size) for size in walk.shape(node.outputs[0])])


def _shape(walk: Walk, node: ir.Node) -> None:
    """Sizes and counters do not depend on any order, and have one of their own."""
    for value in node.outputs:
        walk.set(value, walk.fresh(value, "it counts"))


def _concat(walk: Walk, node: ir.Node) -> None:
    given = [walk.units(value) for value in node.inputs if value is not None]
    axis = _int(node, "axis", 0) % len(given[0])
    made: list[Units] = []
    for at, column in enumerate(zip(*given, strict=True)):
        made.append(sum_of(column) if at == axis else _units(_meet([unit for unit in column if unit.size != 1])))
    walk.set(node.outputs[0], made)


def _split(walk: Walk, node: ir.Node) -> None:
    axis = _int(node, "axis", 0) % len(walk.axes(_data(node)))
    sizes = [walk.shape(value)[axis] for value in node.outputs]
    start = 0
    for value, size in zip(node.outputs, sizes, strict=True):
        walk.set(value, _sliced(walk.axes(_data(node)), axis, start, start + size))
        start += size


def _slice(walk: Walk, node: ir.Node) -> None:
    data, known = _data(node), cuts(walk, node)
    if known is None:
        _freeze_all(walk, node, "it is cut at places that are computed")
        return
    varies = not all(walk.is_settled(value) for value in node.inputs[1:] if value is not None)
    dims, shape = walk.axes(data), walk.shape(data)
    for axis, *given in known:
        first, last, stride = slice(*given).indices(shape[axis])
        if varies:
            _units(dims[axis]).freeze("it is cut at places that depend on the input")
        if stride == 1:
            dims = _sliced(dims, axis % len(shape), first, max(first, last))
        else:
            _units(dims[axis]).freeze("it is cut with steps")
            walk.mix([_units(dim) for dim in dims], {axis % len(shape)})
            dims[axis] = Units(len(range(first, last, stride)), "it is cut with steps")
    walk.set(node.outputs[0], dims)


def _sliced(dims: Sequence[Dim], axis: int, start: int, stop: int) -> list[Dim]:
    """The axes after a stretch of one was taken."""
    whole = dims[axis]
    if (start, stop) == (0, whole.size):
        return list(dims)
    if stop - start == 1 and any(isinstance(dim, Varying) and dim.index is whole for dim in dims):
        return [Units(1) if at == axis else _chosen(dim, whole, start) for at, dim in enumerate(dims)]
    units = _units(whole)
    parts = cut(units, [start, stop - start, units.size - stop]) if stop > start else [Units(0)] * 2
    return [parts[1] if at == axis else dim for at, dim in enumerate(dims)]


def _chosen(dim: Dim, index: Dim, place: int) -> Dim:
    return dim.choices[place] if isinstance(dim, Varying) and dim.index is index else dim


def _gather(walk: Walk, node: ir.Node) -> None:
    """A constant place is a slice; rows that data choose stay in place."""
    data, indices = _data(node), _data(node, 1)
    dims = walk.axes(data)
    axis = _int(node, "axis", 0) % len(dims)
    places = walk.numbers(indices) if walk.is_settled(indices) else None
    if places is not None and len(places) == 1:
        place = places[0] % dims[axis].size
        dims = _sliced(dims, axis, place, place + 1)
    else:
        plain = [_units(dim) for dim in dims]
        plain[axis].freeze("its rows are looked up by number")
        walk.mix(plain, {axis})
        dims = [*plain]
    chosen = walk.units(indices)
    walk.set(node.outputs[0], [*dims[:axis], *chosen, *dims[axis + 1 :]])


def _pad(walk: Walk, node: ir.Node) -> None:
    """What is added is one number: its units may change places."""
    units, sizes = walk.units(_data(node)), walk.shape(node.outputs[0])
    pads = _pads(walk, node, len(units))
    constant = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    added = constant and all(walk.is_settled(value) for value in node.inputs[1:2] if value is not None)
    moved = {axis for axis, (before, after) in pads.items() if before or after}
    made = list(units)
    for axis in moved:
        before, after = pads[axis]
        if added and min(before, after) >= 0:
            made[axis] = sum_of([Units(before), units[axis], Units(after)])
        else:
            units[axis].freeze(INPUT_ORDER)
            walk.mix(units, {axis})
            made[axis] = Units(sizes[axis], INPUT_ORDER)
    walk.set(node.outputs[0], made)


def _pads(walk: Walk, node: ir.Node, rank: int) -> dict[int, tuple[int, int]]:
    """How much is added before and after each axis. Raises ValueError where it is not known."""
    pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else walk.numbers(_data(node, 1))
    axes = walk.numbers(_optional(node, 3)) or list(range(rank))
    if pads is None or len(pads) != 2 * len(axes):
        raise ValueError(f"expected twice {len(axes)} pads")
    ends = zip(pads[: len(axes)], pads[len(axes) :], strict=True)
    return {axis % rank: both for axis, both in zip(axes, ends, strict=True)}


def _depth_to_space(walk: Walk, node: ir.Node) -> None:
    units, sizes = walk.units(_data(node)), walk.shape(node.outputs[0])
    _freeze(units[2:], "it is a place in an image")
    walk.mix(units, {2, 3})
    channels = Units(sizes[1])
    square = Units(units[1].size // sizes[1], "it is a place in an image")
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "DCR"
    tie(units[1], product_of([square, channels] if mode == "DCR" else [channels, square]))
    places = [Units(size, "it is a place in an image") for size in sizes[2:]]
    walk.set(node.outputs[0], [units[0], channels, *places])


def _space_to_depth(walk: Walk, node: ir.Node) -> None:
    units, sizes = walk.units(_data(node)), walk.shape(node.outputs[0])
    _freeze(units[2:], "it is a place in an image")
    walk.mix(units, {2, 3})
    square = Units(sizes[1] // units[1].size, "it is a place in an image")
    places = [Units(size, "it is a place in an image") for size in sizes[2:]]
    walk.set(node.outputs[0], [units[0], product_of([square, units[1]]), *places])


# Layers that are one operator.


def _recurrent(gates: int) -> Rule:
    """GRU, LSTM, RNN: weights `(directions, gates × hidden, …)`, whose hidden units have one order per direction."""

    def rule(walk: Walk, node: ir.Node) -> None:
        data, weight, recurrence = (_data(node, at) for at in range(3))
        walk.probe(data)
        image, into, back = (walk.units(value) for value in (data, weight, recurrence))
        hidden = back[2]
        tie(image[-1], into[2])
        walk.summed |= {(weight, 2), (recurrence, 2)}
        directions = into[0]
        tie(directions, back[0])
        directions.freeze("it counts directions")
        for rows in (into[1], back[1]):
            tie(rows, _gates(gates, hidden))
        first = _int(node, "layout", 0)
        time, batch = (image[1], image[0]) if first else (image[0], image[1])
        time.freeze("it is time")
        state = [batch, directions, hidden] if first else [directions, batch, hidden]
        bias, peephole = [directions, _gates(2 * gates, hidden)], [directions, _gates(3, hidden)]
        _tie_given(walk, node, {3: bias, 4: [batch], 5: state, 6: state, 7: peephole})
        whole = [batch, time, directions, hidden] if first else [time, directions, batch, hidden]
        for value, dims in zip(node.outputs, (whole, state, state), strict=False):
            walk.set(value, dims)

    return rule


def _gates(count: int, hidden: Units) -> Units:
    return product_of([Units(count, "it counts gates"), hidden])


def _tie_given(walk: Walk, node: ir.Node, expected: Mapping[int, Sequence[Units]]) -> None:
    """Tie the axes of those inputs that a node has, by position."""
    for position, dims in expected.items():
        value = _optional(node, position)
        if value is not None:
            for ours, theirs in zip(walk.units(value), dims, strict=True):
                tie(ours, theirs)


def _attention(walk: Walk, node: ir.Node) -> None:
    """Queries and keys share the units of a head; query heads come in groups, one per key and value head."""
    given = [_data(node, at) for at in range(3)]
    walk.probe(*given)
    heads = [_int(node, name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    query, keys, values = (_by_head(walk, one, count) for one, count in zip(given, heads, strict=True))
    keys, values = _after_cached(walk, node, 4, keys), _after_cached(walk, node, 5, values)
    each = Units(query[1].size // keys[1].size)
    for one, other in ((query[0], keys[0]), (query[3], keys[3]), *zip(keys[:3], values[:3], strict=True)):
        tie(one, other)
    tie(query[1], product_of([keys[1], each]))
    for units in (each, query[2], keys[2], keys[3], values[3]):
        walk.meet([keys[1], units])
    scores = [*query[:3], keys[2]]
    _mask_scores(walk, node, scores)
    made = [*query[:3], values[3]]
    packed = [made[0], made[2], product_of([made[1], made[3]])]
    answers = [made if len(walk.shape(given[0])) == 4 else packed, keys, values, scores]
    for value, dims in zip(node.outputs, answers, strict=False):
        walk.set(value, dims)


def _by_head(walk: Walk, value: ir.Value, heads: int) -> list[Units]:
    """`(rows, heads, tokens, units)`, of which the heads and their units may be packed into the last axis."""
    axes = walk.units(value)
    if len(axes) == 4:
        return axes
    rows, tokens, packed = axes
    count, units = Units(heads), Units(packed.size // heads)
    tie(packed, product_of([count, units]))
    return [rows, count, tokens, units]


def _after_cached(walk: Walk, node: ir.Node, position: int, made: Sequence[Units]) -> list[Units]:
    """Keys or values with those of earlier tokens before them."""
    cache = _optional(node, position)
    if cache is None:
        return [*made]
    before = walk.units(cache)
    for axis in (0, 1, 3):
        tie(before[axis], made[axis])
    return [*made[:2], sum_of([before[2], made[2]]), made[3]]


def _mask_scores(walk: Walk, node: ir.Node, scores: Sequence[Units]) -> None:
    """A mask has the last axes of the scores `(rows, heads, tokens, tokens)`, or 1; others know tokens by number."""
    mask, lengths = _optional(node, 3), _optional(node, 6)
    axes = [] if mask is None else walk.units(mask)
    for ours, theirs in zip(reversed(axes), reversed(scores), strict=False):
        if ours.size == theirs.size:
            tie(ours, theirs)
        elif ours.size != 1:
            _freeze([ours, theirs], "its mask is shorter than it is")
    if lengths is not None or _int(node, "is_causal", 0):
        _freeze(scores[2:], "tokens attend to those before them")


def _rotary(walk: Walk, node: ir.Node) -> None:
    reason = "it is rotated by position: rotary pairs are locked"
    _freeze(_by_head(walk, _data(node), _int(node, "num_heads", 1))[2:], reason)
    for value in node.inputs[1:]:
        if value is not None:
            walk.freeze(value, reason)
    _same(walk, node)


def _constant(walk: Walk, node: ir.Node) -> None:
    """A weight like any other: its axes are made when somebody reads it."""
    walk.axes(node.outputs[0])


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cosh Dropout Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid "
    "Sign Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu CastLike"
)
_MANY = (
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "PRelu Pow Sub Sum Where Xor"
)
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
_SPATIAL = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool Resize Upsample"
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(_MANY.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(_SPATIAL.split(), _spatial),
    **dict.fromkeys(("Sin", "Cos"), _positions),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LpNormalization"), _along),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    **dict.fromkeys(("ArgMax", "ArgMin"), _first_of),
    **dict.fromkeys(("Shape", "Size", "Range"), _shape),
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _ordered,
    "DepthToSpace": _depth_to_space,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "GRU": _recurrent(3),
    "Gather": _gather,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _across_channels,
    "LSTM": _recurrent(4),
    "MatMul": _matmul,
    "Pad": _pad,
    "RNN": _recurrent(1),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
