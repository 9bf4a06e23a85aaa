"""Which weights are measured rather than learned."""

from __future__ import annotations

import onnx_ir as ir

from ensemerge.graph.files import named


def statistics_of(model: ir.Model) -> frozenset[str]:
    """The names of running means and variances of batch normalisation."""
    layers = (node for node in model.graph if node.op_type == "BatchNormalization")
    return frozenset(named(value) for node in layers for value in node.inputs[3:5] if value is not None)
