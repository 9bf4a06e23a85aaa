"""Merged models as ONNX: the graph of the models that were merged, or an export that gets a checkpoint's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import onnx_ir as ir
import torch

from ensemerge.errors import InvalidSpec, StructureMismatch
from ensemerge.fields import suggest
from ensemerge.graph.files import load, named
from ensemerge.graph.heads import head_of
from ensemerge.graph.pairing import Pairs, pair_values, weights_among
from ensemerge.graph.surgery import held_tensors, up_to
from ensemerge.merge.alignment_spec import TRANSPORT
from ensemerge.merge.opened import OpenModel
from ensemerge.merge.plan import Output
from ensemerge.merge.recipe import Recipe
from ensemerge.weights.arrays import to_tensor
from ensemerge.weights.onnx import DTYPES, OnnxWeights
from ensemerge.weights.onnx_writer import OnnxWriter
from ensemerge.weights.reader import RenamedWeights, TensorInfo, WeightReader, read
from ensemerge.weights.writer import MemoryWriter, TensorWriter

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class OnnxForm:
    """The first model's graph with the merged weights."""

    model: ir.Model
    source: Path

    def open(self, folder: Path, output: Output) -> TensorWriter:
        return OnnxWriter(folder / MODEL_FILE, self.model, output.layout, source=self.source)

    def extra_bytes(self, output: Output) -> int:
        return 0


@dataclass(frozen=True)
class PairedModels:
    """ONNX models of one architecture: the graph of the donor, and all under the names of its weights.

    `graphs` and `pairings` lead from each model's name to its graph, and to what the donor's values are there.
    """

    donor: str
    form: OnnxForm
    models: Mapping[str, OpenModel]
    graphs: Mapping[str, ir.Model]
    pairings: Mapping[str, Pairs]
    heads: Mapping[str, ir.Model] = field(default_factory=dict)  # behind the graphs, where these are trunks


def pair_models(recipe: Recipe, models: Mapping[str, OpenModel]) -> PairedModels:
    """Pair the weights of ONNX models by the structure of their graphs.

    Raises InvalidSpec where other models are among them or the recipe takes the graph apart, StructureMismatch where
    the graphs differ.
    """
    if recipe.slices or recipe.modules or recipe.tokenizer:
        raise InvalidSpec(
            "slices, modules and tokenizers change the network; ONNX models keep their graph: expected `models`"
        )
    graphs = {name: load(_onnx_file(name, model)) for name, model in models.items()}
    donor = str(recipe.donor)
    heads: dict[str, ir.Model] = {}
    if recipe.trunk is not None:
        values = {name: _value_named(recipe.trunk, name, graph) for name, graph in graphs.items()}
        heads = {name: head_of(graph, values[name]) for name, graph in graphs.items()}
        graphs = {name: up_to(graph, [values[name]]) for name, graph in graphs.items()}
    same_widths = recipe.alignment is None or recipe.alignment.matching != TRANSPORT
    pairings = {name: _paired(donor, name, graphs, same_widths=same_widths) for name in graphs}
    # One set for all: a Constant node of the donor equals itself, and only the other graphs tell that it is a weight.
    weights = weights_among(graphs[donor], list(pairings.values()))
    paired = {}
    for name, model in models.items():
        names = {named(weight): named(pairings[name][weight]) for weight in weights}
        paired[name] = replace(model, reader=RenamedWeights(model.reader, names))
    _refuse_other_dtypes(recipe, paired[donor].reader)
    form = OnnxForm(graphs[donor], _onnx_file(donor, models[donor]))
    return PairedModels(donor, form, paired, graphs, pairings, heads)


def _value_named(trunk: str, name: str, graph: ir.Model) -> str:
    """The same value has the same name in all models of one exporter. Raises InvalidSpec."""
    values = [value.name for node in graph.graph for value in node.outputs]
    if trunk not in values:
        raise InvalidSpec(f"`trunk: {trunk}`: {name} has no such value; {suggest(trunk, [v for v in values if v])}")
    return trunk


def _paired(donor: str, name: str, graphs: Mapping[str, ir.Model], *, same_widths: bool) -> Pairs:
    try:
        return pair_values(graphs[donor], graphs[name], same_widths=same_widths)
    except StructureMismatch as error:
        raise StructureMismatch(f"{donor} and {name}: {error}") from error


def _refuse_other_dtypes(recipe: Recipe, reader: WeightReader) -> None:
    """Raises InvalidSpec: the operators of a graph take weights of the dtype with which it was exported."""
    wanted = recipe.out_dtype or recipe.dtype
    held = {info.dtype for info in map(reader.info, reader.names) if info.dtype.is_floating_point}
    if wanted is None or held <= {getattr(torch, wanted)}:
        return
    key = "out_dtype" if recipe.out_dtype else "dtype"
    kept = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
    raise InvalidSpec(
        f"`{key}: {wanted}`: a merge of ONNX models keeps the dtypes of its graph, expected {kept}; leave out `{key}`, "
        "or export the models in that dtype"
    )


