"""REPAIR: give a merged network's channels back the means and deviations that its parents' had.

The average of two networks has activations with less variance than either, more so with every layer (Jordan, Sedghi,
Saukh, Entezari and Neyshabur 2023, arXiv 2211.08403). Where batch normalisation follows, its statistics settle that;
elsewhere each channel of each convolution and linear layer is scaled and shifted to the moments that are wanted, and
both are folded into the layer's weight and bias. Layers are repaired in waves, from the input on: what a layer reads
comes from layers that are repaired already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.graph.files import named
from ensemerge.graph.pairing import pair_values
from ensemerge.graph.run import Arrays
from ensemerge.graph.surgery import held, held_tensors, with_weights
from ensemerge.progress import Notify, silent
from ensemerge.repository import Check
from ensemerge.restore.moments import DRIFT_BOUND, DRIFT_BOUND_FLOAT16, Moments, gap, measure, waves

# A deviation of fewer roundings than that, of the magnitudes in its layer, is noise, which a scale would only enlarge.
NOISE_ROUNDINGS = 16
# What only arranges values anew: the layer before it is seen through it.
VIEWS = frozenset({"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Batch normalisation settles the moments of what it reads; a softmax reads the network's answer.
SETTLED_BY = frozenset({"BatchNormalization", "LogSoftmax", "Softmax"})


@dataclass(frozen=True)
class Repaired:
    """The network with its new weights, how many layers have them, and what was measured afterwards.

    `dead_channels` counts those that never vary in the merged network: no scale helps them, they were only shifted.
    """

    model: ir.Model
    layers: int
    dead_channels: int
    check: Check


def repair(
    merged: ir.Model,
    parents: Sequence[ir.Model],
    feeds: Arrays,
    notify: Notify = silent,
    *,
    shares: Sequence[float] | None = None,
) -> Repaired:
    """Bring every channel to the average of the parents' means and standard deviations over `feeds`.

    `feeds` is unlabelled data, arrays `(rows, …)` by the input names of `merged`, at least 2 rows. `shares` says how
    much each parent counts, equally if left out. The parents' layers are found by structure, names may differ. Layers
    are Conv, Gemm and MatMul by a stored weight; those that write the network's output and those before batch
    normalisation or a softmax are left alone. `notify` is called after each wave.

    Raises InvalidModel when no layer is left, StructureMismatch when a parent is of another architecture, InvalidData
    for unusable `feeds` or `shares`, CheckFailed when the moments do not come out as wanted.
    """
    portions = _portions(len(parents), shares)
    _refuse_single_row(feeds)
    model, layers = _with_own_parameters(merged)
    targets = _targets(merged, list(zip(parents, portions, strict=True)), layers, feeds)
    changes: dict[str, _Change] = {}
    order = waves(model, layers)
    for position, wave in enumerate(order):
        found = measure(model, {name: layers[name].axis for name in wave}, feeds)
        settled = {name: _change(found[name], targets[name], layers[name].rounding) for name in wave}
        model = _fold(model, layers, settled)
        changes |= settled
        notify("repair", position + 1, len(order))
    dead_channels = sum(int(change.dead.sum()) for change in changes.values())
    return Repaired(model, len(layers), dead_channels, _check(model, layers, changes, feeds))


def _portions(parents: int, shares: Sequence[float] | None) -> list[float]:
    """How much each parent counts, summing to one. Raises InvalidData."""
    given = [1.0] * parents if shares is None else [float(share) for share in shares]
    if not given or len(given) != parents:
        raise InvalidData(f"expected at least one parent and a share for each, got {parents} and {len(given)} shares")
    total = sum(given)
    if not (np.isfinite(total) and total > 0 and min(given) >= 0):
        raise InvalidData(f"expected shares of 0 or more with a positive sum, got {given}")
    return [share / total for share in given]


def _refuse_single_row(feeds: Arrays) -> None:
    if any(array.ndim and len(array) == 1 for array in feeds.values()):
        raise InvalidData("one calibration row shows no deviation; expected at least 2, better some hundreds")


# --- Moments


@dataclass(frozen=True)
class _Change:
    """What happens to the channels of a layer, `(channels,)` each: y becomes scale · y + shift, and has `wanted`."""

    scale: np.ndarray
    shift: np.ndarray
    wanted: Moments
    dead: np.ndarray


def _targets(
    merged: ir.Model, parents: Sequence[tuple[ir.Model, float]], layers: Mapping[str, _Layer], feeds: Arrays
) -> dict[str, Moments]:
    """The average of the parents' means and deviations, by layer."""
    means = dict.fromkeys(layers, np.zeros(()))
    deviations = dict.fromkeys(layers, np.zeros(()))
    for parent, portion in parents:
        pairs = {ours.name: named(theirs) for ours, theirs in pair_values(merged, parent).items() if theirs.name}
        inputs = {pairs.get(name, name): array for name, array in feeds.items()}
        moments = measure(parent, {pairs[name]: layer.axis for name, layer in layers.items()}, inputs)
        for name in layers:
            means[name] = means[name] + portion * moments[pairs[name]].mean
            deviations[name] = deviations[name] + portion * moments[pairs[name]].deviation
    return {name: Moments(means[name], deviations[name] ** 2) for name in layers}


