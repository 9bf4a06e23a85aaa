"""A model with a LoRA adapter, read as if it were one checkpoint.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): W' = W + s·B·A with s = alpha/r, or alpha/√r
(Kalajdzievski 2023, arXiv 2312.03732). The product is made for the rows that a window touches, in float32,
and rounded once to W's dtype, so adapters of different ranks on different models merge as full models do, within the
same bound on memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ensemerge.errors import InvalidData
from ensemerge.fields import suggest
from ensemerge.weights.reader import TensorInfo, WeightReader, check_stretch, most_rows, rows_of
from ensemerge.weights.safetensors import ADAPTER_FILE, SafetensorsWeights
from ensemerge.weights.shards import read_json
from ensemerge.weights.torch_files import TorchWeights

T = TypeVar("T")

CONFIG = "adapter_config.json"
FILES = (ADAPTER_FILE, "adapter_model.bin")
PREFIX = "base_model.model."
LINEAR_PAIR = ("lora_A.weight", "lora_B.weight")
EMBEDDING_PAIR = ("lora_embedding_A", "lora_embedding_B")

# A product is made in tiles whose borders depend on the tensor alone: the same bits whatever the window. They are the
# same on every run while torch multiplies in one thread (`torch.set_num_threads(1)`, as a merge does): with more, the
# library beneath it cuts a product up in another way.
TILE_ELEMENTS = 1 << 17
# What a library of linear algebra keeps for a thread to lay matrices out anew: 3 MiB in MKL, whatever their size.
LIBRARY_BYTES = 4 << 20

# What the sum W + s·B·A does not say, or says of another W than the base model's.
_OTHER_MATHS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # all others subtract something from the base's weights

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's adapter_config.json says of the sum."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by regular expressions of module names, the first that fits
    alphas: Mapping[str, float]
    rank_stabilised: bool
    transposed: bool

    def scale(self, module: str) -> float:
        """s, for one module by its name in the base model."""
        rank, alpha = self.rank_of(module), _fitting(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def rank_of(self, module: str) -> int:
        return _fitting(self.ranks, module, self.rank)


@dataclass(frozen=True)
class Delta:
    """s·left·right, `left` `(rows, r)` and `right` `(r, columns)`, added to a weight; kept on disk as it is.

    `left` and `right` are tensors of the adapter, transposed where the flag says so.
    """

    left: str
    right: str
    transposed: bool  # left is A and right is B, each the other way round: W is `(in, out)`, or an embedding
    scale: float


class AdaptedWeights:
    """`base` with the PEFT adapter in the folder `adapter`: linear, Conv1D, embedding and convolution layers.

    Whole tensors of the adapter (`modules_to_save`, biases) replace the base's; an embedding may have more rows then.
    A tied tensor is adapted once, under whichever of its names, as in PEFT. Raises InvalidData for what is no LoRA
    adapter, for maths that is no sum (DoRA and others), and for tensors that do not fit each other or the base.
    """

    def __init__(self, base: WeightReader, adapter: Path) -> None:
        self._config = adapter / CONFIG
        config = read_config(self._config)
        self._base = base
        self._known = set(base.names)
        self._adapter = _open_adapter(adapter)
        self._replaced: dict[str, str] = {}
        self._deltas: dict[str, Delta] = {}
        self._biases: dict[str, tuple[str, float]] = {}
        modules: dict[str, dict[str, str]] = {}
        for tensor in self._adapter.names:
            self._sort(tensor, modules)
        self._ties = _remaining_ties(base, self._replaced)
        for module, parts in modules.items():
            self._add(module, parts, config, str(adapter))

    def _sort(self, tensor: str, modules: dict[str, dict[str, str]]) -> None:
        """A part of a module's product, or a tensor that replaces another."""
        part = _PART.fullmatch(tensor.removeprefix(PREFIX))
        if part:
            modules.setdefault(part["module"], {})[part["part"]] = tensor
            return
        name = tensor.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".lora_" in name or "token_adapter" in name:
            raise InvalidData(
                f"the adapter's tensor '{tensor}' belongs to no sum W + s·B·A, such as DoRA's; merge it in PEFT"
            )
        _check_replacement(tensor, self._adapter.info(tensor), name, self._base)
        self._replaced[name] = tensor

    def _add(self, module: str, parts: Mapping[str, str], config: LoraConfig, where: str) -> None:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        pair = EMBEDDING_PAIR if embedding else LINEAR_PAIR
        if not parts.keys() >= set(pair):
            raise InvalidData(f"{where}: module '{module}' has only {', '.join(parts)}; expected {' and '.join(pair)}")
        a, b = parts[pair[0]], parts[pair[1]]
        name = self._target(f"{module}.weight", where)
        transposed = embedding or (config.transposed and len(self.info(name).shape) == 2)
        delta = Delta(a if transposed else b, b if transposed else a, transposed, config.scale(module))
        _check_delta(self._adapter, delta, config.rank_of(module), module, self.info(name))
        if name in self._deltas:
            raise InvalidData(
                f"{where}: '{module}' is tied to another module that is adapted too; expected one of them"
            )
        self._deltas[name] = delta
        if "lora_B.bias" in parts:
            bias = self._target(f"{module}.bias", where)
            if self._adapter.info(parts["lora_B.bias"]).shape != self.info(bias).shape:
                raise InvalidData(f"{where}: the bias of '{module}' has another shape than the base's")
            self._biases[bias] = parts["lora_B.bias"], delta.scale

    def _target(self, name: str, where: str) -> str:
        """The name under which the base's tensor is kept, where it is tied. Raises InvalidData."""
        if name not in self._known:
            raise InvalidData(f"{where} adapts '{name}', which the base model does not have; {_near(name, self._base)}")
        return self._ties.get(name, name)

    @property
    def names(self) -> Sequence[str]:
        return self._base.names

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def resident_bytes(self) -> int:
        return self._base.resident_bytes + self._adapter.resident_bytes

    @property
    def files(self) -> Sequence[Path]:
        return [*self._base.files, self._config, *self._adapter.files]

    def info(self, name: str) -> TensorInfo:
        own = self._base.info(name)
        if name in self._replaced:
            return TensorInfo(self._adapter.info(self._replaced[name]).shape, own.dtype)
        return own

    def window(self, name: str, start: int, stop: int) -> torch.Tensor:
        name = self._ties.get(name, name)
        check_stretch(name, self.info(name), start, stop)
        reader, stored = self._stored(name)
        weights = reader.window(stored, start, stop)
        if name in self._deltas:
            return self._add_product(weights, name, start, stop)
        if name in self._biases:
            bias, scale = self._biases[name]
            added = self._adapter.window(bias, start, stop).to(torch.float32, copy=True).mul_(scale)
            return added.add_(weights.float()).to(self.info(name).dtype)
        return weights.to(self.info(name).dtype)

    def give_back(self, name: str, start: int, stop: int) -> None:
        reader, stored = self._stored(self._ties.get(name, name))
        reader.give_back(stored, start, stop)

    def window_bytes(self, name: str, elements: int) -> int:
        name = self._ties.get(name, name)
        reader, stored = self._stored(name)
        read = elements * reader.info(stored).dtype.itemsize
        beside = reader.window_bytes(stored, elements)
        if name in self._deltas:
            return beside + read + self._product_bytes(name, elements)
        if name in self._biases:
            bias, _ = self._biases[name]
            beside += elements * self._adapter.info(bias).dtype.itemsize + self._adapter.window_bytes(bias, elements)
            return beside + read + 2 * elements * torch.float32.itemsize
        return beside + (0 if reader.info(stored).dtype == self.info(name).dtype else read)

    def _stored(self, name: str) -> tuple[WeightReader, str]:
        """Where a tensor lies before anything is added to it, and its name there."""
        if name in self._replaced:
            return self._adapter, self._replaced[name]
        return self._base, name

    def _add_product(self, weights: torch.Tensor, name: str, start: int, stop: int) -> torch.Tensor:
        info, delta = self.info(name), self._deltas[name]
        first, end, columns = rows_of(info, start, stop)
        step = max(1, TILE_ELEMENTS // columns)
        top, bottom = first // step * step, min(-(-end // step) * step, info.shape[0])
        left, right = self._left(delta, top, bottom, _wide(info)), self._right(delta, _wide(info))
        adapted = torch.empty(stop - start, dtype=info.dtype)
        for row in range(top, bottom, step):
            # Copied: where a matrix begins in memory must not depend on the window, a library's sums may.
            product = left[row - top : row - top + step].clone() @ right
            low, high = max(start, row * columns), min(stop, row * columns + product.numel())
            # Product and sum are rounded one after the other: one fused operation would depend on the window's end.
            flat = product.view(-1)[low - row * columns : high - row * columns].mul_(delta.scale)
            adapted[low - start : high - start] = flat.add_(weights[low - start : high - start].to(flat.dtype))
        self._adapter.give_back(delta.right, 0, self._adapter.info(delta.right).numel)
        return adapted

    def _left(self, delta: Delta, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `first:end` of the left factor, `(end − first, r)`, copied; nothing else of it is read."""
        shape = self._adapter.info(delta.left).shape
        rank = shape[0] if delta.transposed else shape[1]
        rows = torch.empty((end - first, rank), dtype=dtype)
        if not delta.transposed:
            rows.view(-1).copy_(self._adapter.window(delta.left, first * rank, end * rank))
            self._adapter.give_back(delta.left, first * rank, end * rank)
            return rows
        for i in range(rank):
            start, stop = i * shape[1] + first, i * shape[1] + end
            rows[:, i] = self._adapter.window(delta.left, start, stop)
            self._adapter.give_back(delta.left, start, stop)
        return rows

    def _right(self, delta: Delta, dtype: torch.dtype) -> torch.Tensor:
        """The right factor, `(r, columns)`; a convolution's kernel is part of its columns."""
        info = self._adapter.info(delta.right)
        matrix = self._adapter.window(delta.right, 0, info.numel).view(info.shape[0], -1)
        return (matrix.T if delta.transposed else matrix).to(dtype)

    def _product_bytes(self, name: str, elements: int) -> int:
        """What `_add_product` holds: both factors as they are read and as they are multiplied, and a tile."""
        info, delta = self.info(name), self._deltas[name]
        left, right = self._adapter.info(delta.left), self._adapter.info(delta.right)
        wide = _wide(info).itemsize
        touched, columns = most_rows(info, elements)
        step = max(1, TILE_ELEMENTS // columns)
        rows = min(touched + 2 * (step - 1), info.shape[0])
        rank = left.shape[0] if delta.transposed else left.shape[1]
        at_once = rows if delta.transposed else rows * rank
        # The one is read and laid out in the wide dtype before the other is read.
        reading_left = at_once * left.dtype.itemsize + self._adapter.window_bytes(delta.left, at_once)
        reading_right = right.numel * (right.dtype.itemsize + wide) + self._adapter.window_bytes(
            delta.right, right.numel
        )
        tile = min(step, rows) * (rank + 2 * columns) * wide
        return rows * rank * wide + max(reading_left, reading_right + tile) + LIBRARY_BYTES


def _wide(info: TensorInfo) -> torch.dtype:
    """The dtype in which a product is made."""
    return torch.float64 if info.dtype == torch.float64 else torch.float32


def read_config(path: Path) -> LoraConfig:
    """What an adapter says of itself. Raises InvalidData."""
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InvalidData(f"{path}: 'peft_type' is {kind!r}; expected a LoRA adapter ('LORA')")
    for key in _OTHER_MATHS:
        if config.get(key):
            raise InvalidData(
                f"{path}: '{key}' is set; expected plain LoRA, W + s·B·A. Merge this adapter in PEFT first"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise InvalidData(
            f"{path}: 'init_lora_weights' is {config['init_lora_weights']!r}, which changes the base's weights too; "
            "save the adapter converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict):
            raise InvalidData(f"{path}: '{key}' is {patterns!r:.80}; expected an object of numbers")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for value in (rank, alpha, *ranks.values(), *alphas.values()):
        if type(value) not in (int, float) or not value > 0:
            raise InvalidData(f"{path}: a rank or an alpha is {value!r}; expected positive numbers")
    stabilised, transposed = bool(config.get("use_rslora")), bool(config.get("fan_in_fan_out"))
    return LoraConfig(rank, alpha, ranks, alphas, stabilised, transposed)


def _open_adapter(folder: Path) -> WeightReader:
    if (folder / FILES[0]).is_file():
        return SafetensorsWeights(folder / FILES[0])
    if (folder / FILES[1]).is_file():
        return TorchWeights(folder / FILES[1])
    raise InvalidData(f"{folder} has neither {FILES[0]} nor {FILES[1]}; expected a PEFT adapter's folder")


def _fitting(patterns: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule: a pattern fits a module's whole name, or all of it from some dot on."""
    for pattern, value in patterns.items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise InvalidData(
                f"'{pattern}' in an adapter's rank_pattern or alpha_pattern is no pattern: {error}"
            ) from error
    return default


def _remaining_ties(base: WeightReader, replaced: Mapping[str, str]) -> dict[str, str]:
    """The base's ties without the tensors that the adapter replaces."""
    first: dict[str, str] = {}
    ties = {}
    for name in base.names:
        if name not in replaced:
            kept = first.setdefault(base.ties.get(name, name), name)
            if kept != name:
                ties[name] = kept
    return ties


def _check_replacement(tensor: str, info: TensorInfo, name: str, base: WeightReader) -> None:
    if name not in base.names:
        raise InvalidData(
            f"the adapter's tensor '{tensor}' replaces nothing: the base has no '{name}'; {_near(name, base)}"
        )
    own = base.info(name)
    same = info.shape == own.shape or (len(own.shape) == len(info.shape) == 2 and info.shape[1] == own.shape[1])
    if not same or not own.dtype.is_floating_point or not info.dtype.is_floating_point:
        raise InvalidData(
            f"the adapter's tensor '{tensor}' is {info.dtype} {list(info.shape)}; '{name}' of the base is {own.dtype} "
            f"{list(own.shape)}: expected that shape"
        )


def _check_delta(adapter: WeightReader, delta: Delta, rank: int, module: str, info: TensorInfo) -> None:
    """Raises InvalidData where s·left·right is no matrix of W's shape."""
    left, right = adapter.info(delta.left).shape, adapter.info(delta.right).shape
    if not info.dtype.is_floating_point:
        raise InvalidData(
            f"'{module}': the base's weight is {info.dtype}; an adapter needs the model before quantisation"
        )
    a, b = (left, right) if delta.transposed else (right, left)
    matrices = len(a) == len(b) == 2 or (len(a) == len(b) == len(info.shape) and not delta.transposed)
    shape = info.shape[::-1] if delta.transposed else info.shape
    fits = matrices and a == (rank, *shape[1:]) and b == (shape[0], rank, *[1] * (len(b) - 2))
    if not fits:
        raise InvalidData(
            f"'{module}': A is {list(a)} and B {list(b)}, of rank {rank} by the configuration; they do not fit "
            f"the base's weight {list(info.shape)}"
        )


def _near(name: str, base: WeightReader) -> str:
    text = suggest(name, list(base.names))
    return text if len(text) < 200 else text.partition("expected one of")[0] + "is it an adapter of this model?"
