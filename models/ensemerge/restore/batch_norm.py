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

from ensemerge.errors import InvalidModel
from ensemerge.graph.files import named
from ensemerge.graph.run import Arrays
from ensemerge.graph.surgery import with_weights
from ensemerge.progress import Notify, silent
from ensemerge.repository import Check
from ensemerge.restore.moments import DRIFT_BOUND, DRIFT_BOUND_FLOAT16, Moments, gap, measure, waves

CHANNELS = 1  # the axis that BatchNormalization normalises along


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
    layers = _layers(model)
    if not layers:
        raise InvalidModel("the graph has no BatchNormalization to restore; if an exporter folded it, export unfolded")
    order = waves(model, layers)
    for position, wave in enumerate(order):
        model = _store(model, _measure(model, wave, feeds), wave)
        notify("restore statistics", position + 1, len(order))
    return Restored(model, len(layers), _check_drift(model, layers, feeds))


def _layers(model: ir.Model) -> list[str]:
    """The names of the layers' outputs."""
    owners: dict[str, str] = {}
    layers = [node for node in model.graph if node.op_type == "BatchNormalization"]
    for node in layers:
        _claim(_statistics_names(node), named(node.outputs[0]), owners)
    return [named(node.outputs[0]) for node in layers]


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
    moments = measure(model, dict.fromkeys(sources.values(), CHANNELS), feeds)
    return {layer: moments[source] for layer, source in sources.items()}


def _store(model: ir.Model, moments: dict[str, Moments], layers: Iterable[str]) -> ir.Model:
    weights: dict[str, np.ndarray] = {}
    for layer in layers:
        mean, variance = _statistics_names(_layer(model, layer))
        weights[mean] = moments[layer].mean.astype(_dtype(model, mean))
        weights[variance] = moments[layer].variance.astype(_dtype(model, variance))
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
    drift = float(np.max([gap(_stored(model, layer), measured[layer]) for layer in layers]))
    half = any(array.dtype == np.float16 for layer in layers for array in _stored_arrays(model, layer))
    rows = len(next(iter(feeds.values())))
    detail = f"drift of {len(layers)} layers on {rows} calibration rows, in deviations,"
    return Check.measured("restored_batch_norm", drift, DRIFT_BOUND_FLOAT16 if half else DRIFT_BOUND, detail)