def _change(found: Moments, target: Moments, rounding: float) -> _Change:
    """From the moments that were found to the target; a dead channel gets the target's mean and stays constant."""
    magnitude = np.abs(found.mean) + found.deviation.mean()
    dead = found.deviation <= NOISE_ROUNDINGS * rounding * magnitude
    scale = np.where(dead, 1.0, target.deviation / np.where(dead, 1.0, found.deviation))
    wanted = Moments(target.mean, np.where(dead, found.variance, target.variance))
    return _Change(scale, target.mean - scale * found.mean, wanted, dead)


def _check(model: ir.Model, layers: Mapping[str, _Layer], changes: Mapping[str, _Change], feeds: Arrays) -> Check:
    """The largest gap between wanted and measured mean or deviation, in units of the layer's mean deviation."""
    measured = measure(model, {name: layer.axis for name, layer in layers.items()}, feeds)
    remaining = float(np.max([gap(changes[name].wanted, measured[name]) for name in layers]))
    half = any(layer.dtype == np.float16 for layer in layers.values())
    rows = len(next(iter(feeds.values())))
    detail = f"gap to the wanted moments of {len(layers)} layers on {rows} calibration rows, in deviations,"
    return Check.measured("repaired", remaining, DRIFT_BOUND_FLOAT16 if half else DRIFT_BOUND, detail)


# --- Weights


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer: its output's axis of channels, and the names of its own weight and bias."""

    axis: int
    weight: str
    weight_axis: int
    bias: str
    dtype: np.dtype

    @property
    def rounding(self) -> float:
        """The relative rounding of the layer's numbers."""
        return 2.0**-11 if self.dtype == np.float16 else 2.0**-24


def _fold(model: ir.Model, layers: Mapping[str, _Layer], changes: Mapping[str, _Change]) -> ir.Model:
    tensors = held_tensors(model)
    weights: dict[str, np.ndarray] = {}
    for name, change in changes.items():
        layer = layers[name]
        weight = tensors[layer.weight].numpy().astype(np.float64)
        bias = tensors[layer.bias].numpy().astype(np.float64)
        scale = change.scale.reshape([-1 if axis == layer.weight_axis else 1 for axis in range(weight.ndim)])
        # What is too large for half precision becomes infinite, and the next measurement says so.
        with np.errstate(over="ignore"):
            weights[layer.weight] = (weight * scale).astype(layer.dtype)
            weights[layer.bias] = (bias * change.scale + change.shift).astype(layer.dtype)
    return with_weights(model, weights)


def _with_own_parameters(merged: ir.Model) -> tuple[ir.Model, dict[str, _Layer]]:
    """A copy in which each layer to be repaired has a weight and a bias that nothing else reads; by output name.

    Raises InvalidModel when there is no such layer.
    """
    model = merged.clone()
    RemoveUnusedNodesPass()(model)
    spots = [spot for node in model.graph if (spot := _find(node)) is not None and not _is_settled(spot.output)]
    if not spots:
        raise InvalidModel(
            "the graph has no layer to repair; expected a Conv, a Gemm or a MatMul by a weight that does not write "
            "the output and has no batch normalisation or softmax behind it"
        )
    layers = dict(_with_own(model.graph, spot) for spot in spots)
    RemoveUnusedNodesPass()(model)
    return model, layers


def _is_settled(value: ir.Value) -> bool:
    """Whether a value is the network's answer, or goes where its moments do not matter."""
    readers = value.consumers()
    return value.is_graph_output() or any(
        node.op_type in SETTLED_BY or (node.op_type in VIEWS and _is_settled(node.outputs[0])) for node in readers
    )


