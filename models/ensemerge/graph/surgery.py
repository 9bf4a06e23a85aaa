"""Cut and change graphs. Every function leaves its input as it was and returns a new model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidModel, StructureMismatch

Weights = Mapping[str, np.ndarray]


def with_weights(model: ir.Model, weights: Weights) -> ir.Model:
    """The same graph with some of its initializers replaced, by name. Raises StructureMismatch."""
    changed = model.clone()
    for name, array in weights.items():
        value = changed.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise StructureMismatch(f"the graph has no weight '{name}' to replace")
        old = value.const_value
        if tuple(old.shape) != array.shape or old.dtype.numpy() != array.dtype:
            raise StructureMismatch(
                f"weight '{name}': expected {old.dtype} {list(old.shape)}, got {array.dtype} {list(array.shape)}"
            )
        # Not ascontiguousarray, which gives a scalar an axis.
        value.const_value = ir.tensor(np.asarray(array, order="C"), name=name)
    return changed


def up_to(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """The part of the network that computes the named values, which become its outputs. Raises InvalidModel."""
    inputs = [value.name for value in model.graph.inputs if value.name]
    try:
        graph = ir.convenience.extract(model.graph, inputs, list(outputs))
    except ValueError as error:
        raise InvalidModel(f"cannot cut the graph at {list(outputs)}: {error}") from error
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def prefixed(model: ir.Model, prefix: str) -> ir.Model:
    """The same network with `prefix` before the name of every node and value, inputs and outputs included."""
    renamed = model.clone()
    for value in _values(renamed.graph):
        if value.name:
            value.name = prefix + value.name
    for node in renamed.graph.all_nodes():
        node.name = prefix + (node.name or node.op_type)
    return renamed


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every value that a graph and its subgraphs define, once."""
    scopes = [graph, *_subgraphs(graph)]
    seen = {id(value): value for scope in scopes for value in (*scope.inputs, *scope.initializers.values())}
    seen |= {id(value): value for node in graph.all_nodes() for value in node.outputs}
    return seen.values()


def _subgraphs(graph: ir.Graph) -> list[ir.Graph]:
    attributes = [attribute for node in graph.all_nodes() for attribute in node.attributes.values()]
    single = [attribute.as_graph() for attribute in attributes if attribute.type == ir.AttributeType.GRAPH]
    several = [attribute.as_graphs() for attribute in attributes if attribute.type == ir.AttributeType.GRAPHS]
    return single + [subgraph for group in several for subgraph in group]
