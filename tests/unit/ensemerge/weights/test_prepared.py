from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.memory import peak_bytes_of

from ensemerge.errors import InvalidData
from ensemerge.weights import prepared
from ensemerge.weights.prepared import CastWeights, PermutedWeights, Row, RowMap, RowMappedWeights
from ensemerge.weights.reader import TensorInfo, WeightReader, read
from ensemerge.weights.safetensors import SafetensorsWeights
from ensemerge.weights.torch_files import TorchWeights

SHAPES = {"w": (90, 60), "conv": (12, 6, 5, 4), "bias": (90,), "wide": (2, 5000), "scalar": ()}


@pytest.fixture
def weights(tmp_path: Path) -> SafetensorsWeights:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors | {"step": torch.tensor([3, 4])}, tmp_path / "model.safetensors")
    return SafetensorsWeights(tmp_path)


def shuffled(size: int) -> np.ndarray:
    return np.random.default_rng(size).permutation(size)


def assert_windows_agree(reader: WeightReader, name: str, expected: torch.Tensor) -> None:
    assert reader.info(name) == TensorInfo(tuple(expected.shape), expected.dtype)
    flat = expected.reshape(-1)
    for step in (1 << 20, 613, 60, 1):
        for start in range(0, flat.numel(), max(step, 101)):
            stop = min(start + step, flat.numel())
            assert torch.equal(reader.window(name, start, stop), flat[start:stop])
            reader.give_back(name, start, stop)
    with pytest.raises(IndexError):
        reader.window(name, 0, flat.numel() + 1)


@pytest.mark.parametrize("many_runs", [prepared.MANY_RUNS, 1], ids=["row by row", "whole"])
def test_axes_are_re_indexed(weights: SafetensorsWeights, many_runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MANY_RUNS", many_runs)
    maps = {
        "w": {0: shuffled(90), 1: shuffled(60)},
        "conv": {1: shuffled(6), 3: np.array([3, 0])},
        "bias": {0: shuffled(90)},
        "wide": {1: shuffled(5000)},
    }
    reader = PermutedWeights(weights, maps)
    assert reader.names == weights.names
    assert reader.resident_bytes == 8 * (90 + 60 + 6 + 2 + 90 + 5000)
    for name in weights.names:
        expected = read(weights, name)
        for axis, indices in maps.get(name, {}).items():
            expected = expected.index_select(axis, torch.from_numpy(indices))
        assert_windows_agree(reader, name, expected)


def test_a_permuted_hidden_layer_computes_the_same(weights: SafetensorsWeights) -> None:
    order = shuffled(90)
    reader = PermutedWeights(weights, {"w": {0: order}, "bias": {0: order}})
    x, back = torch.randn(4, 60), torch.randn(7, 90)
    before = torch.relu(x @ read(weights, "w").T + read(weights, "bias")) @ back.T
    after = torch.relu(x @ read(reader, "w").T + read(reader, "bias")) @ back[:, torch.from_numpy(order)].T
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"w": {2: np.arange(3)}}, "expected a map of one of its axes, not 2"),
        ({"w": {0: np.array([0, 90])}}, "leads to 0 and 90; expected 0 to 89"),
        ({"w": {0: np.array([-1])}}, "leads to -1"),
        ({"w": {0: np.array([0.0])}}, "expected whole numbers"),
        ({"w": {0: np.array([[0]])}}, "expected whole numbers, one axis"),
        ({"scalar": {0: np.array([0])}}, "expected a map of one of its axes"),
    ],
)
def test_maps_that_lead_nowhere_are_refused(
    weights: SafetensorsWeights, maps: dict[str, dict[int, np.ndarray]], message: str
) -> None:
    with pytest.raises(InvalidData, match=message):
        PermutedWeights(weights, maps)