@dataclass(frozen=True)
class _Spot:
    """Where a layer is in a graph: the node with the weight, the node and the input that add the bias, if any."""

    node: ir.Node
    weight: np.ndarray
    weight_axis: int
    adds: ir.Node | None
    place: int
    bias: np.ndarray
    axis: int

    @property
    def output(self) -> ir.Value:
        return (self.adds or self.node).outputs[0]


def _find(node: ir.Node) -> _Spot | None:
    """The layer that a node is, if it is one whose weight is stored and whose bias is stored or missing."""
    kind = _KINDS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    weight = _stored(node, 1)
    return None if kind is None or weight is None else kind(node, weight)


def _convolution(node: ir.Node, weight: np.ndarray) -> _Spot | None:
    bias = _bias(node, 2, len(weight), weight.dtype)
    return None if bias is None else _Spot(node, weight, 0, node, 2, bias, axis=1)


def _general_product(node: ir.Node, weight: np.ndarray) -> _Spot | None:
    axis = 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    bias = _bias(node, 2, weight.shape[axis], weight.dtype)
    if bias is None:
        return None
    factor = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
    return _Spot(node, weight, axis, node, 2, bias * weight.dtype.type(factor), axis=-1)


def _product(node: ir.Node, weight: np.ndarray) -> _Spot | None:
    if weight.ndim != 2:
        return None
    readers = list(node.outputs[0].uses())
    if len(readers) == 1 and readers[0].node.op_type == "Add":
        adds, place = readers[0].node, 1 - readers[0].idx
        bias = _bias(adds, place, weight.shape[1], weight.dtype)
        if bias is not None:
            return _Spot(node, weight, 1, adds, place, bias, axis=-1)
    return _Spot(node, weight, 1, None, 1, np.zeros(weight.shape[1], weight.dtype), axis=-1)


_KINDS: Mapping[str, Callable[[ir.Node, np.ndarray], _Spot | None]] = {
    "Conv": _convolution,
    "Gemm": _general_product,
    "MatMul": _product,
}


def _stored(node: ir.Node, place: int) -> np.ndarray | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = None if value is None else held(value)
    return None if tensor is None else tensor.numpy()


def _bias(node: ir.Node, place: int, channels: int, dtype: np.dtype) -> np.ndarray | None:
    """The bias, `(…, channels)`; zeros where there is none, None where it is computed or differs along other axes."""
    if place >= len(node.inputs) or node.inputs[place] is None:
        return np.zeros(channels, dtype)
    stored = _stored(node, place)
    if stored is None or stored.shape[-1:] not in ((), (1,), (channels,)) or any(n != 1 for n in stored.shape[:-1]):
        return None
    return np.broadcast_to(stored, (*stored.shape[:-1], channels))


def _with_own(graph: ir.Graph, spot: _Spot) -> tuple[str, _Layer]:
    """The layer with its name, after it got what it may not share. In place."""
    name = named(spot.output)
    adds = spot.adds or _add_after(graph, spot.node)
    adds.attributes.pop("beta", None)  # it is in the bias now
    weight = _own(graph, spot.node, 1, spot.weight, f"{name}.weight")
    bias = _own(graph, adds, spot.place, spot.bias, f"{name}.bias")
    return name, _Layer(spot.axis, weight, spot.weight_axis, bias, spot.weight.dtype)


def _add_after(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """An Add behind a product that takes over the name and the readers of its output; its bias is still missing."""
    product = node.outputs[0]
    total = ir.Value(name=product.name, shape=product.shape, type=product.type)
    product.replace_all_uses_with(total)
    product.name = _free_name(graph, f"{product.name}.product")
    adds = ir.node("Add", [product, None], outputs=[total])
    graph.insert_after(node, adds)
    return adds


def _own(graph: ir.Graph, node: ir.Node, place: int, array: np.ndarray, name: str) -> str:
    """Make an input of a node a weight that holds `array` and that nothing else reads. Returns its name."""
    value = node.inputs[place] if place < len(node.inputs) else None
    stored = _stored(node, place)
    if value is not None and len(value.uses()) == 1 and stored is not None and np.array_equal(stored, array):
        return named(value)
    own = ir.Value(name=_free_name(graph, name), const_value=ir.tensor(np.array(array, order="C"), name=name))
    own.shape, own.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(own)
    node.resize_inputs(max(len(node.inputs), place + 1))
    node.replace_input_with(place, own)
    return named(own)


def _free_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or with a number behind it what no value of the graph is called."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in values}
    numbered = (f"{wanted}.{number}" for number in count(2))
    return wanted if wanted not in taken else next(name for name in numbered if name not in taken)