def _onnx_file(name: str, model: OpenModel) -> Path:
    if model.onnx is None:
        raise InvalidSpec(
            f"{name} is no ONNX model, others of the recipe are; expected one kind, or --graph for an export"
        )
    return model.onnx


def into_graph(
    path: Path, models: Mapping[str, OpenModel], outputs: Sequence[Output]
) -> tuple[GraphForm, tuple[Output, ...]]:
    """The form that puts merged checkpoints into an export of one of the models, and the outputs in its dtypes.

    Raises InvalidModel, StructureMismatch with what each model lacks in it.
    """
    model, reasons = load(path), []
    for name, source in models.items():
        try:
            spots = find_spots(model, source.reader, outputs[0].layout)
        except StructureMismatch as error:
            reasons.append(f"as an export of {name}: {error}")
            continue
        return GraphForm(model, path, spots), tuple(_in_dtypes_of(model, spots, output) for output in outputs)
    raise StructureMismatch("\n".join(reasons))


def _in_dtypes_of(model: ir.Model, spots: Spots, output: Output) -> Output:
    held = OnnxWeights(model, None)
    jobs = [
        replace(job, info=TensorInfo(job.info.shape, held.info(spots[job.name][0].name).dtype))
        for job in output.jobs
        if job.name in spots
    ]
    return Output(output.folder, tuple(jobs))


@dataclass(frozen=True)
class Spot:
    """Where a checkpoint's tensor lies in a graph: the weight's name, and whether it is kept transposed there."""

    name: str
    transposed: bool = False


Spots = Mapping[str, Sequence[Spot]]


@dataclass(frozen=True)
class GraphForm:
    """An export of the same network, whose weights are replaced by those of the merged checkpoint."""

    model: ir.Model
    source: Path
    spots: Spots

    def open(self, folder: Path, output: Output) -> TensorWriter:
        placed = {name: info for name, info in output.layout.items() if name in self.spots}
        layout = {spot.name: _laid(info, spot) for name, info in placed.items() for spot in self.spots[name]}
        return _Placed(OnnxWriter(folder / MODEL_FILE, self.model, layout, source=self.source), placed, self.spots)

    def extra_bytes(self, output: Output) -> int:
        turned = [
            job.info.nbytes for job in output.jobs if any(spot.transposed for spot in self.spots.get(job.name, ()))
        ]
        # Each worker is at one tensor, which it holds as it came and turned. How many workers there will be is not
        # settled yet: as many as there are cores, unless a person asks for more than can run at once.
        cores = len(os.sched_getaffinity(0))
        return 2 * sum(sorted(turned)[-cores:])


def _laid(info: TensorInfo, spot: Spot) -> TensorInfo:
    return TensorInfo(info.shape[::-1], info.dtype) if spot.transposed else info


class _Placed:
    """A writer under the checkpoint's names; what the graph keeps transposed is turned when the tensor is whole."""

    def __init__(self, inner: TensorWriter, infos: Mapping[str, TensorInfo], spots: Spots) -> None:
        self._inner = inner
        self._spots = spots
        turned = [name for name in infos if any(spot.transposed for spot in spots[name])]
        self._infos = {name: infos[name] for name in turned}
        self._open: dict[str, MemoryWriter] = {}
        self._left = {name: infos[name].numel for name in turned}
        self._lock = Lock()

    @property
    def total_bytes(self) -> int:
        return self._inner.total_bytes

    def write(self, name: str, start: int, tensor: torch.Tensor) -> None:
        for spot in self._spots.get(name, ()):  # none: the graph has no use for a counter of training steps
            if not spot.transposed:
                self._inner.write(spot.name, start, tensor)
        if name in self._left:
            self._collect(name, start, tensor)

    def _collect(self, name: str, start: int, tensor: torch.Tensor) -> None:
        with self._lock:
            whole = self._open.setdefault(name, MemoryWriter({name: self._infos[name]}))
        whole.write(name, start, tensor)
        with self._lock:
            self._left[name] -= tensor.numel()
            if self._left[name]:
                return
            del self._open[name]
        turned = whole.tensors[name].T.reshape(-1)
        for spot in self._spots[name]:
            if spot.transposed:
                self._inner.write(spot.name, 0, turned)

    def keep(self, name: str) -> bool:
        # All are asked, each for its own sake; a tensor that the graph has no use for is there as far as it can be.
        kept = [self._inner.keep(spot.name) for spot in self._spots.get(name, ())]
        return all(kept)

    def close(self) -> None:
        self._inner.close()

    def abandon(self) -> None:
        self._inner.abandon()


