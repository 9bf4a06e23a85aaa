"""Re-estimate the running statistics of batch normalisation, through ONNX Runtime.

An averaged network has activations that none of its parents had, so the parents' running statistics, averaged or not,
are wrong for it (Izmailov et al. 2018, arXiv 1803.05407, section 3.2; Jordan et al. 2023, arXiv 2211.08403).

A layer's statistics depend on those of the layers before it. They are therefore measured in waves, from the input
on: what a wave stores is what inference will see, whatever the batch size. A forward pass in training mode, the usual
way, normalises each batch by itself and only approximates that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.graph.files import named
from ensemerge.graph.run import Arrays, Runner
from ensemerge.graph.surgery import up_to, with_weights
from ensemerge.progress import Notify, silent
from ensemerge.repository import Check

# What remains between stored and measured statistics when all waves are done, in units of the layer's deviation:
# float32 activations summed in float64 leave about 1e-6.
DRIFT_BOUND = 1e-3
# Half precision rounds each activation and each stored statistic to 11 bits.
DRIFT_BOUND_FLOAT16 = 1e-2


@dataclass(frozen=True)
class Moments:
    """Mean and (biased) variance of each channel, `(channels,) float64`."""

    mean: np.ndarray
    variance: np.ndarray


@dataclass(frozen=True)
class Restored:
    """The network with new statistics, how many layers got them, and what was measured afterwards."""

    model: ir.Model
    layers: int
    check: Check


def restore_batch_norm(model: ir.Model, feeds: Arrays, notify: Notify = silent) -> Restored:
    """Give every BatchNormalization the statistics of its input over `feeds`, arrays `(rows, …)` by input name.

    `notify` is called after each wave. Raises InvalidModel when the graph has no such layer (it may have
    been folded at export), InvalidData for unusable `feeds`, CheckFailed when the result is not stable.
    """
    waves = _waves(model)
    if not waves:
        raise InvalidModel("the graph has no BatchNormalization to restore; if an exporter folded it, export unfolded")
    for position, wave in enumerate(waves):
        model = _store(model, _measure(model, wave, feeds), wave)
        notify("restore statistics", position + 1, len(waves))
    layers = [name for wave in waves for name in wave]
    return Restored(model, len(layers), _check_drift(model, layers, feeds))


def _waves(model: ir.Model) -> list[list[str]]:
    """Names of the layers' outputs, grouped so that a wave depends only on the waves before it."""
    depths: dict[ir.Value, int] = {}
    waves: list[list[str]] = []
    owners: dict[str, str] = {}
    for node in model.graph:
        depth = max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        if node.op_type == "BatchNormalization":
            _claim(_statistics_names(node), named(node.outputs[0]), owners)
            waves = waves if depth < len(waves) else [*waves, []]
            waves[depth].append(named(node.outputs[0]))
            depth += 1
        depths.update(dict.fromkeys(node.outputs, depth))
    return waves


def _claim(statistics: tuple[str, str], layer: str, owners: dict[str, str]) -> None:
    """Statistics that two layers share would have to fit both: the later one's would overwrite the earlier one's."""
    for name in statistics:
        owner = owners.setdefault(name, layer)
        if owner != layer:
            raise InvalidModel(f"layers '{owner}' and '{layer}' share the statistics '{name}'; expected one layer each")


def _layer(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph if node.outputs and node.outputs[0].name == output)


def _statistics_names(node: ir.Node) -> tuple[str, str]:
    mean, variance = node.inputs[3], node.inputs[4]
    if mean is None or variance is None or not mean.is_initializer() or not variance.is_initializer():
        raise InvalidModel(f"the statistics of '{node.name}' are computed; expected initializers")
    return named(mean), named(variance)


def _input_name(model: ir.Model, output: str) -> str:
    value = _layer(model, output).inputs[0]
    if value is None:
        raise InvalidModel(f"the layer that writes '{output}' has no input")
    return named(value)


