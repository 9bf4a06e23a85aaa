from pathlib import Path

import pytest
import torch
from support.graphs import IMAGE, tiny_net
from torch import nn

from ensemerge.errors import CheckFailed, InvalidModel
from ensemerge.export import InputSpec, export_module, publish_module
from ensemerge.graph.files import load
from ensemerge.repository import Repository, Task


def test_the_manifest_says_what_was_checked(tmp_path: Path) -> None:
    version = publish_module(Repository(tmp_path), "net", tiny_net(0), [IMAGE], sources={"net.pt": "00"}, seed=3)
    manifest = version.manifest
    assert manifest is not None
    checks = {check.name: check for check in manifest.checks}
    assert checks["equals_torch"].difference <= checks["equals_torch"].bound
    assert checks["keeps_batch_norm"].detail == "2 BatchNormalization nodes"
    assert manifest.task == Task("classification", "logits", "logits", ("0", "1", "2"))
    assert (manifest.inputs, manifest.seed) == ({"net.pt": "00"}, 3)


def test_normalisation_and_names_survive_and_clutter_does_not(tmp_path: Path) -> None:
    export_module(tiny_net(0), [IMAGE], ["logits"], tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    operators = [node.op_type for node in model.graph]
    assert operators.count("BatchNormalization") == 2
    assert not {"Shape", "Expand", "CastLike", "Constant"} & set(operators)
    assert {"first.weight", "first_norm.running_mean", "head.bias"} <= set(model.graph.initializers)
    first, second = (node for node in model.graph if node.op_type == "Conv")
    assert (len(first.inputs), len(second.inputs)) == (2, 3)


def test_no_path_of_this_machine_is_left_in_the_file(tmp_path: Path) -> None:
    export_module(tiny_net(0), [IMAGE], ["logits"], tmp_path / "model.onnx")
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_integer_inputs_are_drawn_below_their_bound(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 3))
    tokens = InputSpec("tokens", (5,), "int64", 11)
    checks = export_module(network, [tokens], ["logits"], tmp_path / "model.onnx")
    assert checks[0].difference <= checks[0].bound


class Moody(nn.Module):
    """Answers something else each time: an export that cannot be right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Breaking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such layer")


def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="differs from torch"):
        publish_module(Repository(tmp_path), "moody", Moody(), [InputSpec("x", (3,))])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="torch cannot export the module"):
        export_module(Breaking(), [InputSpec("x", (3,))], ["y"], tmp_path / "model.onnx")
