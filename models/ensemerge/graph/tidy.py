"""Tidy what an exporter wrote, without changing what the graph computes.

torch's exporter, told to leave normalisation alone, writes the rest out at length: run-time shapes of constant
weights, a computed zero bias for every convolution without one, and the source path of each line of Python.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

# What the exporter calls a value that it computed itself.
_MADE_UP = re.compile(r"val_\d+")


def tidy(model: ir.Model) -> None:
    """Fold constants, drop what they leave behind, and remove traces of the machine that exported. In place.

    Normalisation is kept as its own nodes: its statistics are weights of the network and get re-estimated. What is
    computed from weights alone (`scale.exp()`, weight normalisation) becomes one weight, and a merge averages that.
    """
    optimizer.fold_constants(model)
    drop_zero_biases(model)
    optimizer.remove_unused_nodes(model)
    strip_traces(model)


def drop_zero_biases(model: ir.Model) -> None:
    """Remove the bias of every convolution whose bias is a constant zero that no module owns (`val_…`). In place."""
    for node in model.graph.all_nodes():
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_made_up_zero(node.inputs[2]):
            node.resize_inputs(2)


def _is_made_up_zero(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or not _MADE_UP.fullmatch(value.name or ""):
        return False
    return not np.any(value.const_value.numpy())


def strip_traces(model: ir.Model) -> None:
    """Remove comments and metadata: the exporter's hold stack traces with the paths of somebody's machine. In place."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
