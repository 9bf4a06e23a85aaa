"""What a model's answer means, as far as its graph tells."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from ensemerge.errors import InvalidSpec
from ensemerge.fields import suggest
from ensemerge.graph.files import named
from ensemerge.repository import Task


def infer_task(model: ir.Model) -> Task | None:
    """A classification when the only output is `(batch, classes)` of floats; None where the graph does not tell.

    The scale is probabilities when a Softmax writes the output, else logits. Classes are called by their index.
    """
    if len(model.graph.outputs) != 1:
        return None
    output = model.graph.outputs[0]
    shape, dtype = output.shape, output.dtype
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        return None
    if dtype is None or not dtype.is_floating_point():
        return None
    producer = output.producer()
    scale = "probabilities" if producer is not None and producer.op_type == "Softmax" else "logits"
    return Task("classification", named(output), scale, tuple(str(index) for index in range(shape[1])))


def settle_task(stated: Task | None, model: ir.Model) -> Task | None:
    """The task that was stated, checked against the graph and completed from it; without one, what the graph tells.

    Raises InvalidSpec when the graph has no such output, or another number of classes.
    """
    if stated is None:
        return infer_task(model)
    outputs = {named(value): value for value in model.graph.outputs}
    if stated.output not in outputs:
        raise InvalidSpec(f"task: output '{stated.output}' is unknown; {suggest(stated.output, list(outputs))}")
    return _with_classes(stated, outputs[stated.output]) if stated.kind == "classification" else stated


def _with_classes(task: Task, output: ir.Value) -> Task:
    shape = list(output.shape or [])
    if len(shape) != 2:
        raise InvalidSpec(f"task: a classification needs an output (batch, classes); '{task.output}' is {shape}")
    width = shape[1]
    if not isinstance(width, int):
        return task
    if len(task.classes) not in (0, width):
        raise InvalidSpec(f"task: {len(task.classes)} classes are named, but '{task.output}' has {width} columns")
    return replace(task, classes=task.classes or tuple(str(index) for index in range(width)))