def find_spots(model: ir.Model, checkpoint: WeightReader, layout: Mapping[str, TensorInfo]) -> Spots:
    """Where each tensor of a checkpoint lies in an export of it: told by name and values, or else by values alone.

    Exporters rename, transpose and copy weights, but the values of the model that was exported are there; `checkpoint`
    is that model. Weights of the graph that are none of its tensors have no spot. Raises StructureMismatch where a
    weight has the name of a tensor and other values, where a floating tensor is nowhere in the graph, or where two
    could be one weight.
    """
    _refuse_lacking(checkpoint, layout)
    weights = held_tensors(model)
    named_alike = {name: _spot_by_name(checkpoint, name, weights[name]) for name in layout if name in weights}
    spots = {name: [spot] for name, spot in named_alike.items() if spot is not None}
    by_name = set(spots)
    for weight, tensor in weights.items():
        if weight not in by_name and tensor.dtype.is_floating_point() and len(tensor.shape):
            found = {name: turned for name in layout if (turned := _match(checkpoint, name, tensor)) is not None}
            _assign(spots, weight, found, by_name)
    _refuse_missing(spots, layout)
    return spots


def _refuse_lacking(checkpoint: WeightReader, layout: Mapping[str, TensorInfo]) -> None:
    """Raises StructureMismatch: what the values of a merged tensor were before cannot be looked up."""
    lacking = sorted(layout.keys() - set(checkpoint.names))
    if lacking:
        raise StructureMismatch(
            f"the model lacks {len(lacking)} of the merged tensors ({', '.join(lacking[:3])}); expected a model with "
            "all of them"
        )


def _refuse_missing(spots: Spots, layout: Mapping[str, TensorInfo]) -> None:
    missing = [
        name for name, info in layout.items() if name not in spots and info.dtype.is_floating_point and info.numel
    ]
    if missing:
        raise StructureMismatch(
            f"the graph holds no weight with the values of {', '.join(missing[:3])} ({len(missing)} in all); expected "
            "an export of one of the recipe's models, in which nothing was folded: export it again without optimisation"
        )


def _spot_by_name(checkpoint: WeightReader, name: str, tensor: ir.TensorProtocol) -> Spot | None:
    """Where a weight has a tensor's name; None where it is something else. Raises StructureMismatch."""
    info = checkpoint.info(name)
    if not _ways(info, tensor) or info.dtype.is_floating_point != tensor.dtype.is_floating_point():
        return None
    same_shape = tuple(tensor.shape) == info.shape
    if not info.dtype.is_floating_point:
        return Spot(name) if same_shape and DTYPES.get(tensor.dtype) == info.dtype else None
    if not info.numel:
        return Spot(name) if same_shape else None
    turned = _match(checkpoint, name, tensor)
    if turned is None:  # equal names of other networks are no reason to trust the graph
        raise StructureMismatch(
            f"the graph's weight '{name}' has other values than the model's tensor of that name; expected an export of "
            "one of the recipe's models, made from the same weights"
        )
    return Spot(name, turned)


def _assign(spots: dict[str, list[Spot]], weight: str, found: Mapping[str, bool], by_name: set[str]) -> None:
    """One more spot for the tensor that has a weight's values; one that no name has placed comes first."""
    candidates = [name for name in found if name not in by_name] or list(found)
    if len(candidates) > 1:
        raise StructureMismatch(
            f"weight '{weight}' of the graph has the values of {', '.join(candidates[:3])}, which are equal in the "
            "model that was exported; expected values that tell them apart: export one of the tuned models"
        )
    for name in candidates:
        spots.setdefault(name, []).append(Spot(weight, found[name]))


def _ways(info: TensorInfo, tensor: ir.TensorProtocol) -> list[bool]:
    """In which ways a weight could be a tensor, by its shape: as it is (False), transposed (True)."""
    shape = tuple(tensor.shape)
    ways = [False] if shape == info.shape else []
    return [*ways, True] if len(shape) == 2 and shape == info.shape[::-1] else ways


def _match(checkpoint: WeightReader, name: str, tensor: ir.TensorProtocol) -> bool | None:
    """Whether a weight holds the values of a tensor, and then whether transposed; None where it does not.

    Raises StructureMismatch where nobody can tell: a matrix of zeros is its own transposed.
    """
    info = checkpoint.info(name)
    ways = _ways(info, tensor)
    if not ways or not info.numel or not info.dtype.is_floating_point:
        return None
    held = to_tensor(tensor.numpy())
    dtype = min(held.dtype, info.dtype, key=lambda one: one.itemsize)  # what both hold: either may have been rounded
    held = held.to(dtype)
    begin = checkpoint.window(name, 0, min(_columns(info), 64)).to(dtype)
    ways = [turned for turned in ways if _begins(held.T if turned else held, begin)]
    # Most tensors of one shape differ in the first few values already, and need not be read.
    whole = read(checkpoint, name).to(dtype) if ways else held
    ways = [turned for turned in ways if torch.equal(held.T if turned else held, whole)]
    if len(ways) > 1 and info.numel > 1:
        raise StructureMismatch(
            f"'{name}' has the same values when it is transposed, so the graph does not tell which way it is kept; "
            "export another one of the models"
        )
    return ways[0] if ways else None


def _columns(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 1


def _begins(held: torch.Tensor, begin: torch.Tensor) -> bool:
    """Whether the first row of a tensor begins with some values."""
    row = held.reshape(1) if not held.ndim else held[(0,) * (held.ndim - 1)]
    return torch.equal(row[: len(begin)], begin)
