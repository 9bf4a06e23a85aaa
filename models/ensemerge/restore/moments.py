"""Mean and deviation of a network's channels over calibration data, and the order in which layers can be settled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidData
from ensemerge.graph.files import named
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import up_to

# The values of all layers lie in memory at once.
BATCH_ROWS = 32
# What remains between wanted and measured moments when all waves are done, in units of the layer's deviation:
# float32 activations summed in float64 leave about 1e-6.
DRIFT_BOUND = 1e-3
# Half precision rounds each activation and each stored number to 11 bits.
DRIFT_BOUND_FLOAT16 = 1e-2


@dataclass(frozen=True)
class Moments:
    """Mean and (biased) variance of each channel, `(channels,) float64`."""

    mean: np.ndarray
    variance: np.ndarray

    @property
    def deviation(self) -> np.ndarray:
        return np.asarray(np.sqrt(self.variance))


def measure(model: ir.Model, channels: Mapping[str, int], feeds: Arrays) -> dict[str, Moments]:
    """Moments of values of the graph over all rows and positions of `feeds`, arrays `(rows, …)` by input name.

    `channels` leads from the name of each value to its axis of channels. Raises InvalidData where `feeds` do not fit
    or give values that are not finite.
    """
    names = sorted(channels)
    runner = Runner(up_to(model, names), batch_rows=BATCH_ROWS)
    totals = {name: _Totals(channels[name]) for name in names}
    for batch in runner.batches(feeds, names):
        for name in names:
            totals[name].add(batch[name])
    return {name: total.moments() for name, total in totals.items()}


def waves(model: ir.Model, outputs: Collection[str]) -> list[list[str]]:
    """The names in `outputs`, grouped so that a wave depends only on the waves before it."""
    depths: dict[ir.Value, int] = {}
    found: list[list[str]] = []
    for node in model.graph:
        depth = max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        for value in node.outputs:
            depths[value] = depth
            if value.name in outputs:
                found = found if depth < len(found) else [*found, []]
                found[depth].append(named(value))
                depths[value] = depth + 1
    return found


def gap(wanted: Moments, measured: Moments) -> float:
    """The largest difference between wanted and measured means or deviations, in units of the mean deviation."""
    unit = float(measured.deviation.mean()) or 1.0
    means = np.abs(wanted.mean - measured.mean)
    deviations = np.abs(wanted.deviation - measured.deviation)
    return float(np.maximum(means.max(), deviations.max())) / unit


class _Totals:
    """Running sums over batches, in float64, for each place along the axis of channels.

    They are sums of x and x² about the first batch's mean: with E[x²] − E[x]² about zero, a large mean would cancel
    digits.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._count = 0
        self._shift: np.ndarray | None = None
        self._sum: np.ndarray | float = 0.0
        self._sum_of_squares: np.ndarray | float = 0.0

    def add(self, batch: np.ndarray) -> None:
        channels = batch.shape[self._axis]
        values = np.moveaxis(batch, self._axis, 0).reshape(channels, -1).astype(np.float64)  # (channels, samples)
        if not np.isfinite(values).all():
            raise InvalidData("activations on the calibration data are not finite; check the data and the weights")
        if self._shift is None:
            self._shift = values.mean(axis=1)
        values -= self._shift[:, None]
        self._count += values.shape[1]
        self._sum = self._sum + values.sum(axis=1)
        self._sum_of_squares = self._sum_of_squares + (values**2).sum(axis=1)

    def moments(self) -> Moments:
        assert self._shift is not None  # batches() yields at least one batch
        offset = np.asarray(self._sum / self._count)
        variance = np.asarray(self._sum_of_squares / self._count) - offset**2
        return Moments(self._shift + offset, np.maximum(variance, 0.0))
