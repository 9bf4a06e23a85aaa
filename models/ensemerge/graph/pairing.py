"""Which tensor of one graph corresponds to which tensor of another: told by structure, not by names.

Exporters rename weights (`val_12`), keep some of them as Constant nodes and list nodes in an order of their own; two
exports of one architecture still have the same operators, wired the same way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ensemerge.errors import StructureMismatch
from ensemerge.graph.files import named
from ensemerge.graph.surgery import held, is_constant

Pairs = Mapping[ir.Value, ir.Value]


def pair_weights(reference: ir.Model, other: ir.Model) -> dict[str, str]:
    """Map the name of every weight of `reference` to the name of its counterpart in `other`.

    A weight is an initializer, or a Constant node whose counterpart is an initializer or another number. Raises
    StructureMismatch as `pair_values` does.
    """
    pairs = pair_values(reference, other)
    return {named(weight): named(pairs[weight]) for weight in weights_among(reference, [pairs])}


def pair_values(reference: ir.Model, other: ir.Model, *, same_widths: bool = True) -> dict[ir.Value, ir.Value]:
    """Map every value that the outputs of `reference` depend on to its counterpart in `other`.

    Without `same_widths` the axes of weights may have other sizes.

    Both graphs are walked side by side, backwards from their outputs, so that the order of their nodes does not matter
    and nodes that nobody uses need no counterpart. Raises StructureMismatch at the first place where operator,
    attributes, wiring, shape, dtype or a value that is no weight differ.
    """
    if reference.opset_imports != other.opset_imports:
        raise StructureMismatch(f"expected opsets {reference.opset_imports} in both graphs, got {other.opset_imports}")
    if reference.functions or other.functions:
        raise StructureMismatch("graphs with local functions cannot be paired; expected them inlined at export")
    # Equal counts also make sure that no two nodes of `reference` have one counterpart.
    nodes, others = _used_nodes(reference), _used_nodes(other)
    if nodes != others:
        raise StructureMismatch(f"expected graphs of one architecture, got {nodes} and {others} nodes")
    walk = _Walk(same_widths=same_widths)
    walk.meet("graph inputs", _free_inputs(reference), _free_inputs(other))
    walk.meet("graph outputs", list(reference.graph.outputs), list(other.graph.outputs))
    walk.finish()
    return walk.pairs


def weights_among(reference: ir.Model, pairings: Sequence[Pairs]) -> list[ir.Value]:
    """The weights of `reference`, seen beside all the graphs that it was paired with.

    A weight is an initializer in any of them, or a Constant node of floats that are other floats in any of them: a
    number that all networks share belongs to the operator. Strings and what no output depends on are left out.
    """
    constants = [node.outputs[0] for node in reference.graph if is_constant(node)]
    values = [*reference.graph.initializers.values(), *constants]
    return [value for value in values if _is_weight(value, [pairs[value] for pairs in pairings if value in pairs])]


def _is_weight(value: ir.Value, counterparts: Sequence[ir.Value]) -> bool:
    tensor = held(value)
    if not counterparts or tensor is None or tensor.dtype == ir.DataType.STRING:
        return False
    if any(one.is_initializer() for one in (value, *counterparts)):
        return True
    return tensor.dtype.is_floating_point() and not all(_hold_the_same(value, one) for one in counterparts)


def _hold_the_same(value: ir.Value, other: ir.Value) -> bool:
    """Whether two values are tensors with the same bits."""
    ours, theirs = held(value), held(other)
    if ours is None or theirs is None or ours.dtype != theirs.dtype or list(ours.shape) != list(theirs.shape):
        return False
    if ours.dtype == ir.DataType.STRING:
        return bool((ours.numpy() == theirs.numpy()).all())
    return ours.tobytes() == theirs.tobytes()


def _free_inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _used_nodes(model: ir.Model) -> int:
    """How many operators the outputs depend on."""
    seen: set[ir.Node] = set()
    waiting = [value.producer() for value in model.graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or is_constant(node):
            continue
        seen.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return len(seen)


class _Walk:
    """Two graphs walked side by side from what they answer to what they are given; `pairs` grows on the way."""

    def __init__(self, *, same_widths: bool) -> None:
        self.pairs: dict[ir.Value, ir.Value] = {}
        self._same_widths = same_widths
        self._seen: set[ir.Node] = set()
        self._waiting: deque[tuple[ir.Node, ir.Node]] = deque()

    def meet(self, where: str, ours: Sequence[ir.Value | None], theirs: Sequence[ir.Value | None]) -> None:
        """Pair values one by one. Raises StructureMismatch."""
        if len(ours) != len(theirs):
            raise StructureMismatch(f"{where}: expected {len(ours)} values, got {len(theirs)}")
        for our, their in zip(ours, theirs, strict=True):
            if our is not None and their is not None:
                self._meet_one(where, our, their)
            elif our is not their:
                raise StructureMismatch(f"{where}: an optional input is given in one graph only")

    def finish(self) -> None:
        """Pair the operators that make the values met so far, and so on. Raises StructureMismatch."""
        while self._waiting:
            node, other = self._waiting.popleft()
            where = _place(node)
            _same_operator(where, node, other)
            self.meet(where, list(node.inputs), list(other.inputs))
            self.meet(where, list(node.outputs), list(other.outputs))

    def _meet_one(self, where: str, our: ir.Value, their: ir.Value) -> None:
        known = self.pairs.setdefault(our, their)
        if known is not their and not _hold_the_same(known, their):
            raise _met_two(where, our, known, their)
        _same_weight(where, our, their, same_widths=self._same_widths)
        if held(our) is None:
            self._meet_producers(where, our, their)

    def _meet_producers(self, where: str, our: ir.Value, their: ir.Value) -> None:
        node, other = our.producer(), their.producer()
        if node is None and other is None:
            return
        if node is None or other is None:
            found = f"'{our.name}' is {_origin(node)}, its counterpart '{their.name}' is {_origin(other)}"
            raise StructureMismatch(f"{where}: {found}; expected graphs of one architecture")
        if our.index() != their.index():
            raise StructureMismatch(
                f"{where}: expected output {our.index()} of {node.op_type}, got output {their.index()} ('{their.name}')"
            )
        if node not in self._seen:
            self._seen.add(node)
            self._waiting.append((node, other))


def _origin(node: ir.Node | None) -> str:
    return "an input" if node is None else f"made by {node.op_type}"


def _met_two(where: str, our: ir.Value, known: ir.Value, their: ir.Value) -> StructureMismatch:
    if held(our) is None or held(known) is None or held(their) is None:
        return StructureMismatch(f"{where}: '{our.name}' meets '{their.name}' here and '{known.name}' elsewhere")
    return StructureMismatch(
        f"{where}: '{our.name}' is one weight in the first graph and two in the other, '{known.name}' and "
        f"'{their.name}', which differ; make the model in which they are two the first one (or the base model)"
    )


def _place(node: ir.Node) -> str:
    """How to call a node; many exporters give them no names."""
    made = node.outputs[0].name if node.outputs else None
    return f"node '{node.name}' ({node.op_type})" if node.name else f"the {node.op_type} that makes '{made}'"


def _same_operator(where: str, node: ir.Node, other: ir.Node) -> None:
    if node.op_identifier() != other.op_identifier():
        raise StructureMismatch(
            f"{where}: expected {node.op_type}, got {_place(other)}; expected graphs of one architecture"
        )
    ours, theirs = _attributes(node), _attributes(other)
    if ours != theirs:
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise StructureMismatch(f"{where}: attributes differ: {', '.join(differing)}")


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: _comparable(attribute) for name, attribute in node.attributes.items()}


def _comparable(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return str(tensor.dtype), tuple(tensor.shape), tensor.tobytes()
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise StructureMismatch("graphs with control flow cannot be paired; expected plain operators")
    return attribute.value


def _same_weight(where: str, our: ir.Value, their: ir.Value, *, same_widths: bool) -> None:
    ours, theirs = held(our), held(their)
    if (ours is None) != (theirs is None):
        raise StructureMismatch(f"{where}: '{our.name}' is a weight in one graph only ('{their.name}' in the other)")
    if ours is None or theirs is None:
        return
    alike = list(ours.shape) == list(theirs.shape) if same_widths else len(ours.shape) == len(theirs.shape)
    if ours.dtype != theirs.dtype or not alike:
        raise StructureMismatch(
            f"{where}: weight '{our.name}' is {ours.dtype} {list(ours.shape)}, "
            f"its counterpart '{their.name}' {theirs.dtype} {list(theirs.shape)}"
        )
    if not ours.dtype.is_floating_point() and not _hold_the_same(our, their):
        raise StructureMismatch(
            f"{where}: constants '{our.name}' and '{their.name}' differ; expected equal ones, since {ours.dtype} has "
            "no average"
        )
