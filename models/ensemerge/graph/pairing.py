"""Which tensor of one graph corresponds to which tensor of another: told by structure, not by names.

Exporters rename weights (`val_12`) and keep some of them as Constant nodes; two exports of one architecture still have
the same operators, wired the same way, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ensemerge.errors import StructureMismatch
from ensemerge.graph.files import named
from ensemerge.graph.surgery import held, is_constant


def pair_weights(reference: ir.Model, other: ir.Model) -> dict[str, str]:
    """Map the name of every weight of `reference` to the name of its counterpart in `other`.

    A weight is an initializer, or a Constant node whose counterpart is an initializer or another number. Both graphs
    are walked side by side from their inputs. Raises StructureMismatch at the first place where operator, attributes,
    wiring, shape or dtype differ.
    """
    if reference.opset_imports != other.opset_imports:
        raise StructureMismatch(f"expected opsets {reference.opset_imports} in both graphs, got {other.opset_imports}")
    if reference.functions or other.functions:
        raise StructureMismatch("graphs with local functions cannot be paired; expected them inlined at export")
    pairs: dict[ir.Value, ir.Value] = {}
    _pair_all("graph inputs", _free_inputs(reference), _free_inputs(other), pairs)
    nodes, others = _operators(reference), _operators(other)
    if len(nodes) != len(others):
        raise StructureMismatch(f"expected graphs of one architecture, got {len(nodes)} and {len(others)} nodes")
    for node, its_other in zip(nodes, others, strict=True):
        _pair_nodes(node, its_other, pairs)
    _pair_all("graph outputs", list(reference.graph.outputs), list(other.graph.outputs), pairs)
    return {named(weight): named(pairs[weight]) for weight in _weights(reference) if _is_weight(weight, pairs)}


def _weights(model: ir.Model) -> list[ir.Value]:
    constants = [node.outputs[0] for node in model.graph if is_constant(node)]
    return [*model.graph.initializers.values(), *constants]


def _is_weight(value: ir.Value, pairs: Mapping[ir.Value, ir.Value]) -> bool:
    other = pairs.get(value)
    if other is None:
        return False
    ours, theirs = held(value), held(other)
    if ours is None or theirs is None or value.is_initializer() or other.is_initializer():
        return True
    return ours.tobytes() != theirs.tobytes()


def _free_inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _operators(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if not is_constant(node)]


def _pair_nodes(node: ir.Node, other: ir.Node, pairs: dict[ir.Value, ir.Value]) -> None:
    where = f"node '{node.name}'"
    if node.op_identifier() != other.op_identifier():
        raise StructureMismatch(f"{where}: expected {node.op_type}, got {other.op_type} ('{other.name}')")
    ours, theirs = _attributes(node), _attributes(other)
    if ours != theirs:
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise StructureMismatch(f"{where} ({node.op_type}): attributes differ: {', '.join(differing)}")
    _pair_all(where, list(node.inputs), list(other.inputs), pairs)
    _pair_all(where, list(node.outputs), list(other.outputs), pairs)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: _comparable(attribute) for name, attribute in node.attributes.items()}


def _comparable(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return str(tensor.dtype), tuple(tensor.shape), tensor.tobytes()
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise StructureMismatch("graphs with control flow cannot be paired; expected plain operators")
    return attribute.value


def _pair_all(
    where: str, ours: list[ir.Value | None] | list[ir.Value], theirs: list[Any], pairs: dict[ir.Value, ir.Value]
) -> None:
    if len(ours) != len(theirs):
        raise StructureMismatch(f"{where}: expected {len(ours)} values, got {len(theirs)}")
    for our, their in zip(ours, theirs, strict=True):
        if our is None or their is None:
            if our is not their:
                raise StructureMismatch(f"{where}: an optional input is given in one graph only")
            continue
        known = pairs.setdefault(our, their)
        if known is not their:
            raise StructureMismatch(f"{where}: '{our.name}' meets '{their.name}' here and '{known.name}' elsewhere")
        _same_weight(where, our, their)


def _same_weight(where: str, our: ir.Value, their: ir.Value) -> None:
    ours, theirs = held(our), held(their)
    if (ours is None) != (theirs is None):
        raise StructureMismatch(f"{where}: '{our.name}' is a weight in one graph only")
    if ours is None or theirs is None:
        return
    if ours.dtype != theirs.dtype or list(ours.shape) != list(theirs.shape):
        raise StructureMismatch(
            f"{where}: weight '{our.name}' is {ours.dtype} {list(ours.shape)}, "
            f"its counterpart '{their.name}' {theirs.dtype} {list(theirs.shape)}"
        )
    if np.issubdtype(ours.dtype.numpy(), np.integer) and ours.tobytes() != theirs.tobytes():
        raise StructureMismatch(f"{where}: constants '{our.name}' and '{their.name}' differ; expected equal integers")
