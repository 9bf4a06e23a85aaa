from pathlib import Path

import pytest
import torch
from support.graphs import IMAGE, tiny_net
from torch import nn

from ensemerge.errors import CheckFailed, InvalidModel, InvalidSpec
from ensemerge.export import InputSpec, Provenance, export_module, publish_module
from ensemerge.graph.files import load
from ensemerge.repository import Repository, Task


def test_the_manifest_says_what_was_checked(tmp_path: Path) -> None:
    provenance = Provenance({"net.pt": "00"}, {"epochs": 3}, 3)
    version = publish_module(Repository(tmp_path), "net", tiny_net(0), [IMAGE], provenance=provenance)
    manifest = version.manifest
    assert manifest is not None
    checks = {check.name: check for check in manifest.checks}
    assert checks["equals_torch"].difference <= checks["equals_torch"].bound
    assert "of 2 that evaluation reaches" in checks["keeps_batch_norm"].detail
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
    with pytest.raises(CheckFailed, match=r"equals_torch: .* expected at most 1e-04"):
        publish_module(Repository(tmp_path), "moody", Moody(), [InputSpec("x", (3,))])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="torch cannot export the module"):
        export_module(Breaking(), [InputSpec("x", (3,))], ["y"], tmp_path / "model.onnx")


class Several(nn.Module):
    """A tuple of a tuple and a dict, one entry absent."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], None]:
        return self.head(x), {"double": 2 * x}, None


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, x.mean()


class WholeBatch(nn.Module):
    """Normalises over the batch: one caller's row would change another's answer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Sometimes(nn.Module):
    """Not a number for half of its inputs, in torch and in ONNX alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def test_several_outputs_are_compared_and_named(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    task = Task("classification", "logits")
    version = publish_module(repository, "s", Several(), [InputSpec("x", (4,))], outputs=("logits", "twice"), task=task)
    assert [value.name for value in load(version.model_path).graph.outputs] == ["logits", "twice"]
    assert version.manifest is not None
    assert version.manifest.task == Task("classification", "logits", "logits", ("0", "1", "2"))


def test_an_output_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="expected tensors whose first axis is the batch"):
        export_module(Scalar(), [InputSpec("x", (3,))], ["y"], tmp_path / "model.onnx")


def test_rows_that_influence_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="rows_are_independent"):
        export_module(WholeBatch(), [InputSpec("x", (3,))], ["y"], tmp_path / "model.onnx")


def test_not_a_number_equals_itself_and_nothing_else(tmp_path: Path) -> None:
    checks = export_module(Sometimes(), [InputSpec("x", (30,))], ["y"], tmp_path / "model.onnx")
    assert checks[0].difference <= checks[0].bound


def test_half_precision_has_a_bound_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).half()
    checks = export_module(network, [InputSpec("x", (16,), "float16")], ["y"], tmp_path / "model.onnx")
    assert checks[0].bound == 5e-3


class Auxiliary(nn.Module):
    """A head that only training uses, with a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.extra = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed + self.extra(x) if self.training else normed


def test_normalisation_that_evaluation_never_reaches_does_not_count(tmp_path: Path) -> None:
    checks = export_module(Auxiliary(), [InputSpec("x", (4,))], ["y"], tmp_path / "model.onnx")
    assert "of 1 that evaluation reaches" in checks[-1].detail


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Task("classification", "scores"), "output 'scores' is unknown; expected one of: logits"),
        (Task("classification", "logits", "logits", ("cat", "dog")), "2 classes are named, but 'logits' has 3 columns"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(tmp_path: Path, task: Task, text: str) -> None:
    with pytest.raises(InvalidSpec, match=text):
        publish_module(Repository(tmp_path), "net", tiny_net(0), [IMAGE], task=task)
