"""Networks that part: one trunk, and behind it a head for each task.

Heads keep the order of units that they were trained with. Where the trunk's units lie in another order, a head reads
them through a Gather, which costs next to nothing and holds for any head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidModel
from ensemerge.graph.files import named
from ensemerge.graph.surgery import prefixed


@dataclass(frozen=True)
class Head:
    """The part of a network from one value to its outputs, and in which order it reads the units of that value.

    `orders` gives for each axis that is not as it was, for each unit of the head the number of the trunk's.
    """

    name: str
    model: ir.Model
    orders: Mapping[int, np.ndarray] = field(default_factory=dict)


def head_of(model: ir.Model, value: str) -> ir.Model:
    """What a network computes from one of its values. Raises InvalidModel where it needs more than that value."""
    outputs = [named(output) for output in model.graph.outputs]
    try:
        graph = ir.convenience.extract(model.graph, [value], outputs)
    except ValueError as error:
        raise InvalidModel(
            f"the outputs {outputs} do not follow from '{value}' alone: {error}; expected a value through which all "
            "paths from the inputs to the outputs lead"
        ) from error
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def with_heads(trunk: ir.Model, heads: Sequence[Head]) -> ir.Model:
    """One network: the trunk, whose one output all heads read. Their outputs are called `head_output`."""
    whole = trunk.clone()
    (value,) = whole.graph.outputs
    whole.graph.outputs.clear()
    for head in heads:
        _attach(whole.graph, value, head)
    return whole


def _attach(graph: ir.Graph, value: ir.Value, head: Head) -> None:
    read = value
    for axis, order in sorted(head.orders.items()):
        read = _reordered(graph, read, f"{head.name}/order_{axis}", axis, order)
    own = prefixed(head.model, f"{head.name}/").graph
    (given,) = (one for one in own.inputs if not one.is_initializer())
    given.replace_all_uses_with(read)
    outputs, nodes, initializers = list(own.outputs), list(own), list(own.initializers.values())
    own.outputs.clear()
    own.remove(nodes)
    own.initializers.clear()
    graph.extend(nodes)
    for initializer in initializers:
        graph.initializers.add(initializer)
    for output, before in zip(outputs, head.model.graph.outputs, strict=True):
        output.name = f"{head.name}_{named(before)}"
        graph.outputs.append(output)


def _reordered(graph: ir.Graph, value: ir.Value, name: str, axis: int, order: np.ndarray) -> ir.Value:
    index = ir.Value(name=f"{name}/index", const_value=ir.tensor(order.astype(np.int64), name=f"{name}/index"))
    graph.initializers.add(index)
    node = ir.node("Gather", [value, index], {"axis": axis}, name=name)
    node.outputs[0].name = f"{name}/value"
    graph.append(node)
    return node.outputs[0]
