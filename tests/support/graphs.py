"""Small networks, written as text or made at random on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from ensemerge.build import build
from ensemerge.export import InputSpec, Provenance, publish_module
from ensemerge.repository import Repository, Version

CLASSES = 3
FEATURES = 4


def from_text(text: str) -> ir.Model:
    """A model from ONNX's textual form, checked."""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def linear_text(seed: int = 0, *, softmax: bool = False, prefix: str = "") -> str:
    """`(batch, 4) float` to three classes: one matrix and a bias; names may carry a prefix."""
    generator = np.random.default_rng(seed)
    weights = ", ".join(f"{value:.4f}" for value in generator.standard_normal(FEATURES * CLASSES))
    bias = ", ".join(f"{value:.4f}" for value in generator.standard_normal(CLASSES))
    end = f"{prefix}z = Add({prefix}h, {prefix}b)\n logits = Softmax<axis=-1>({prefix}z)"
    return f"""
        <ir_version: 10, opset_import: ["" : 20]>
        linear (float[batch, {FEATURES}] x) => (float[batch, {CLASSES}] logits)
        <float[{FEATURES}, {CLASSES}] {prefix}w = {{{weights}}}, float[{CLASSES}] {prefix}b = {{{bias}}}>
        {{
            {prefix}h = MatMul(x, {prefix}w)
            {end if softmax else f"logits = Add({prefix}h, {prefix}b)"}
        }}
    """


def write_linear(repository: Path, name: str, seed: int = 0, *, version: int = 1) -> Path:
    """A plain ONNX model as a user would copy it into a repository: no manifest, no model.yaml."""
    path = repository / name / str(version) / "model.onnx"
    path.parent.mkdir(parents=True)
    ir.save(from_text(linear_text(seed)), path)
    return path


class TinyNet(nn.Module):
    """Two convolutions with batch normalisation on 1x6x6 images, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 8, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first_norm(self.first(image)))
        hidden = torch.relu(self.second_norm(self.second(hidden)))
        return self.head(hidden.mean((2, 3)))  # type: ignore[no-any-return]


IMAGE = InputSpec("image", (1, 6, 6))


def tiny_net(seed: int) -> TinyNet:
    """A TinyNet with weights and statistics of its own."""
    torch.manual_seed(seed)
    network = TinyNet()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean = torch.randn(part.num_features) * 0.3
                part.running_var = torch.rand(part.num_features) + 0.5
    return network.eval()


def publish_tiny(repository: Repository, name: str, seed: int) -> Version:
    return publish_module(repository, name, tiny_net(seed), [IMAGE], provenance=Provenance(seed=seed))


def publish_family(repository: Repository) -> None:
    """Two networks `a` and `b`, their `ensemble` and their merge `merged`, built as a user would build them."""
    for name, seed in (("a", 1), ("b", 2)):
        publish_tiny(repository, name, seed)
    repository.write_spec("ensemble", {"kind": "ensemble", "members": ["a", "b"]})
    repository.write_spec("merged", {"kind": "merge", "models": [{"model": "a"}, {"model": "b"}]})
    for name in ("ensemble", "merged"):
        build(repository, name)


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 1, 6, 6)).astype(np.float32)
