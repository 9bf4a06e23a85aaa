"""`ensemerge merge` on ONNX graphs, and checkpoints put into an export."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from support.graphs import FEATURES, IMAGE, from_text, images, linear_text, tiny_net
from torch import nn

from ensemerge.cli.merge import main
from ensemerge.export import export_module
from ensemerge.graph.run import Runner

LINEAR = """
merge_method: linear
models:
  - {{model: {first}, parameters: {{weight: 1}}}}
  - {{model: {second}, parameters: {{weight: 1}}}}
"""


def merge(folder: Path, *options: str, first: str = "a.onnx", second: str = "b.onnx") -> int:
    (folder / "recipe.yaml").write_text(LINEAR.format(first=first, second=second))
    return main([str(folder / "recipe.yaml"), "--out", str(folder / "out"), *options])


def averaged(networks: list[nn.Module]) -> nn.Module:
    """The first network with the mean of both's weights."""
    states = [network.state_dict() for network in networks]
    mean = {
        name: (value + states[1][name]) / 2 if value.is_floating_point() else value for name, value in states[0].items()
    }
    networks[0].load_state_dict(mean)
    return networks[0].eval()


def test_graphs_of_one_architecture_become_one_graph(tmp_path: Path) -> None:
    networks: list[nn.Module] = [tiny_net(1), tiny_net(2)]
    for name, network in zip("ab", networks, strict=True):
        export_module(network, [IMAGE], ["logits"], tmp_path / f"{name}.onnx")
    assert merge(tmp_path) == 0
    (answer,) = Runner(tmp_path / "out" / "model.onnx").run({"image": images(5)}).values()
    expected = averaged(networks)(torch.from_numpy(images(5))).detach().numpy()
    assert answer == pytest.approx(expected, abs=1e-5)


def test_names_and_constants_as_nodes_are_told_by_structure(tmp_path: Path) -> None:
    ir.save(from_text(linear_text(1)), tmp_path / "a.onnx")
    other = from_text(linear_text(2, prefix="other_"))
    weight = other.graph.initializers.pop("other_w")
    constant = ir.node("Constant", [], attributes={"value": weight.const_value}, name="constant")
    other.graph.insert_before(other.graph[0], constant)
    other.graph[1].replace_input_with(1, constant.outputs[0])
    ir.save(other, tmp_path / "b.onnx")
    assert merge(tmp_path) == 0
    row = np.ones((2, FEATURES), np.float32)
    one, two, merged = (
        next(iter(Runner(path).run({"x": row}).values()))
        for path in (tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "out" / "model.onnx")
    )
    assert merged == pytest.approx((one + two) / 2, abs=1e-5)


def test_graphs_that_differ_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(from_text(linear_text(1)), tmp_path / "a.onnx")
    ir.save(from_text(linear_text(2, softmax=True)), tmp_path / "b.onnx")
    assert merge(tmp_path) == 1
    assert "expected graphs of one architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_graphs_and_checkpoints_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(from_text(linear_text(1)), tmp_path / "a.onnx")
    save_file({"w": torch.ones(FEATURES, 3)}, tmp_path / "b.safetensors")
    assert merge(tmp_path, second="b.safetensors") == 1
    assert "b.safetensors is no ONNX model" in capsys.readouterr().err


class Perceptron(nn.Module):
    """Linear layers on sequences, whose weights the exporter keeps transposed under names of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("exported", ["a", "b"])
def test_a_merged_checkpoint_goes_into_an_export_of_one_of_its_models(tmp_path: Path, exported: str) -> None:
    networks: list[nn.Module] = [Perceptron(1).eval(), Perceptron(2).eval()]
    for name, network in zip("ab", networks, strict=True):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    rows = torch.randn(2, 5, 4)
    model = torch.onnx.export(networks["ab".index(exported)], (rows,), dynamo=True, verbose=False)
    assert model is not None
    model.save(str(tmp_path / "export.onnx"))
    graph = str(tmp_path / "export.onnx")
    assert merge(tmp_path, "--graph", graph, first="a.safetensors", second="b.safetensors") == 0
    runner = Runner(tmp_path / "out" / "model.onnx")
    (answer,) = runner.run({"x": rows.numpy()}).values()
    assert answer == pytest.approx(averaged(networks)(rows).detach().numpy(), abs=1e-5)


def test_an_export_of_another_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("ab"):
        save_file(Perceptron(seed).state_dict(), tmp_path / f"{name}.safetensors")
    ir.save(from_text(linear_text(1)), tmp_path / "export.onnx")
    graph = str(tmp_path / "export.onnx")
    assert merge(tmp_path, "--graph", graph, first="a.safetensors", second="b.safetensors") == 1
    assert "the graph holds no weight with the values of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