def test_ties_hold_where_both_have_the_same_map(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    torch.save({"a": shared, "b": shared}, tmp_path / "m.pt")
    inner = TorchWeights(tmp_path / "m.pt")
    order = np.array([2, 0, 1, 3])
    assert PermutedWeights(inner, {"a": {0: order}, "b": {0: order.copy()}}).ties == {"b": "a"}
    assert PermutedWeights(inner, {"a": {0: order}}).ties == {}
    assert PermutedWeights(inner, {}).ties == {"b": "a"}
    rows = RowMap(order)
    assert RowMappedWeights(inner, {"a": rows, "b": rows}).ties == {"b": "a"}
    assert RowMappedWeights(inner, {"a": rows}).ties == {}
    assert CastWeights(inner, torch.float16).ties == {"b": "a"}


def test_rows_come_from_where_the_map_says(weights: SafetensorsWeights, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_file({"e": torch.randn(5, 60).bfloat16()}, tmp_path / "other" / "model.safetensors")
    other = SafetensorsWeights(tmp_path / "other")
    index = np.concatenate([[7, 8, 9, 3, -1, -1], np.arange(20, 90), [0, -1]])
    made = {
        4: [Row(other, "e", 2)],
        77: [Row(weights, "w", 1), Row(weights, "w", 5), Row(other, "e", 0)],
        1: [Row(weights, "w", 0)],
    }
    reader = RowMappedWeights(weights, {"w": RowMap(index, made)})
    w, e = read(weights, "w"), read(other, "e")
    expected = w[torch.from_numpy(index.clip(0))].clone()
    expected[5] = 0
    expected[4] = e[2].float()
    expected[1] = w[0]
    expected[77] = ((w[1].double() + w[5] + e[0]) / 3).float()
    assert_windows_agree(reader, "w", expected)
    assert torch.equal(read(reader, "conv"), read(weights, "conv"))
    assert reader.info("step") == weights.info("step")
    assert reader.resident_bytes == index.nbytes


@pytest.mark.parametrize(
    ("name", "index", "row", "message"),
    [
        ("w", [90], None, "leads to 90 and 90"),
        ("w", [-2], None, "leads to -2"),
        ("scalar", [0], None, "has no axes"),
        ("w", [0], (1, "w", 0), "row 1 is made of 1 rows"),
        ("w", [0], (0, "conv", 0), "expected a row of the same length"),
        ("w", [0], (0, "w", 90), "row 90 of 'w'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    weights: SafetensorsWeights, name: str, index: list[int], row: tuple[int, str, int] | None, message: str
) -> None:
    made = {row[0]: [Row(weights, row[1], row[2])]} if row else {}
    with pytest.raises(InvalidData, match=message):
        RowMappedWeights(weights, {name: RowMap(np.array(index), made)})


def test_a_row_must_be_made_of_something(weights: SafetensorsWeights) -> None:
    with pytest.raises(InvalidData, match="row 0 is made of 0 rows"):
        RowMappedWeights(weights, {"w": RowMap(np.array([0]), {0: []})})


def test_floating_tensors_are_cast_and_integers_are_not(weights: SafetensorsWeights) -> None:
    reader = CastWeights(weights, torch.bfloat16)
    assert_windows_agree(reader, "w", read(weights, "w").bfloat16())
    assert torch.equal(read(reader, "step"), torch.tensor([3, 4]))
    assert reader.info("step").dtype == torch.int64
    assert (reader.names, reader.resident_bytes) == (weights.names, 0)


def test_preparations_can_be_stacked(weights: SafetensorsWeights) -> None:
    order = shuffled(90)
    reader = PermutedWeights(CastWeights(weights, torch.float16), {"w": {0: order}})
    reader = PermutedWeights(reader, {"w": {0: np.argsort(order)}})
    assert_windows_agree(reader, "w", read(weights, "w").half())


def test_all_files_that_are_read_are_told(weights: SafetensorsWeights, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    save_file({"e": torch.randn(5, 60)}, tmp_path / "other" / "model.safetensors")
    other = SafetensorsWeights(tmp_path / "other")
    made = {0: [Row(other, "e", 2), Row(weights, "w", 1)], 1: [Row(other, "e", 1)]}
    own = tmp_path / "model.safetensors"
    assert list(RowMappedWeights(weights, {"w": RowMap(np.arange(90), made)}).files) == [
        own,
        tmp_path / "other" / "model.safetensors",
    ]
    assert list(PermutedWeights(CastWeights(weights, torch.float16), {}).files) == [own]


ROWS, WIDTH = 600_000, 16


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsWeights:
    """Of 37 MiB: what is read of it whole is seen in the process's memory."""
    folder = tmp_path_factory.mktemp("table")
    save_file({"t": torch.randn(ROWS, WIDTH)}, folder / "model.safetensors")
    return SafetensorsWeights(folder)


def in_runs(length: int) -> np.ndarray:
    """Rows that lie together in runs of this length, the runs shuffled."""
    starts = np.random.default_rng(0).permutation(ROWS // length) * length
    return (starts[:, None] + np.arange(length)).reshape(-1)


PREPARED: dict[str, Callable[[WeightReader], WeightReader]] = {
    "shuffled rows": lambda inner: PermutedWeights(inner, {"t": {0: in_runs(1)}}),
    "shuffled columns": lambda inner: PermutedWeights(inner, {"t": {1: shuffled(WIDTH)}}),
    "both": lambda inner: PermutedWeights(inner, {"t": {0: in_runs(1000), 1: np.tile(shuffled(WIDTH), 2)}}),
    "mapped rows": lambda inner: RowMappedWeights(inner, {"t": RowMap(in_runs(1))}),
    "mapped runs": lambda inner: RowMappedWeights(inner, {"t": RowMap(in_runs(1000))}),
    "a mean": lambda inner: RowMappedWeights(
        inner, {"t": RowMap(np.arange(ROWS), {300_000: [Row(inner, "t", 1), Row(inner, "t", 7)]})}
    ),
    "cast": lambda inner: CastWeights(inner, torch.float16),
    "a cast table, shuffled": lambda inner: PermutedWeights(CastWeights(inner, torch.float64), {"t": {0: in_runs(1)}}),
}


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=list(PREPARED))
def test_a_window_takes_no_more_memory_than_is_said(
    table: SafetensorsWeights, prepare: Callable[[WeightReader], WeightReader]
) -> None:
    reader = prepare(table)
    info = reader.info("t")
    reader.window("t", 0, 1)
    for elements in (1000, 200_000, info.numel):
        said = reader.window_bytes("t", elements) + elements * info.dtype.itemsize
        start = (info.numel - elements) // 2
        peak = peak_bytes_of(partial(reader.window, "t", start, start + elements))
        assert peak <= said + (1 << 19)  # Python's own


def test_rows_in_few_runs_are_not_counted_as_the_whole_table(table: SafetensorsWeights) -> None:
    whole = table.info("t").nbytes
    for prepare in (PREPARED["both"], PREPARED["mapped runs"]):
        assert prepare(table).window_bytes("t", 1 << 17) < whole // 4
    assert PREPARED["mapped rows"](table).window_bytes("t", 1 << 17) > whole
    assert PREPARED["shuffled rows"](table).window_bytes("t", 1 << 17) > whole
