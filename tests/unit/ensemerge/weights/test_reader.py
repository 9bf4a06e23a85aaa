from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ensemerge.weights.reader import RenamedWeights, TensorInfo, check_stretch, read, rows_of
from ensemerge.weights.safetensors import SafetensorsWeights
from ensemerge.weights.torch_files import TorchWeights


def test_other_names_lead_to_the_same_weights(tmp_path: Path) -> None:
    save_file({"val_w": torch.randn(4, 3), "val_b": torch.ones(3)}, tmp_path / "model.safetensors")
    reader = SafetensorsWeights(tmp_path)
    renamed = RenamedWeights(reader, {"w": "val_w"})
    assert renamed.names == ["w"]
    assert torch.equal(read(renamed, "w"), read(reader, "val_w"))
    assert renamed.info("w") == TensorInfo((4, 3), torch.float32)
    renamed.give_back("w", 0, 12)
    assert torch.equal(renamed.window("w", 5, 7), reader.window("val_w", 5, 7))
    with pytest.raises(KeyError):
        renamed.window("b", 0, 1)


def test_ties_follow_the_new_names_and_their_order(tmp_path: Path) -> None:
    weight = torch.ones(3)
    torch.save({"a": weight, "b": weight, "c": weight, "d": torch.ones(3)}, tmp_path / "m.pt")
    reader = TorchWeights(tmp_path / "m.pt")
    assert reader.ties == {"b": "a", "c": "a"}
    assert RenamedWeights(reader, {"x": "c", "y": "d", "z": "b"}).ties == {"z": "x"}


@pytest.mark.parametrize("stretch", [(-1, 1), (0, 7), (4, 3), (7, 7)])
def test_a_stretch_outside_a_tensor_is_refused(stretch: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="'w', which has 6"):
        check_stretch("w", TensorInfo((2, 3), torch.float32), *stretch)


@pytest.mark.parametrize(
    ("shape", "start", "stop", "rows"),
    [((4, 3), 2, 7, (0, 3, 3)), ((4, 3), 3, 6, (1, 2, 3)), ((5,), 1, 4, (1, 4, 1)), ((), 0, 1, (0, 1, 1))],
)
def test_the_rows_of_a_stretch(shape: tuple[int, ...], start: int, stop: int, rows: tuple[int, int, int]) -> None:
    assert rows_of(TensorInfo(shape, torch.float32), start, stop) == rows
