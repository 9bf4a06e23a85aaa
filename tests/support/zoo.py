"""Small networks of every kind that the symmetry of a graph must be found for, with random weights everywhere."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from ensemerge.export import InputSpec, export_module
from ensemerge.graph.files import load

CLASSES = 3
IMAGE = (InputSpec("image", (3, 8, 8)),)
SEQUENCE = (InputSpec("sequence", (7, 5)),)
TOKENS = (InputSpec("tokens", (7,), "int64", 20),)
MASK, SEGMENTS = InputSpec("mask", (7,), "int64"), InputSpec("segments", (7,), "int64")
WORDS, HEADS = 20, 3


def split_heads(values: Tensor, heads: int) -> Tensor:
    """`(batch, tokens, heads·units)` to `(batch, heads, tokens, units)`."""
    batch, tokens, width = values.shape
    return values.view(batch, tokens, heads, width // heads).transpose(1, 2)


def join_heads(values: Tensor) -> Tensor:
    batch, heads, tokens, units = values.shape
    return values.transpose(1, 2).reshape(batch, tokens, heads * units)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def mlp_on_tokens() -> nn.Module:
    """Layers on three axes, which the exporter writes as MatMul, and then a layer on all tokens."""
    return nn.Sequential(nn.Linear(5, 10), nn.GELU(), nn.Linear(10, 4), nn.Flatten(), nn.Linear(28, CLASSES))


class Vgg(nn.Module):
    """Flattened with several places left: each channel is a block of inputs."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(12) if normalised else nn.Identity()
        first = [nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*first, nn.Conv2d(10, 12, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(48, 14), nn.ReLU(), nn.Linear(14, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).flatten(1))  # type: ignore[no-any-return]


Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = norm(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False, groups=groups)
        self.second_norm = norm(after)
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        self.shortcut = shortcut if before != after else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.first_norm(self.first(image)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(image))


class ResNet(nn.Module):
    def __init__(self, norm: Norm = nn.BatchNorm2d, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), norm(12), nn.ReLU())
        self.stages = nn.Sequential(Block(12, 12, 1, norm, groups), Block(12, 24, 2, norm, groups))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(image)).mean((2, 3)))  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """An inverted residual: depthwise, squeezed and excited."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, 1, 1)
        self.expand = nn.Sequential(nn.Conv2d(10, 24, 1), nn.BatchNorm2d(24), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1), nn.Hardsigmoid()
        )
        self.project = nn.Conv2d(24, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        stem = self.stem(image)
        hidden = self.depthwise(self.expand(stem))
        return self.head((stem + self.project(hidden * self.squeeze(hidden))).mean((2, 3)))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, 1, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3, 1, 1)) for width in (10, 16)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(22), nn.ReLU(), nn.Conv2d(22, 14, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(14, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        for layer in self.layers:
            features = torch.cat([features, layer(features)], 1)
        return self.head(self.transition(features).mean((2, 3)))  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, 2)
        self.depthwise = nn.Conv2d(12, 12, 7, 1, 3, groups=12)
        self.mix = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.scale = nn.Parameter(torch.rand(12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        stem = self.stem(image)
        mixed = self.mix(self.depthwise(stem).permute(0, 2, 3, 1)) * self.scale
        return self.head((stem + mixed.permute(0, 3, 1, 2)).mean((2, 3)))  # type: ignore[no-any-return]


class Packed(nn.Module):
    """Self-attention with queries, keys and values in one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.packed, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, stream: Tensor) -> Tensor:
        batch, tokens, width = stream.shape
        packed = self.packed(stream).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(join_heads(functional.scaled_dot_product_attention(query, key, value)))  # type: ignore[no-any-return]


