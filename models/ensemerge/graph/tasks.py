"""What a model's answer means, as far as its graph tells."""

from __future__ import annotations

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
