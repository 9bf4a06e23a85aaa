"""What a model's answer means, as far as its graph tells."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

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
    shapes = {named(value): _sizes(value) for value in model.graph.outputs}
    stated.check(shapes, "task")
    width = shapes[stated.output][-1] if stated.kind == "classification" and not stated.classes else None
    return stated if width is None else replace(stated, classes=tuple(str(index) for index in range(width)))


def _sizes(value: ir.Value) -> list[int | None]:
    return [axis if isinstance(axis, int) else None for axis in value.shape or ()]
