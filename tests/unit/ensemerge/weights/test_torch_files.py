from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ensemerge.errors import InvalidData
from ensemerge.weights.reader import read
from ensemerge.weights.torch_files import TorchWeights


def state() -> dict[str, torch.Tensor]:
    weight = torch.randn(50, 30)
    return {
        "w": weight,
        "tied": weight,
        "across": weight.t(),
        "part": weight[3:9, 2:7],
        "wide": torch.ones(1, 3).expand(4, 3),
        "bf16": torch.randn(7).bfloat16(),
        "none": torch.empty(0, 2),
        "also none": torch.empty(0, 2),
        "scalar": torch.tensor(5),
        "parameter": nn.Parameter(torch.randn(3)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_tensor_is_read_also_after_it_was_given_back(tmp_path: Path, zipped: bool) -> None:
    expected = state()
    torch.save(expected, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    reader = TorchWeights(tmp_path / "m.pt")
    assert reader.names == list(expected)
    assert reader.ties == {"tied": "w"}
    assert (reader.resident_bytes == 0) is zipped
    for _ in range(2):
        for name, tensor in expected.items():
            assert torch.equal(read(reader, name), tensor)
            reader.give_back(name, 0, tensor.numel())
    for start, stop in [(0, 1), (29, 31), (100, 1500)]:
        assert torch.equal(reader.window("across", start, stop), expected["across"].reshape(-1)[start:stop])
    with pytest.raises(IndexError):
        reader.window("part", 0, 31)


def test_a_zip_is_mapped_and_its_pages_leave(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.randn(2 << 20)}, path)
    reader = TorchWeights(path)
    reader.window("w", 0, 2 << 20).sum()
    assert resident_bytes(path) >= 8 << 20
    reader.give_back("w", 0, 2 << 20)
    assert resident_bytes(path) <= 128 << 10


def resident_bytes(path: Path) -> int:
    _, _, rest = Path("/proc/self/smaps").read_text().partition(f"{path}\n")
    line = next(line for line in rest.splitlines() if line.startswith("Rss:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_in_a_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    inner = OrderedDict(w=torch.ones(2))
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: inner}, tmp_path / "m.pth")
    assert TorchWeights(tmp_path / "m.pth").names == ["w"]


WRONG: dict[str, tuple[Any, str]] = {
    "two state dicts": (
        {"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}},
        "'state_dict' and 'model'",
    ),
    "tensors beside one": ({"w": torch.ones(1), "model": {"v": torch.ones(1)}}, "entry 'model' is a dict"),
    "a number": ({"w": torch.ones(1), "step": 3}, "entry 'step' is a int"),
    "a number for a name": ({3: torch.ones(1)}, "entry '3'"),
    "nothing": ({}, "holds no tensors"),
    "a tensor alone": (torch.ones(2), "holds a Tensor"),
    "a list": ([torch.ones(2)], "holds a list"),
    "a sparse tensor": ({"w": torch.eye(3).to_sparse()}, "'w' is .*sparse"),
    "a complex tensor": ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
    "a tensor without data": ({"w": torch.ones(2, device="meta")}, "'w' is .*meta"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=list(WRONG))
def test_what_is_no_state_dict_of_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InvalidData, match=message):
        TorchWeights(tmp_path / "m.pt")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"w": Evil(mark)}, protocol=2))
    else:
        torch.save({"w": Evil(mark)}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InvalidData, match=r"system.*weights_only=True.*convert it to safetensors"):
        TorchWeights(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "the pickle is harmless, so this test says nothing"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.randn(1000)}, path)
    content = path.read_bytes()
    for size in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidData):
            TorchWeights(path)
    with pytest.raises(InvalidData):
        TorchWeights(tmp_path / "absent.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as source,
        zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as to,
    ):
        for record in source.infolist():
            to.writestr(record.filename, source.read(record))
    with pytest.raises(InvalidData, match="compressed"):
        TorchWeights(tmp_path / "c.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    module.save(str(tmp_path / "m.pt"))
    with pytest.raises(InvalidData, match="TorchScript"):
        TorchWeights(tmp_path / "m.pt")


def test_a_folder_of_one_file_and_of_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    assert TorchWeights(tmp_path).names == TorchWeights(index).names == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "c": "two.bin"}}))
    with pytest.raises(InvalidData, match="holds tensor 'c', but it does not"):
        TorchWeights(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert TorchWeights(tmp_path).names == ["w"]
