"""ONNX files in and out."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ensemerge.errors import InvalidModel


def load(path: Path | str) -> ir.Model:
    """Read an ONNX file; weights in external files are mapped, not read. Raises InvalidModel."""
    try:
        model = ir.load(path)
    except FileNotFoundError as error:
        raise InvalidModel(f"no ONNX model at {path}") from error
    except Exception as error:  # protobuf and onnx_ir raise a dozen unrelated types for a damaged file
        raise InvalidModel(f"{path} is no ONNX model that can be read: {error}") from error
    if not model.graph.outputs:
        raise InvalidModel(f"{path} is no ONNX model that can be used: its graph has no output")
    return model


def save(model: ir.Model, path: Path | str) -> None:
    """Write an ONNX file and check it. Raises InvalidModel.

    Weights come into the file, wherever they were: a version is one file as long as protobuf's 2 GiB allow it.
    """
    ir.save(ir.external_data.load_to_model(model), path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise InvalidModel(f"the graph written to {path} is not valid ONNX: {error}") from error


def batch_input(model: ir.Model) -> ir.Value:
    """The only input of a network whose first axis is the batch. Raises InvalidModel."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1:
        raise InvalidModel(f"expected a network with one input, got {len(inputs)}: {[value.name for value in inputs]}")
    shape = inputs[0].shape
    if shape is None or len(shape) == 0 or isinstance(shape[0], int):
        raise InvalidModel(
            f"input '{inputs[0].name}' has shape {shape}; expected a first axis that varies, the batch. "
            "Export with a dynamic first axis"
        )
    return inputs[0]


def named(value: ir.Value) -> str:
    """The name of a value; a graph that was read from a file has no unnamed ones. Raises InvalidModel."""
    if not value.name:
        raise InvalidModel(f"expected every value of the graph to have a name, got {value}")
    return value.name
