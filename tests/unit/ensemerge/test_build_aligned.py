"""Merges of networks that were trained apart, as a user declares them: aligned, zipped, with heads of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.zoo import exported, feeds
from torch import nn

from ensemerge.align.proof import permuted
from ensemerge.build import build
from ensemerge.errors import EnsemergeError, InvalidData, InvalidModel, InvalidSpec
from ensemerge.export import InputSpec, publish_module
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.files import load
from ensemerge.graph.permute import random_permutations
from ensemerge.graph.run import Runner
from ensemerge.graph.surgery import held_tensors
from ensemerge.repository import Repository, Version


def put(repository: Repository, name: str, model: ir.Model) -> None:
    path = repository.root / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    ir.save(model, path)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A network, itself with its units in another order, and another network of the kind."""
    made = Repository(tmp_path / "models", create=True)
    for name, kind in (("net", "resnet"), ("vit", "vit")):
        model = exported(kind)
        symmetry = derive_symmetry(model)
        drawn = random_permutations(symmetry, np.random.default_rng(0))
        put(made, name, model)
        put(made, f"{name}-shuffled", permuted(model, symmetry, drawn))
        put(made, f"{name}-other", exported(kind, 1))
    return made


def merged(
    repository: Repository, models: list[str], data: dict[str, np.ndarray] | None = None, **body: Any
) -> Version:
    spec = {"kind": "merge", "models": models, **body}
    if data is not None:
        (repository.root / "merged").mkdir(exist_ok=True)
        np.savez(repository.root / "merged" / "data.npz", **data)  # type: ignore[arg-type]
        spec["calibration"] = {"data": "data.npz", "restore": "nothing", **body.get("calibration", {})}
    repository.write_spec("merged", spec)
    return build(repository, "merged")


def answer(path: Path, kind: str) -> np.ndarray:
    (found,) = Runner(path).run(feeds(kind, rows=6, seed=5)).values()
    return found


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("weight_matching", {}),
    ("activation_matching", {}),
    ("mudsc", {"alpha": 0.5}),
    ("mudsc", {"alpha": "auto"}),
    ("zipit", {"budget": 0.0}),
    ("mudsc", {"alpha": 0.4, "matching": "zip", "budget": 0.0}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS)
@pytest.mark.parametrize(("name", "kind"), [("net", "resnet"), ("vit", "vit")])
def test_a_network_merged_with_its_shuffled_self_is_itself(
    repository: Repository, method: str, parameters: dict[str, Any], name: str, kind: str
) -> None:
    data = None if method == "weight_matching" else feeds(kind, rows=200)
    version = merged(repository, [name, f"{name}-shuffled"], data, merge_method=method, parameters=parameters)
    assert version.manifest is not None
    assert f"aligned:{name}-shuffled" in [check.name for check in version.manifest.checks]
    assert version.manifest.figures["exact"] == float(method != "zipit" and parameters.get("matching") != "zip")
    expected = answer(repository.version(name).model_path, kind)
    assert np.abs(answer(version.model_path, kind) - expected).max() <= 1e-5 * np.abs(expected).max()