def _measure(model: ir.Model, layers: Iterable[str], feeds: Arrays) -> dict[str, Moments]:
    """Moments of each layer's input over all rows and positions."""
    sources = {layer: _input_name(model, layer) for layer in layers}
    names = sorted(set(sources.values()))
    runner = Runner(up_to(model, names))
    # Sums of x and x² about the first batch's mean: with E[x²] − E[x]² about zero, a large mean would cancel digits.
    totals: dict[str, _Totals] = {}
    for batch in runner.batches(feeds, names):
        for name in names:
            totals.setdefault(name, _Totals()).add(batch[name])
    return {layer: totals[source].moments() for layer, source in sources.items()}


class _Totals:
    """Running sums over batches `(rows, channels, …)`, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._shift: np.ndarray | None = None
        self._sum: np.ndarray | float = 0.0
        self._sum_of_squares: np.ndarray | float = 0.0

    def add(self, batch: np.ndarray) -> None:
        values = np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1).astype(np.float64)  # (channels, samples)
        if self._shift is None:
            self._shift = values.mean(axis=1)
        values -= self._shift[:, None]
        self._count += values.shape[1]
        self._sum = self._sum + values.sum(axis=1)
        self._sum_of_squares = self._sum_of_squares + (values**2).sum(axis=1)

    def moments(self) -> Moments:
        assert self._shift is not None  # batches() yields at least one batch
        offset = np.asarray(self._sum / self._count)
        moments = Moments(self._shift + offset, np.asarray(self._sum_of_squares / self._count) - offset**2)
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.variance).all()):
            raise InvalidData("activations on the calibration data are not finite; check the data and the weights")
        return moments


def _store(model: ir.Model, moments: dict[str, Moments], layers: Iterable[str]) -> ir.Model:
    weights: dict[str, np.ndarray] = {}
    for layer in layers:
        mean, variance = _statistics_names(_layer(model, layer))
        weights[mean] = moments[layer].mean.astype(_dtype(model, mean))
        weights[variance] = np.maximum(moments[layer].variance, 0.0).astype(_dtype(model, variance))
    return with_weights(model, weights)


def _dtype(model: ir.Model, name: str) -> np.dtype:
    dtype = model.graph.initializers[name].dtype
    assert dtype is not None  # an initializer has one
    return dtype.numpy()


def _stored(model: ir.Model, layer: str) -> Moments:
    mean, variance = _stored_arrays(model, layer)
    return Moments(mean.astype(np.float64), variance.astype(np.float64))


def _stored_arrays(model: ir.Model, layer: str) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = (model.graph.initializers[name].const_value for name in _statistics_names(_layer(model, layer)))
    assert mean is not None and variance is not None  # _statistics_names saw initializers
    return mean.numpy(), variance.numpy()


def _check_drift(model: ir.Model, layers: list[str], feeds: Arrays) -> Check:
    """The largest gap between stored and measured mean or deviation, in units of the layer's mean deviation."""
    measured = _measure(model, layers, feeds)
    drift = float(np.max([_gap(_stored(model, layer), measured[layer]) for layer in layers]))
    half = any(array.dtype == np.float16 for layer in layers for array in _stored_arrays(model, layer))
    rows = len(next(iter(feeds.values())))
    detail = f"drift of {len(layers)} layers on {rows} calibration rows, in deviations,"
    return Check.measured("restored_batch_norm", drift, DRIFT_BOUND_FLOAT16 if half else DRIFT_BOUND, detail)


def _gap(stored: Moments, measured: Moments) -> float:
    unit = float(np.sqrt(measured.variance).mean()) or 1.0
    means = np.abs(stored.mean - measured.mean)
    deviations = np.abs(np.sqrt(stored.variance) - np.sqrt(np.maximum(measured.variance, 0)))
    return float(np.maximum(means.max(), deviations.max())) / unit
