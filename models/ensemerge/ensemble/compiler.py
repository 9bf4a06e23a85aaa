"""The ensemble compiler: k ONNX graphs in, one graph out, and the proof that it equals its members.

The plan built here is `fused`: one graph with a shared input, the k branches side by side, the combiner at the end.
One run then costs one dispatch instead of k, and k thread pools become one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.ensemble.combiners import OUTPUT, Combiner, combine
from ensemerge.errors import InvalidModel
from ensemerge.graph.files import batch_input, named
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import prefixed
from ensemerge.measures.differences import largest_difference
from ensemerge.repository import Check, Task

# float32 probabilities of a few dozen layers, summed in another order: 1e-6 is usual. Half precision has 11 bits.
EQUALITY_BOUND = 1e-5
EQUALITY_BOUND_FLOAT16 = 2e-3
# One row, a few, and more than a vector register holds: a graph that fixed its batch by accident fails here.
BATCHES = (1, 3, 17)


@dataclass(frozen=True)
class Member:
    """One model of an ensemble: its graph and what its output means."""

    name: str
    model: ir.Model
    task: Task


@dataclass(frozen=True)
class Emitted:
    """A combiner's nodes, the last of which writes the answer, and the constants that they read."""

    nodes: list[ir.Node]
    constants: list[ir.Value]


Emit = Callable[[Sequence[ir.Value]], Emitted]


def fuse(members: Sequence[Member], emit: Emit) -> ir.Model:
    """Join the members' graphs; `emit` makes the combiner from the values that hold their probabilities.

    Raises InvalidModel when inputs, classes, opsets or functions do not fit together.
    """
    _refuse_misfits(members)
    shared = _shared_input(members[0])
    branches = [_branch(member, f"m{position}/", shared) for position, member in enumerate(members)]
    nodes = [node for branch in branches for node in branch.nodes]
    combiner = emit([branch.probabilities for branch in branches])
    nodes += combiner.nodes
    initializers = [value for branch in branches for value in branch.initializers] + combiner.constants
    return _assemble(members[0], shared, nodes, initializers)


def emit_mean(probabilities: Sequence[ir.Value]) -> Emitted:
    """`mean_probability` as ONNX: a sum over a count, since ONNX Runtime's Mean takes single precision alone."""
    dtype = probabilities[0].dtype or ir.DataType.FLOAT
    count = ir.Value(name="combine/count", const_value=ir.tensor(float(len(probabilities)), dtype=dtype))
    total = ir.node("Sum", list(probabilities), name="combine/sum")
    total.outputs[0].name = "combine/total"
    return Emitted([total, ir.node("Div", [total.outputs[0], count], name="combine/mean")], [count])


EMITTERS: Mapping[str, Emit] = {"mean_probability": emit_mean}


def prove(members: Sequence[Member], ensemble: ir.Model, combiner: Combiner, feeds: Arrays) -> Check:
    """Compare the compiled graph with its members run one by one, on `feeds`, at several batch sizes.

    Raises CheckFailed when a probability differs by more than the bound for its dtype.
    """
    runners = [Runner(member.model) for member in members]
    fused = Runner(ensemble)
    (array,) = feeds.values()
    worst = 0.0
    for rows in BATCHES:
        one_by_one = _run_members(members, runners, array[:rows])
        expected = combine(one_by_one, [member.task.scale for member in members], combiner)
        got = fused.run({named(batch_input(ensemble)): array[:rows]})[OUTPUT]
        worst = max(worst, largest_difference(got, expected))
    bound = EQUALITY_BOUND_FLOAT16 if got.dtype == np.float16 else EQUALITY_BOUND
    return Check.measured("equals_members", worst, bound, f"largest difference of a probability, batches of {BATCHES}")


def _run_members(members: Sequence[Member], runners: Sequence[Runner], array: np.ndarray) -> list[np.ndarray]:
    outputs = []
    for member, runner in zip(members, runners, strict=True):
        feeds = {named(batch_input(member.model)): array}
        outputs.append(runner.run(feeds, [member.task.output])[member.task.output])
    return outputs


def _refuse_misfits(members: Sequence[Member]) -> None:
    first = members[0]
    for member in members[1:]:
        _expect_equal(member, "input", _signature(first), _signature(member))
        _expect_equal(member, "classes", first.task.classes, member.task.classes)
        _expect_equal(member, "opsets", first.model.opset_imports, member.model.opset_imports)
    if batch_input(first.model).name == OUTPUT:
        raise InvalidModel(f"the members' input is called '{OUTPUT}', as the ensemble's output; expected another name")
    for member in members:
        if member.task.kind != "classification":
            raise InvalidModel(f"member '{member.name}' does {member.task.kind}; expected a classification")
        if member.model.functions:
            raise InvalidModel(f"member '{member.name}' has local functions; expected them inlined at export")


def _signature(member: Member) -> tuple[str, list[object]]:
    value = batch_input(member.model)
    # The names of symbolic axes are the exporter's own; what must agree is which axes are fixed, and at what size.
    return str(value.dtype), [axis if isinstance(axis, int) else None for axis in value.shape or ()]


def _expect_equal(member: Member, what: str, expected: object, got: object) -> None:
    if expected != got:
        raise InvalidModel(f"member '{member.name}': expected {what} {expected} as the first member's, got {got}")


def _shared_input(member: Member) -> ir.Value:
    original = batch_input(member.model)
    return ir.Value(name=original.name, shape=original.shape, type=original.type)


@dataclass(frozen=True)
class _Branch:
    nodes: list[ir.Node]
    initializers: list[ir.Value]
    probabilities: ir.Value


def _branch(member: Member, prefix: str, shared: ir.Value) -> _Branch:
    """A member's nodes and weights, out of its graph, reading the shared input and ending in probabilities."""
    graph = prefixed(member.model, prefix).graph
    output = next(value for value in graph.outputs if value.name == prefix + member.task.output)
    dtype = output.dtype
    next(value for value in graph.inputs if not value.is_initializer()).replace_all_uses_with(shared)
    graph.outputs.clear()
    nodes, initializers = list(graph), list(graph.initializers.values())
    graph.remove(nodes)
    graph.initializers.clear()
    if member.task.scale == "logits":
        nodes.append(ir.node("Softmax", [output], {"axis": -1}, name=f"{prefix}softmax"))
        output = nodes[-1].outputs[0]
        output.name = f"{prefix}{OUTPUT}"
        output.type = ir.TensorType(dtype or ir.DataType.FLOAT)
    return _Branch(nodes, initializers, output)


def _assemble(first: Member, shared: ir.Value, nodes: Sequence[ir.Node], initializers: Sequence[ir.Value]) -> ir.Model:
    answer = nodes[-1].outputs[0]
    answer.name = OUTPUT
    dtypes = {value.name: value.dtype for value in first.model.graph.outputs}
    answer.type = ir.TensorType(dtypes[first.task.output] or ir.DataType.FLOAT)
    answer.shape = ir.Shape([shared.shape[0] if shared.shape else None, len(first.task.classes) or None])
    graph = ir.Graph(
        [shared],
        [answer],
        nodes=nodes,
        initializers=initializers,
        opset_imports=dict(first.model.opset_imports),
        name="ensemble",
    )
    return ir.Model(graph, ir_version=first.model.ir_version, producer_name="ensemerge")
