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
from ensemerge.merge.engine import Job
from ensemerge.merge.onnx_forms import GraphForm, Spot, Spots, find_spots
from ensemerge.merge.plan import Output
from ensemerge.weights.open import open_weights
from ensemerge.weights.reader import TensorInfo

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


def write_linear(path: Path, seed: int, constants: bool) -> None:
    """A matrix and a bias, as initializers or as Constant nodes."""
    model = from_text(linear_text(seed))
    for name in ("w", "b") if constants else ():
        value = model.graph.initializers.pop(name)
        node = ir.node("Constant", [], attributes={"value": value.const_value}, name=name)
        model.graph.insert_before(model.graph[0], node)
        node.outputs[0].name = f"{name}_held"
        value.replace_all_uses_with(node.outputs[0])
    ir.save(model, path)


@pytest.mark.parametrize("kinds", [(True, False), (False, True), (True, True)])
def test_any_of_the_models_may_keep_its_weights_in_constant_nodes(tmp_path: Path, kinds: tuple[bool, bool]) -> None:
    for seed, (name, constants) in enumerate(zip("ab", kinds, strict=True)):
        write_linear(tmp_path / f"{name}.onnx", seed, constants)
    assert merge(tmp_path) == 0
    row = np.ones((2, FEATURES), np.float32)
    one, two, merged = (
        next(iter(Runner(path).run({"x": row}).values()))
        for path in (tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "out" / "model.onnx")
    )
    assert merged == pytest.approx((one + two) / 2, abs=1e-5)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_another_dtype_than_the_graphs_is_refused_by_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    for seed, name in enumerate("ab"):
        ir.save(from_text(linear_text(seed)), tmp_path / f"{name}.onnx")
    recipe = LINEAR.format(first="a.onnx", second="b.onnx")
    for dtype, status in (("bfloat16", 1), ("float32", 0)):
        (tmp_path / "recipe.yaml").write_text(f"{recipe}{key}: {dtype}\n")
        assert main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == status
    assert f"`{key}: bfloat16`: a merge of ONNX models keeps the dtypes" in capsys.readouterr().err


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


SQUARE = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 3] x) => (float[batch, 3] y) <float[3, 3] lin.weight = {%s}>
    { y = MatMul(x, lin.weight) }
"""


def write_square(folder: Path, exported: torch.Tensor, **weights: torch.Tensor) -> int:
    """Merge checkpoints of one square matrix into an export that keeps `exported` under its name."""
    for name, weight in weights.items():
        save_file({"lin.weight": weight}, folder / f"{name}.safetensors")
    values = ", ".join(str(value) for value in exported.reshape(-1).tolist())
    ir.save(from_text(SQUARE.replace("lin.weight", "lin_weight") % values), folder / "export.onnx")
    model = ir.load(folder / "export.onnx")
    model.graph.initializers["lin_weight"].name = "lin.weight"
    ir.save(model, folder / "export.onnx")
    graph = str(folder / "export.onnx")
    return merge(folder, "--graph", graph, first="a.safetensors", second="b.safetensors")


@pytest.mark.parametrize("exported", ["a", "b"])
def test_a_square_weight_kept_transposed_under_its_own_name_is_turned(tmp_path: Path, exported: str) -> None:
    weights = {name: torch.arange(9.0).reshape(3, 3) * scale for name, scale in (("a", 1), ("b", 3))}
    assert write_square(tmp_path, weights[exported].T, **weights) == 0
    rows = torch.eye(3)
    (answer,) = Runner(tmp_path / "out" / "model.onnx").run({"x": rows.numpy()}).values()
    assert answer.tolist() == (2 * torch.arange(9.0).reshape(3, 3)).T.tolist()


def test_an_export_with_other_values_under_the_same_names_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: torch.arange(9.0).reshape(3, 3) * scale for name, scale in (("a", 1), ("b", 3))}
    assert write_square(tmp_path, torch.arange(9.0).reshape(3, 3) + 1, **weights) == 1
    told = " ".join(capsys.readouterr().err.split())
    for name in "ab":
        assert f"as an export of {name}.safetensors: the graph's weight 'lin.weight' has other values" in told
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_reads_the_same_both_ways_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_square(tmp_path, torch.zeros(3, 3), a=torch.zeros(3, 3), b=torch.ones(3, 3)) == 1
    assert "has the same values when it is transposed" in " ".join(capsys.readouterr().err.split())


def spots_of(tensors: dict[str, torch.Tensor], graph: dict[str, torch.Tensor], folder: Path) -> Spots:
    """Where the tensors of a checkpoint are found in a graph that holds some."""
    save_file(tensors, folder / "model.safetensors")
    model = from_text(linear_text(0))
    for name, tensor in graph.items():
        model.graph.initializers[name] = ir.val(name, const_value=ir.tensor(tensor.numpy(), name=name))
    layout = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return find_spots(model, open_weights(folder / "model.safetensors"), layout)


def test_empty_and_scalar_tensors_are_found_by_name(tmp_path: Path) -> None:
    tensors = {"empty": torch.zeros(0, 3), "scale": torch.tensor(2.0), "steps": torch.tensor(5)}
    found = spots_of(tensors, tensors | {"other": torch.ones(0, 3), "mine": torch.ones(2)}, tmp_path)
    assert found == {name: [Spot(name)] for name in tensors}


def test_values_are_compared_in_the_dtype_that_both_hold(tmp_path: Path) -> None:
    exact = torch.randn(4, 4)
    assert spots_of({"m": exact.bfloat16()}, {"m": exact}, tmp_path) == {"m": [Spot("m")]}
    assert spots_of({"m": exact}, {"m": exact.half()}, tmp_path) == {"m": [Spot("m")]}


@pytest.mark.parametrize("cores", [1, 3, 20])
def test_as_many_turned_tensors_are_counted_as_there_are_cores(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    jobs = tuple(Job(f"m{k}", TensorInfo((k, 1), torch.float32), (), None, None) for k in range(1, 11))
    form = GraphForm(from_text(linear_text(0)), Path("export.onnx"), {job.name: [Spot("w", True)] for job in jobs})
    largest = sorted((job.info.nbytes for job in jobs), reverse=True)[:cores]
    assert form.extra_bytes(Output("", jobs)) == 2 * sum(largest)