class Separate(nn.Module):
    """Self-attention with a matrix each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.project = nn.Linear(width, width)

    def forward(self, stream: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (split_heads(part(stream), self.heads) for part in (self.query, self.key, self.value))
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.project(join_heads(heads))  # type: ignore[no-any-return]


class Vit(nn.Module):
    """Patches, a class token, learned positions, normalisation before attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.first_norm, self.second_norm = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = attention
        self.mix = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        stream = torch.cat([self.token.expand(image.shape[0], -1, -1), patches], 1) + self.positions
        stream = stream + self.attention(self.first_norm(stream))
        stream = stream + self.mix(self.second_norm(stream))
        return self.head(stream[:, 0])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Queries, keys and values apart; values have another width than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.query, self.key, self.value = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 18)
        self.project, self.head = nn.Linear(18, 12), nn.Linear(12, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        stream = self.embed(sequence)
        query, key, value = (split_heads(part(stream), HEADS) for part in (self.query, self.key, self.value))
        scores = torch.softmax(query @ key.transpose(-1, -2) / 2, -1)
        return self.head((stream + self.project(join_heads(scores @ value))).mean(1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """torch's own encoder, whose packed weights the exporter unpacks with Gather."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, HEADS, 20, batch_first=True, dropout=0.0)
        self.embed = nn.Linear(5, 12)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(sequence)).mean(1))  # type: ignore[no-any-return]


class Bert(nn.Module):
    """Embeddings of words, positions and segments, a mask, normalisation after each layer, a pooled first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.segments = nn.Embedding(WORDS, 12), nn.Embedding(8, 12), nn.Embedding(2, 12)
        self.norm, self.middle_norm, self.last_norm = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = Separate(12, HEADS)
        self.mix = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.pool, self.head = nn.Linear(12, 14), nn.Linear(14, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        positions = self.positions(torch.arange(tokens.shape[1]))[None]
        stream = self.norm(self.words(tokens) + positions + self.segments(segments))
        hidden = (1 - mask.float()[:, None, None, :]) * -1e4
        stream = self.middle_norm(stream + self.attention(stream, hidden))
        stream = self.last_norm(stream + self.mix(stream))
        return self.head(torch.tanh(self.pool(stream[:, 0])))  # type: ignore[no-any-return]


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, values: Tensor) -> Tensor:
        return self.weight * values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)


class Llama(nn.Module):
    """Rotary positions, four heads of queries on two of keys and values, a causal mask, a gated mix."""

    frequencies: Tensor

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.norms = nn.ModuleList(RmsNorm(16) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(16, width, bias=False) for width in (24, 12, 12))
        self.project = nn.Linear(24, 16, bias=False)
        self.gate, self.up = nn.Linear(16, 22, bias=False), nn.Linear(16, 22, bias=False)
        self.down = nn.Linear(22, 16, bias=False)
        self.register_buffer("frequencies", 1 / (100 ** (torch.arange(0, 6, 2) / 6)))

    def _rotated(self, values: Tensor) -> Tensor:
        angles = torch.arange(values.shape[2]).float()[:, None] * self.frequencies[None]
        angles = torch.cat([angles, angles], -1)
        half = torch.cat([-values[..., 3:], values[..., :3]], -1)
        return values * angles.cos() + half * angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.words(tokens)
        normed = self.norms[0](stream)
        query = self._rotated(split_heads(self.query(normed), 4))
        key, value = self._rotated(split_heads(self.key(normed), 2)), split_heads(self.value(normed), 2)
        key, value = (repeated(part) for part in (key, value))
        future = torch.full((tokens.shape[1], tokens.shape[1]), -1e4).triu(1)
        scores = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(6) + future, -1)
        stream = stream + self.project(join_heads(scores @ value))
        normed = self.norms[1](stream)
        stream = stream + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.norms[2](stream))[:, -1]  # type: ignore[no-any-return]


def repeated(values: Tensor) -> Tensor:
    """Each head of keys or values for two heads of queries."""
    batch, heads, tokens, units = values.shape
    return values[:, :, None].expand(batch, heads, 2, tokens, units).reshape(batch, 2 * heads, tokens, units)


class Recurrent(nn.Module):
    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(20 if layers.bidirectional else 10, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.layers(sequence)[0][:, -1])  # type: ignore[no-any-return]


class BothWays(Recurrent):
    """Read at every step: at the last one the way back has only begun, and has not used its state."""

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.layers(sequence)[0].mean(1))  # type: ignore[no-any-return]


class InstanceNormed(nn.Module):
    """Each image normalised by itself; slopes for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 10, 3, 1, 1), nn.InstanceNorm2d(10, affine=True), nn.PReLU(10)]
        second = [nn.Conv2d(10, 14, 3, 2, 1), nn.InstanceNorm2d(14, affine=True), nn.PReLU()]
        self.features = nn.Sequential(*first, *second)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))  # type: ignore[no-any-return]


class Unet(nn.Module):
    """Down and up again, with a shortcut that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3, 1, 1)
        self.down = nn.Sequential(nn.Conv2d(10, 12, 3, 2, 1), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12))
        self.up = nn.ConvTranspose2d(12, 14, 2, 2)
        self.last = nn.Conv2d(24, CLASSES, 3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = torch.relu(self.first(image))
        return self.last(torch.cat([first, self.up(self.down(first))], 1)).mean((2, 3))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Specimen:
    """How a network is made, what it is given, and the sizes of its free spaces, each after those it lies within."""

    make: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]
    spaces: tuple[tuple[int, ...], ...]


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4, channels)


