"""How alike the units of several networks are by what they answer to the same inputs.

The networks run side by side, batch by batch, with the values that matrix products and convolutions read as extra
outputs. Only sums are kept, so that memory does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.align.similarity import Moments, Tables
from ensemerge.errors import InvalidData
from ensemerge.graph.permute import outer_place
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import up_to
from ensemerge.graph.symmetry import Axis, Block, Product, Space, Symmetry
from ensemerge.graph.trace import ROWS
from ensemerge.progress import Notify, silent

# A batch has so many rows at most, fewer where what is seen of one network in them would take more bytes.
BATCH_ROWS = 32
BATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class Observed:
    """A network, and what the values of the network that the symmetry is of are called in it."""

    model: ir.Model
    names: Mapping[str, str]


def correlate(
    symmetry: Symmetry,
    networks: Sequence[Observed],
    feeds: Arrays,
    pairs: Sequence[tuple[int, int]],
    notify: Notify = silent,
) -> dict[tuple[int, int], Tables]:
    """Pearson's correlation between the activations of units, over all rows and places, for pairs of networks.

    Taken where the last operator reads them (Xu et al. 2024, arXiv 2403.01753, and Stoica et al. 2023, arXiv
    2305.03053). Units that never vary correlate with none. Raises InvalidData for activations that are not finite and
    for `feeds` that do not fit.
    """
    spaces = [space for space in symmetry.free if space.name in symmetry.probes]
    if not spaces:
        return {pair: Tables({}) for pair in pairs}
    values = sorted({value for space in spaces for value in symmetry.probes[space.name]})
    moments: dict[tuple[str, int, int], Moments] = {}
    rows = len(next(iter(feeds.values()))) if feeds else 0
    done, at_once = 0, _batch_rows(symmetry, values)
    for batches in zip(*(_batches(network, values, feeds, at_once) for network in networks), strict=True):
        for space in spaces:
            seen = [_vectors(symmetry, space, batch) for batch in batches]
            for i, j in pairs:
                known = moments.setdefault((space.name, i, j), Moments(len(seen[i]), len(seen[j])))
                known.add(seen[i], seen[j])
        done = min(done + at_once, rows)
        notify("compare activations", done, rows)
    tables = {
        (i, j): Tables({space.name: moments[space.name, i, j].correlations() for space in spaces}) for i, j in pairs
    }
    if not any(table.any() for known in tables.values() for table in known.tables.values()):
        raise InvalidData(f"no unit varies on the {rows} rows of calibration data; expected more rows, or by: weights")
    return tables


def _batch_rows(symmetry: Symmetry, values: Sequence[str]) -> int:
    """How many rows are run at once, by the sizes with which shapes were traced: those of `ROWS` rows."""
    sizes = [[sum(symmetry.size(factors) for factors in axis) for axis in symmetry.values[value]] for value in values]
    row_bytes = sum(4 * math.prod(axes) for axes in sizes) // ROWS
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _batches(
    network: Observed, values: Sequence[str], feeds: Arrays, batch_rows: int
) -> Iterator[dict[str, np.ndarray]]:
    names = [network.names[value] for value in values]
    runner = Runner(up_to(network.model, list(dict.fromkeys(names))), batch_rows=batch_rows)
    for batch in runner.batches(feeds, list(dict.fromkeys(names))):
        yield {value: batch[name] for value, name in zip(values, names, strict=True)}


def _vectors(symmetry: Symmetry, space: Space, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """What each unit of a space answers, `(units, samples) float32`, the samples of several values side by side."""
    parts = [
        _unit_samples(symmetry, space, block, batch[value])
        for value in symmetry.probes[space.name]
        for block in _free_blocks(symmetry, symmetry.values[value])
        if space.name in block.spaces
    ]
    seen = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if not np.isfinite(seen).all():
        raise InvalidData("activations on the calibration data are not finite; check the data and the weights")
    return seen


def _free_blocks(symmetry: Symmetry, axes: Sequence[Axis]) -> Iterator[Block]:
    """The parts of a value; axes on which nothing may move, such as rows and places, are left whole and have no name.

    They may also have another size than when shapes were traced. What frees units within it, such as directions, has.
    """
    names = {name for axis in axes for factors in axis for name in factors if symmetry.spaces[name].is_free}
    names |= {outer for name in names for outer in symmetry.spaces[name].within}
    free = [any(name in names for factors in axis for name in factors) for axis in axes]
    for block in symmetry.blocks([axis if moves else ((),) for axis, moves in zip(axes, free, strict=True)]):
        region = tuple(part if moves else slice(None) for part, moves in zip(block.region, free, strict=True))
        yield Block(region, tuple(f if moves else ("",) for f, moves in zip(block.factors, free, strict=True)))


def _unit_samples(symmetry: Symmetry, space: Space, block: Block, value: np.ndarray) -> np.ndarray:
    part = value[block.region].astype(np.float32, copy=False)
    sizes = [
        n for factors, size in zip(block.factors, part.shape, strict=True) for n in _sizes(symmetry, factors, size)
    ]
    at = block.spaces.index(space.name)
    leading = [*(outer_place(block, at, outer) for outer in space.within), at]
    # What else may move is averaged: its order would mix up the samples.
    mixed = [axis for axis, name in enumerate(block.spaces) if axis not in leading and _is_free(symmetry, name)]
    rest = [axis for axis in range(len(sizes)) if axis not in (*leading, *mixed)]
    values = part.reshape(sizes).mean(axis=tuple(mixed), keepdims=True) if mixed else part.reshape(sizes)
    samples = np.transpose(values, [*leading, *rest, *mixed])
    return samples.reshape(math.prod(sizes[axis] for axis in leading), -1)


def _is_free(symmetry: Symmetry, name: str) -> bool:
    return bool(name) and symmetry.spaces[name].is_free


def _sizes(symmetry: Symmetry, factors: Product, actual: int) -> list[int]:
    """The sizes of an axis's factors: of rows and tokens there are as many as this batch has."""
    if factors == ("",):
        return [actual]
    sizes = [symmetry.spaces[name].size for name in factors]
    if math.prod(sizes) != actual:
        varies = next(at for at, name in enumerate(factors) if not symmetry.spaces[name].is_free)
        sizes[varies] = actual // math.prod(size for at, size in enumerate(sizes) if at != varies)
    return sizes
