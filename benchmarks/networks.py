"""The benchmarks' networks, built on the spot.

Three are served, a tiny, a middling and a large one, with random weights: speed does not depend on what the weights
are, as long as no value underflows. Others are trained and merged, or aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ensemerge.export import InputSpec, Provenance, publish_module
from ensemerge.repository import Repository, Version

CLASSES = 10
VOCABULARY = 30_522
TOKENS = 128
SEED = 7


def perceptron() -> nn.Module:
    """One hidden layer, 64-128-10: next to nothing to compute, so the server's own cost is what shows."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, section 4.2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            _convolution(channels_in, channels_out, 3, stride),
            nn.ReLU(),
            _convolution(channels_out, channels_out, 3, 1),
        )
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(channels_in, channels_out, 1, stride)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, channels_in, height, width)` to `(batch, channels_out, height / stride, width / stride)`."""
        return functional.relu(self.path(features) + self.shortcut(features))


class MeanOverPositions(nn.Module):
    """`(batch, channels, height, width)` to `(batch, channels)`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean((2, 3))


def residual_network(width: int = 1, outputs: int = CLASSES) -> nn.Module:
    """ResNet-20 for images `(batch, 3, 32, 32)`: nine blocks on 16, 32 and 64 channels, times `width`.

    0.27 M weights times width².
    """
    channels = [width * few for few in (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)]
    blocks = [ResidualBlock(before, after, stride=1 if before == after else 2) for before, after in pairwise(channels)]
    head = (MeanOverPositions(), nn.Linear(channels[-1], outputs))
    return nn.Sequential(_convolution(3, channels[0], 3, 1), nn.ReLU(), *blocks, *head)


def plain_network(width: int = 1, outputs: int = CLASSES) -> nn.Module:
    """VGG-11 without normalisation for images `(batch, 3, 32, 32)`: eight convolutions, a linear head.

    16 to 128 channels times `width`, 0.58 M weights times width²; width 4 is the published size (Simonyan and Zisserman
    2014, arXiv:1409.1556, table 1, A). Stages are halved by max pooling.
    """
    stages = ((1,), (2,), (4, 4), (8, 8), (8, 8))
    layers: list[nn.Module] = []
    before = 3
    for channels in stages:
        for after in (16 * width * factor for factor in channels):
            convolution = nn.Conv2d(before, after, 3, padding=1)
            # With torch's own start the signal fades from layer to layer, and nothing normalises it.
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.ReLU()]
            before = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, outputs))


class BottleneckBlock(nn.Module):
    """Three convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385, figure 5), strided in the middle one."""

    def __init__(self, channels_in: int, channels: int, stride: int, scale: float) -> None:
        super().__init__()
        channels_out = 4 * channels
        self.path = nn.Sequential(
            _convolution(channels_in, channels, 1, 1),
            nn.ReLU(),
            _convolution(channels, channels, 3, stride),
            nn.ReLU(),
            nn.Conv2d(channels, channels_out, 1, bias=False),
            _scaled_norm(channels_out, scale),
        )
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(channels_in, channels_out, 1, stride)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, channels_in, height, width)` to `(batch, 4·channels, height / stride, width / stride)`."""
        return functional.relu(self.path(features) + self.shortcut(features))


def _scaled_norm(channels: int, scale: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.weight, scale)
    return norm


def bottleneck_network(scale: float, outputs: int = 1000) -> nn.Module:
    """ResNet-50 for images `(batch, 3, height, width)`, 25.6 M weights (arXiv:1512.03385, table 1).

    `scale` is how much each block adds to its shortcut at first.
    """
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    before = 64
    for channels, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            layers.append(BottleneckBlock(before, channels, 1 if number else stride, scale))
            before = 4 * channels
    return nn.Sequential(*layers, MeanOverPositions(), nn.Linear(before, outputs))


def _convolution(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised after (as BERT does)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` to the same shape."""
        states = self.norms[0](states + self._attend(states))
        normalised: torch.Tensor = self.norms[1](states + self.feed_forward(states))
        return normalised

    def _attend(self, states: torch.Tensor) -> torch.Tensor:
        # three times (batch, heads, tokens, width / heads)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(states).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        attended: torch.Tensor = self.attended(mixed.transpose(1, 2).flatten(2))  # heads side by side again
        return attended


class Encoder(nn.Module):
    """A transformer of MiniLM-L6's size: six layers of width 384, 22.4 M weights with the embeddings.

    Sizes as in Wang et al. 2020, arXiv:2002.10957.
    """

    def __init__(self, width: int = 384, heads: int = 12, layers: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(TOKENS, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)` of token ids `(batch, 128)`: a linear head on the mean over tokens."""
        states = self.layers(self.norm(self.words(tokens) + self.positions))
        logits: torch.Tensor = self.head(states.mean(1))
        return logits


@dataclass(frozen=True)
class Network:
    """A network to be built, and the one input that it takes."""

    what: str
    build: Callable[[], nn.Module]
    input: InputSpec


NETWORKS: Mapping[str, Network] = {
    "tiny": Network("perceptron 64-128-10", perceptron, InputSpec("features", (64,))),
    "middling": Network("ResNet-20, 3×32×32", residual_network, InputSpec("image", (3, 32, 32))),
    "large": Network(
        "transformer, 22 M weights, 128 tokens", Encoder, InputSpec("tokens", (TOKENS,), "int64", VOCABULARY)
    ),
}


def example(name: str) -> dict[str, np.ndarray]:
    """One row of random inputs for the network `name`, by input name: the same every time."""
    spec = NETWORKS[name].input
    return {spec.name: spec.example(1, torch.Generator().manual_seed(SEED)).numpy()}


def publish(repository: Repository, name: str) -> Version:
    """Build the network `name` with weights drawn from `SEED` and export it into `repository`."""
    torch.manual_seed(SEED)
    network = NETWORKS[name]
    return publish_module(repository, name, network.build(), [network.input], provenance=Provenance(seed=SEED))