HEAD = (HEADS,)
ZOO: Mapping[str, Specimen] = {
    "mlp": Specimen(mlp, (InputSpec("features", (6,)),), ((10,), (12,))),
    "mlp on tokens": Specimen(mlp_on_tokens, SEQUENCE, ((10,), (4,))),
    "vgg": Specimen(lambda: Vgg(normalised=False), IMAGE, ((10,), (12,), (14,))),
    "vgg with BatchNorm": Specimen(lambda: Vgg(normalised=True), IMAGE, ((10,), (12,), (14,))),
    "resnet": Specimen(ResNet, IMAGE, ((12,), (12,), (24,), (24,))),
    "resnet with GroupNorm": Specimen(
        lambda: ResNet(_group_norm), IMAGE, ((3,), (3, 4), (3,), (3, 4), (6,), (6, 4), (6,), (6, 4))
    ),
    "resnext": Specimen(lambda: ResNet(groups=3), IMAGE, ((3,), (3, 4), (3, 4), (3,), (3, 8), (3, 8))),
    "mobilenet": Specimen(MobileNet, IMAGE, ((6,), (10,), (24,))),
    "densenet": Specimen(DenseNet, IMAGE, ((6,), (6,), (10,), (14,))),
    "convnext": Specimen(ConvNeXt, IMAGE, ((12,), (20,))),
    "vit": Specimen(lambda: Vit(Packed(12, HEADS)), IMAGE, (HEAD, (HEADS, 4), (HEADS, 4), (12,), (20,))),
    "vit with matrices apart": Specimen(
        lambda: Vit(Separate(12, HEADS)), IMAGE, (HEAD, (HEADS, 4), (HEADS, 4), (12,), (20,))
    ),
    "attention": Specimen(Attention, SEQUENCE, (HEAD, (HEADS, 4), (HEADS, 6), (12,))),
    "encoder": Specimen(Encoder, SEQUENCE, (HEAD, HEAD, *((HEADS, 4),) * 4, (12,), (20,), (20,))),
    "bert": Specimen(Bert, (*TOKENS, MASK, SEGMENTS), (HEAD, (HEADS, 4), (HEADS, 4), (12,), (14,), (20,))),
    "llama": Specimen(lambda: Llama(tied=False), TOKENS, ((2,), (2, 2), (2, 6), (16,), (22,))),
    "llama with tied embeddings": Specimen(lambda: Llama(tied=True), TOKENS, ((2,), (2, 2), (2, 6), (16,), (22,))),
    "gru": Specimen(lambda: Recurrent(nn.GRU(5, 10, 2, batch_first=True)), SEQUENCE, ((10,), (10,))),
    "lstm": Specimen(lambda: Recurrent(nn.LSTM(5, 10, 2, batch_first=True)), SEQUENCE, ((10,), (10,))),
    "gru both ways": Specimen(
        lambda: BothWays(nn.GRU(5, 10, 2, batch_first=True, bidirectional=True)), SEQUENCE, ((2, 10), (2, 10))
    ),
    "instance norm": Specimen(InstanceNormed, IMAGE, ((10,), (14,))),
    "unet": Specimen(Unet, IMAGE, ((10,), (12,), (14,))),
}


def network(name: str, seed: int = 0) -> nn.Module:
    """One of them, in evaluation mode, with nothing left at 0 or 1."""
    torch.manual_seed(seed)
    made = ZOO[name].make()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean = torch.randn(part.num_features) * 0.3
                part.running_var = torch.rand(part.num_features) + 0.5
    return made.eval()


@functools.cache
def exported(name: str, seed: int = 0) -> ir.Model:
    """One of them as a graph, with its weights in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_module(network(name, seed), ZOO[name].inputs, ["answer"], path)
        model = load(path)
        ir.external_data.load_to_model(model)
        return model


def feeds(name: str, rows: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: spec.example(rows, generator).numpy() for spec in ZOO[name].inputs}
