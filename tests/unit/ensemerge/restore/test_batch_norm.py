from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import IMAGE, from_text, images, linear_text, tiny_net
from torch import nn

from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.export import export_module
from ensemerge.graph.files import load
from ensemerge.graph.run import Runner
from ensemerge.graph.surgery import with_weights
from ensemerge.restore.batch_norm import restore_batch_norm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    path: Path = tmp_path_factory.mktemp("net") / "model.onnx"
    export_module(tiny_net(0), [IMAGE], ["logits"], path)
    return load(path)


def statistics(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def test_statistics_are_those_of_torch_over_the_whole_data(model: ir.Model) -> None:
    # One batch that holds all data: there torch's training mode and our waves define the same thing.
    network = tiny_net(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    network.train()
    data = images(600)  # several batches on our side
    with torch.no_grad():
        network(torch.from_numpy(data))
    restored = restore_batch_norm(model, {"image": data}).model
    samples = 600 * 36
    for layer in ("first_norm", "second_norm"):
        expected = getattr(network, layer)
        mean, variance = expected.running_mean.numpy(), expected.running_var.numpy()
        assert statistics(restored, f"{layer}.running_mean") == pytest.approx(mean, abs=1e-5)
        # torch stores the unbiased variance.
        unbiased = statistics(restored, f"{layer}.running_var") * samples / (samples - 1)
        assert unbiased == pytest.approx(variance, rel=1e-4)


def test_spoilt_statistics_come_back(model: ir.Model) -> None:
    data = {"image": images(100)}
    good = restore_batch_norm(model, data)
    spoilt = with_weights(good.model, {"first_norm.running_mean": np.full(4, 9, np.float32)})
    again = restore_batch_norm(spoilt, data)
    expected = Runner(good.model).run(data)["logits"]
    assert Runner(again.model).run(data)["logits"] == pytest.approx(expected, abs=1e-5)
    assert again.layers == 2


def test_every_wave_is_reported(model: ir.Model) -> None:
    seen: list[tuple[str, int, int]] = []
    restore_batch_norm(model, {"image": images(10)}, lambda *told: seen.append(told))
    assert seen == [("restore statistics", 1, 2), ("restore statistics", 2, 2)]


SHARED = """
    <ir_version: 10, opset_import: ["" : 20]>
    twice (float[batch, 2] image) => (float[batch, 2] y)
    <float[2] scale = {1, 1}, float[2] bias = {0, 0}, float[2] mean = {0, 0}, float[2] var = {1, 1}>
    {
        first = BatchNormalization(image, scale, bias, mean, var)
        y = BatchNormalization(first, scale, bias, mean, var)
    }
"""


def test_layers_that_share_statistics_are_refused() -> None:
    with pytest.raises(InvalidModel, match="layers 'first' and 'y' share the statistics 'mean'"):
        restore_batch_norm(from_text(SHARED), {"image": np.ones((4, 2), np.float32)})


def test_a_graph_without_normalisation_is_refused() -> None:
    with pytest.raises(InvalidModel, match="no BatchNormalization to restore"):
        restore_batch_norm(from_text(linear_text()), {"x": np.zeros((2, 4), np.float32)})


def test_data_that_is_not_finite_is_refused(model: ir.Model) -> None:
    data = images(10)
    data[3] = np.nan
    with pytest.raises(InvalidData, match="not finite"):
        restore_batch_norm(model, {"image": data})


def test_data_of_another_name_is_refused(model: ir.Model) -> None:
    with pytest.raises(InvalidData, match=r"expected arrays for \['image'\]"):
        restore_batch_norm(model, {"picture": images(10)})