class Perceptron(nn.Module):
    """One hidden layer, of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(features)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_networks_of_two_widths_are_fused(tmp_path: Path, regularization: float) -> None:
    repository = Repository(tmp_path / "models", create=True)
    for name, width in (("wide", 12), ("narrow", 8)):
        torch.manual_seed(width)
        publish_module(repository, name, Perceptron(width), [InputSpec("features", (4,))])
    parameters = {"regularization": regularization}
    version = merged(repository, ["wide", "narrow"], merge_method="ot_fusion", parameters=parameters)
    (got,) = Runner(version.model_path).run({"features": np.ones((5, 4), np.float32)}).values()
    assert got.shape == (5, 3)
    assert np.isfinite(got).all()
    weights = held_tensors(load(version.model_path))
    assert tuple(weights["first.weight"].numpy().shape) == (12, 4)


def test_networks_of_one_width_are_fused_as_they_are_matched(repository: Repository) -> None:
    version = merged(repository, ["net", "net-shuffled"], merge_method="ot_fusion")
    expected = answer(repository.version("net").model_path, "resnet")
    assert np.abs(answer(version.model_path, "resnet") - expected).max() <= 1e-4 * np.abs(expected).max()


def test_any_method_may_merge_aligned_networks(repository: Repository) -> None:
    version = merged(
        repository, ["net", "net-shuffled"], merge_method="slerp", parameters={"t": 0.3}, align={"by": "weights"}
    )
    expected = answer(repository.version("net").model_path, "resnet")
    assert np.abs(answer(version.model_path, "resnet") - expected).max() <= 1e-4 * np.abs(expected).max()


def test_three_networks(repository: Repository) -> None:
    names = ["net", "net-shuffled", "net-other"]
    version = merged(repository, names, merge_method="weight_matching")
    assert version.manifest is not None
    checks = [check.name for check in version.manifest.checks]
    assert checks == ["aligned:net-shuffled", "aligned:net-other"]


@pytest.mark.parametrize("parameters", [{"alpha": 0.5}, {"alpha": 0.5, "matching": "zip", "budget": 0.0}])
def test_heads_read_the_trunk_in_their_own_order(repository: Repository, parameters: dict[str, Any]) -> None:
    version = merged(
        repository,
        ["net", "net-shuffled"],
        feeds("resnet", rows=200),
        merge_method="mudsc",
        parameters=parameters,
        trunk="mean",
    )
    answers = Runner(version.model_path).run(feeds("resnet", rows=6, seed=5))
    assert list(answers) == ["net_answer", "net-shuffled_answer"]
    expected = answer(repository.version("net").model_path, "resnet")
    for got in answers.values():
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_repair_after_alignment_brings_back_the_parents_moments(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models", create=True)
    for seed in (0, 1):
        put(repository, f"vgg-{seed}", exported("vgg", seed))
    data = feeds("vgg", rows=200)
    restore = {"calibration": {"restore": "repair"}}
    version = merged(repository, ["vgg-0", "vgg-1"], data, merge_method="weight_matching", **restore)
    assert version.manifest is not None
    assert next(check.name for check in version.manifest.checks) == "aligned:vgg-1"
    assert len(version.manifest.checks) == 2


REFUSED: list[tuple[dict[str, Any], type[EnsemergeError], str]] = [
    ({"merge_method": "mudsc"}, InvalidSpec, "similarity by both needs data"),
    (
        {"merge_method": "mudsc", "parameters": {"alpha": 2}},
        InvalidSpec,
        "'alpha' is 2.0; expected a number from 0 to 1",
    ),
    (
        {"merge_method": "mudsc", "parameters": {"alpha": "best"}},
        InvalidSpec,
        "expected a number from 0 to 1, or 'auto'",
    ),
    ({"merge_method": "mudsc", "parameters": {"matching": "zap"}}, InvalidSpec, "did you mean 'zip'"),
    ({"merge_method": "mudsc", "parameters": {"alfa": 1}}, InvalidSpec, "unknown parameter 'alfa'"),
    ({"merge_method": "mudsc", "align": "weights"}, InvalidSpec, "'mudsc' aligns by itself; leave out 'align'"),
    ({"align": "wieghts"}, InvalidSpec, "did you mean 'weights'"),
    ({"align": {"by": "weights", "start": 3}}, InvalidSpec, "unknown key 'start'"),
    ({"align": {"starts": -1}}, InvalidSpec, "'starts' is -1; expected at least 0"),
    ({"align": {"budget": 1.5, "matching": "zip"}}, InvalidSpec, "'budget' is 1.5; expected a value from 0 to 1"),
    ({"align": {"by": "both", "matching": "transport"}}, InvalidSpec, "a transport compares weights"),
    ({"merge_method": "ot_fusion", "parameters": {"regularization": -1}}, InvalidSpec, "at least 0"),
    ({"trunk": "meen"}, InvalidSpec, "net has no such value; did you mean 'mean'"),
    ({"trunk": "relu_3"}, InvalidModel, "do not follow from 'relu_3' alone"),
]


@pytest.mark.parametrize(("body", "kind", "said"), REFUSED)
def test_what_cannot_be_aligned_is_refused(
    repository: Repository, body: dict[str, Any], kind: type[EnsemergeError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        merged(repository, ["net", "net-other"], **body)
    assert not repository.versions("merged")


def test_calibration_data_of_the_wrong_shape(repository: Repository) -> None:
    wrong = {"image": np.zeros((4, 3, 9, 9), np.float32)[:, :2]}
    with pytest.raises(EnsemergeError, match="the model failed on rows 0 and up"):
        merged(repository, ["net", "net-other"], wrong, merge_method="activation_matching")


def test_weights_that_are_not_finite(repository: Repository) -> None:
    broken = exported("resnet", 2).clone()
    weight = broken.graph.initializers["head.bias"]
    weight.const_value = ir.tensor(np.full(3, np.nan, np.float32))
    put(repository, "broken", broken)
    with pytest.raises(InvalidData, match=r"weight 'head.bias' of network 2 holds NaN"):
        merged(repository, ["net", "broken"], merge_method="weight_matching")


def test_networks_of_other_shapes(repository: Repository) -> None:
    with pytest.raises(InvalidModel, match="expected"):
        merged(repository, ["net", "vit"], merge_method="weight_matching")
