"""What the values of a graph look like: their shapes, and the numbers of those that only describe shapes.

Exporters compute shapes at run time (Shape → Slice → Concat → Reshape), which no inference sees through in general.
Running the network once does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.errors import EnsemergeError, InvalidModel
from ensemerge.graph.files import named
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import held

ROWS = 2
# What an axis of unknown size gets, the first with which the network runs.
SIZES = (8, 16, 32, 64, 224)
# Larger arrays of whole numbers are data, not shapes.
MOST_NUMBERS = 64


@dataclass(frozen=True)
class Trace:
    """The shape of every value of the main graph, and the whole numbers that are few, by name, for one input."""

    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, np.ndarray]


def trace(model: ir.Model, feeds: Arrays | None = None) -> Trace:
    """Run the network on `feeds`, or on made-up inputs. Raises InvalidModel where none are found that it takes."""
    shown = _with_all_outputs(model)
    runner = Runner(shown)
    found = _that_run(runner, model) if feeds is None else _run(runner, _few(runner, feeds))
    # Sequences have no shape.
    values = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    values |= {name: tensor.numpy() for name, tensor in _held_arrays(model).items()}
    numbers = {
        name: array for name, array in values.items() if array.dtype.kind in "iub" and array.size <= MOST_NUMBERS
    }
    return Trace({name: array.shape for name, array in values.items()}, numbers)


def _with_all_outputs(model: ir.Model) -> ir.Model:
    shown = model.clone()
    there = set(shown.graph.outputs)
    for node in shown.graph:
        shown.graph.outputs.extend(value for value in node.outputs if value.name and value not in there)
    return shown


def _held_arrays(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    tensors = {named(value): held(value) for value in model.graph.initializers.values()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def inputs_that_run(model: ir.Model) -> Arrays:
    """Made-up inputs with which a network runs. Raises InvalidModel where none are found."""
    found = _that_run(Runner(model), model)
    return {named(value): found[named(value)] for value in model.graph.inputs if named(value) in found}


def _that_run(runner: Runner, model: ir.Model) -> dict[str, np.ndarray]:
    reasons = []
    for size in SIZES:
        try:
            return _run(runner, made_up(model, ROWS, size))
        except EnsemergeError as error:
            reasons.append(str(error))
    raise InvalidModel(f"the network runs on no made-up input, give calibration data: {reasons[0]}")


def _run(runner: Runner, feeds: Arrays) -> dict[str, np.ndarray]:
    """The inputs and all that one batch of them makes: some values have no rows, and cannot be put together."""
    return {**feeds, **next(runner.batches(feeds, runner.outputs))}


def _few(runner: Runner, feeds: Arrays) -> Arrays:
    """As many rows as a trace needs."""
    rows = runner.fixed_rows or ROWS
    return {name: array[:rows] if array.ndim else array for name, array in feeds.items()}


def made_up(model: ir.Model, rows: int, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for the network: normal floats, whole numbers of 1, axes of unknown size having `size`."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.dtype is None:
            continue
        sizes = [_size(axis, number, rows, size) for number, axis in enumerate(value.shape or ())]
        floating = value.dtype.is_floating_point()
        drawn = generator.standard_normal(sizes) if floating else np.ones(sizes)
        feeds[named(value)] = drawn.astype(value.dtype.numpy())
    return feeds


def _size(axis: int | ir.SymbolicDim, number: int, rows: int, size: int) -> int:
    if isinstance(axis, int):
        return axis
    return rows if number == 0 else size
