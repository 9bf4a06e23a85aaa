from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ensemerge.weights.reader import RenamedWeights, TensorInfo, check_stretch, most_rows, read, rows_of
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


@pytest.mark.parametrize(
    ("shape", "elements", "rows"),
    [
        ((4, 3), 3, (2, 3)),
        ((4, 3), 4, (3, 3)),
        ((4, 3), 12, (4, 3)),
        ((5,), 2, (3, 1)),
        ((), 1, (1, 1)),
        ((0, 3), 0, (0, 3)),
    ],
)
def test_the_most_rows_of_a_stretch(shape: tuple[int, ...], elements: int, rows: tuple[int, int]) -> None:
    info = TensorInfo(shape, torch.float32)
    assert most_rows(info, elements)[0] == rows[0]
    for start in range(info.numel - elements + 1):
        first, end, columns = rows_of(info, start, start + elements)
        assert end - first <= rows[0]
        assert not info.numel or columns == rows[1]


def test_a_renamed_reader_passes_on_files_and_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3, 4).T}, tmp_path / "m.pt")
    renamed = RenamedWeights(TorchWeights(tmp_path / "m.pt"), {"x": "a"})
    assert list(renamed.files) == [tmp_path / "m.pt"]
    assert renamed.window_bytes("x", 12) == 48  # its rows lie across the whole file
