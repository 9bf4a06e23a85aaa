from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.weights.onnx import OnnxWeights
from ensemerge.weights.open import open_weights
from ensemerge.weights.safetensors import SafetensorsWeights
from ensemerge.weights.torch_files import TorchWeights

WEIGHTS = {"w": torch.ones(3)}


def save_safetensors(path: Path) -> None:
    save_file(WEIGHTS, path)


def save_torch(path: Path) -> None:
    torch.save(WEIGHTS, path)


def save_legacy(path: Path) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


def save_onnx(path: Path) -> None:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(np.ones(3, np.float32), "w")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph), path)


@pytest.mark.parametrize(
    ("name", "save", "kind"),
    [
        ("m.safetensors", save_safetensors, SafetensorsWeights),
        ("m.pt", save_torch, TorchWeights),
        ("m.pth", save_torch, TorchWeights),
        ("m.bin", save_legacy, TorchWeights),
        ("m.onnx", save_onnx, OnnxWeights),
        ("blob-a", save_safetensors, SafetensorsWeights),
        ("blob-b", save_torch, TorchWeights),
        ("blob-c", save_legacy, TorchWeights),
    ],
)
def test_a_file_is_known_by_its_name_or_its_first_bytes(tmp_path: Path, name: str, save: object, kind: type) -> None:
    assert callable(save)
    save(tmp_path / name)
    reader = open_weights(tmp_path / name)
    assert isinstance(reader, kind)
    assert reader.names == ["w"]
    assert list(reader.files) == [tmp_path / name]
    assert reader.window_bytes("w", 3) == 0
    if not name.startswith("blob"):
        assert isinstance(open_weights(tmp_path), kind)


def test_safetensors_come_before_torch_before_onnx(tmp_path: Path) -> None:
    save_onnx(tmp_path / "model.onnx")
    assert isinstance(open_weights(tmp_path), OnnxWeights)
    save_torch(tmp_path / "pytorch_model.bin")
    assert isinstance(open_weights(tmp_path), TorchWeights)
    save_safetensors(tmp_path / "model.safetensors")
    assert isinstance(open_weights(tmp_path), SafetensorsWeights)


def test_adapters_beside_a_model_are_not_the_model(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidData, match="is an adapter, not a model"):
        open_weights(tmp_path)
    save_torch(tmp_path / "pytorch_model.bin")
    assert isinstance(open_weights(tmp_path), TorchWeights)


def test_a_model_with_one_safetensors_file_and_its_adapter_is_opened(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "adapter_model.safetensors")
    save_safetensors(tmp_path / "weights.safetensors")
    assert isinstance(open_weights(tmp_path), SafetensorsWeights)


def test_nothing_to_open_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"expected \*\.safetensors, pytorch_model\.bin or model\.onnx, got an empty"):
        open_weights(tmp_path)
    with pytest.raises(InvalidData, match="there is nothing at"):
        open_weights(tmp_path / "absent")
    (tmp_path / "readme").write_text("no weights")
    with pytest.raises(InvalidData, match="no file of weights by its name"):
        open_weights(tmp_path / "readme")
    with pytest.raises(InvalidData, match="got readme"):
        open_weights(tmp_path)
    (tmp_path / "m.onnx").write_text("no graph")
    with pytest.raises(InvalidModel, match="no ONNX model"):
        open_weights(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_in_shards_tells_its_index_and_all_shards(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {f"w{k}": f"{stem}-{k}.{suffix}" for k in (1, 2)}
    for name, shard in shards.items():
        if suffix == "safetensors":
            save_file({name: torch.ones(3)}, tmp_path / shard)
        else:
            torch.save({name: torch.ones(3)}, tmp_path / shard)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert list(open_weights(tmp_path).files) == [index, *(tmp_path / shard for shard in shards.values())]
