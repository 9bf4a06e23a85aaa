"""Cut and change graphs. Every function leaves its input as it was and returns a new model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidModel, StructureMismatch

Weights = Mapping[str, np.ndarray]


def with_weights(model: ir.Model, weights: Weights) -> ir.Model:
    """The same graph with some of its weights replaced, by name: initializers and Constant nodes.

    Raises StructureMismatch.
    """
    changed = model.clone()
    constants = constant_nodes(changed)
    for name, array in weights.items():
        node = constants.get(name)
        value = changed.graph.initializers.get(name) if node is None else node.outputs[0]
        old = None if value is None else held(value)
        if value is None or old is None:
            raise StructureMismatch(f"the graph has no weight '{name}' to replace")
        if tuple(old.shape) != array.shape or old.dtype.numpy() != array.dtype:
            raise StructureMismatch(
                f"weight '{name}': expected {old.dtype} {list(old.shape)}, got {array.dtype} {list(array.shape)}"
            )
        # Not ascontiguousarray, which gives a scalar an axis.
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        if node is None:
            value.const_value = tensor
        else:
            node.attributes["value"] = ir.AttrTensor("value", tensor)
    return changed


def is_constant(node: ir.Node) -> bool:
    """Whether a node does nothing but hold a tensor."""
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx") and "value" in node.attributes


def constant_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes of the main graph that hold a tensor, by the names of their outputs."""
    return {node.outputs[0].name or "": node for node in model.graph if is_constant(node)}


def held_tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Every tensor that the main graph holds, by name: initializers, then Constant nodes."""
    constants = (node.outputs[0] for node in constant_nodes(model).values())
    found = {value.name or "": held(value) for value in (*model.graph.initializers.values(), *constants)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def held(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for what is computed."""
    node = value.producer()
    if node is not None and is_constant(node):
        return node.attributes["value"].as_tensor()
    return value.const_value if value.is_initializer() else None


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
