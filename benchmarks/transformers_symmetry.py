"""The symmetry of networks that others define: small configurations of `transformers`, exported as a user would.

    pip install transformers            # beside ensemerge[workshop]; the project itself does not need it
    python benchmarks/transformers_symmetry.py

Each network is exported by torch, its symmetry derived, and a random element of the group applied: the answers must
not change. Prints the spaces that were found, the largest relative difference, and operators without a rule.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from ensemerge.align.proof import prove_symmetry
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.symmetry import Symmetry
from ensemerge.graph.tidy import tidy

WORDS, TOKENS = 50, 7
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
STAGES = {"hidden_sizes": [8, 12], "depths": [2, 2], "num_labels": 3}


@dataclass(frozen=True)
class Kind:
    """A configuration of transformers and the network that is made of it; `image` is the size of images, 0 for text."""

    configuration: str
    network: str
    options: Mapping[str, Any]
    image: int = 0


KINDS: Mapping[str, Kind] = {
    "bert": Kind("BertConfig", "BertForSequenceClassification", SIZES),
    "roberta": Kind("RobertaConfig", "RobertaForSequenceClassification", SIZES),
    "gpt2": Kind("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}),
    "gpt-neox": Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "llama": Kind("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "vit": Kind(
        "ViTConfig",
        "ViTForImageClassification",
        {**{name: SIZES[name] for name in list(SIZES)[:4]}, "image_size": 16, "patch_size": 4, "num_labels": 3},
        16,
    ),
    "resnet": Kind("ResNetConfig", "ResNetForImageClassification", {**STAGES, "embedding_size": 8}, 32),
    "convnext": Kind("ConvNextConfig", "ConvNextForImageClassification", {**STAGES, "num_stages": 2}, 32),
    "mobilenet": Kind(
        "MobileNetV2Config", "MobileNetV2ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}, 32
    ),
}


class Answer(nn.Module):
    """A network of transformers as one from one tensor to one."""

    def __init__(self, network: nn.Module, image: int) -> None:
        super().__init__()
        self.network = network
        self.given = "pixel_values" if image else "input_ids"

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.network(**{self.given: given}).logits
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, derive, prove, show."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("network", "spaces: units, and for each of how many", "difference", "seconds", "without a rule"):
        table.add_column(heading)
    for name in options.networks:
        table.add_row(name, *_examined(KINDS[name]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


def _examined(kind: Kind) -> tuple[str, str, str, str]:
    """Raises CheckFailed where a random element of the group changes the network."""
    model, given = _exported(kind)
    began = time.perf_counter()
    symmetry = derive_symmetry(model, {"given": given})
    seconds = time.perf_counter() - began
    check = prove_symmetry(model, symmetry, [{"given": given}])
    missing = ", ".join(f"{operator} {count}" for operator, count in symmetry.without_rule.items())
    return _spaces(symmetry), f"{check.difference:.1e}", f"{seconds:.2f}", missing


def _exported(kind: Kind) -> tuple[ir.Model, np.ndarray]:
    import transformers

    torch.manual_seed(0)
    configuration = getattr(transformers, kind.configuration)(**kind.options)
    make: Callable[[Any], nn.Module] = getattr(transformers, kind.network)
    network = make(configuration).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    given = torch.randn(2, 3, kind.image, kind.image) if kind.image else torch.randint(2, WORDS, (2, TOKENS))
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            Answer(network, kind.image),
            (given,),
            dynamo=True,
            input_names=["given"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=20,
            optimize=False,
            verbose=False,
        )
    assert program is not None  # with dynamo it returns a program
    model: ir.Model = program.model
    tidy(model)
    return model, given.numpy()


def _spaces(symmetry: Symmetry) -> str:
    counted = Counter(
        " of ".join([str(space.size), *(str(symmetry.spaces[outer].size) for outer in space.within)])
        for space in symmetry.free
    )
    return ", ".join(f"{count} × {size}" for size, count in counted.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/transformers_symmetry.py", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(KINDS), choices=KINDS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
