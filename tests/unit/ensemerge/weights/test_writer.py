from __future__ import annotations

import hashlib
import json
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ensemerge.errors import InvalidData
from ensemerge.weights.reader import TensorInfo, read
from ensemerge.weights.safetensors import SafetensorsWeights
from ensemerge.weights.writer import MemoryWriter, SafetensorsWriter, plan_shards

MODEL: dict[str, torch.Tensor] = {
    "flag": torch.tensor([True, False, True]),
    "w": torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "f8": torch.arange(5.0).to(torch.float8_e4m3fn),
    "u16": torch.arange(7).to(torch.uint16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 3),
    "b": torch.randn(99),
}
LAYOUT = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in MODEL.items()}
BYTES = sum(info.nbytes for info in LAYOUT.values())


def open_writer(folder: Path, shard_bytes: int = 1 << 30) -> SafetensorsWriter:
    folder.mkdir(exist_ok=True)
    return SafetensorsWriter(folder, LAYOUT, shard_bytes=shard_bytes, metadata={"made": "here"})


def write_all(writer: SafetensorsWriter | MemoryWriter, step: int = 1 << 20, seed: int = 0) -> None:
    stretches = [(name, start) for name, tensor in MODEL.items() for start in range(0, tensor.numel(), step)]
    random.Random(seed).shuffle(stretches)
    for name, start in stretches:
        writer.write(name, start, MODEL[name].reshape(-1)[start : start + step])


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    flat = tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    return tensor.shape == other.shape and tensor.dtype == other.dtype and torch.equal(*flat)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000, 1], ids=["one file", "two files", "a file each"])
def test_the_official_library_reads_what_was_written(tmp_path: Path, shard_bytes: int) -> None:
    writer = open_writer(tmp_path, shard_bytes)
    assert writer.total_bytes == BYTES
    write_all(writer, step=37)
    writer.close()
    loaded: dict[str, torch.Tensor] = {}
    for file in writer.files:
        loaded |= load_file(tmp_path / file)
    assert loaded.keys() == MODEL.keys()
    assert all(equal(loaded[name], tensor) for name, tensor in MODEL.items())
    reader = SafetensorsWeights(tmp_path)
    assert reader.metadata == {"format": "pt", "made": "here"}
    assert all(equal(read(reader, name), tensor) for name, tensor in MODEL.items())
    assert all(
        reader.window(name, 0, 1).data_ptr() % MODEL[name].itemsize == 0 for name in MODEL if MODEL[name].numel()
    )


def test_shards_are_named_and_indexed_as_transformers_do(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, 42_003)
    write_all(writer)
    writer.close()
    assert writer.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": BYTES}
    assert [name for name, file in index["weight_map"].items() if file == writer.files[0]] == ["flag", "w"]


def test_no_shard_is_larger_than_it_may_be() -> None:
    for limit in (1, 10, 1000, 50_000, 1 << 30):
        shards = plan_shards(LAYOUT, limit)
        assert [name for shard in shards for name in sorted(shard.layout, key=list(LAYOUT).index)] == list(LAYOUT)
        for shard in shards:
            assert len(shard.layout) == 1 or sum(info.nbytes for info in shard.layout.values()) <= limit
    assert [shard.file for shard in plan_shards({}, 10)] == ["model.safetensors"]


def test_the_same_bytes_whatever_the_order_and_the_threads(tmp_path: Path) -> None:
    for k, step in enumerate((1, 64, 1 << 20)):
        writer = open_writer(tmp_path / str(k), 50_000)
        if step == 1:
            threads = [threading.Thread(target=write_every_other, args=(writer, offset)) for offset in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            write_all(writer, step, seed=k)
        writer.close()
    assert digests(tmp_path / "0") == digests(tmp_path / "1") == digests(tmp_path / "2")


def write_every_other(writer: SafetensorsWriter, offset: int) -> None:
    for name, tensor in MODEL.items():
        for start in range(offset * 11, tensor.numel(), 22):
            writer.write(name, start, tensor.reshape(-1)[start : start + 11])


def test_what_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    for writer in (open_writer(tmp_path), MemoryWriter(LAYOUT)):
        with pytest.raises(KeyError):
            writer.write("v", 0, torch.ones(1))
        with pytest.raises(IndexError, match="'b', which has 99"):
            writer.write("b", 90, torch.ones(10))
        with pytest.raises(IndexError):
            writer.write("b", -1, torch.ones(1))
        with pytest.raises(TypeError, match="float64"):
            writer.write("b", 0, torch.ones(1, dtype=torch.float64))


def test_elements_that_were_never_written_are_noticed(tmp_path: Path) -> None:
    for writer in (open_writer(tmp_path), MemoryWriter(LAYOUT)):
        write_all(writer)
        writer.close()
    for writer in (open_writer(tmp_path), MemoryWriter(LAYOUT)):
        writer.write("b", 0, torch.ones(98))
        with pytest.raises(InvalidData, match="elements of tensor 'flag' were written"):
            writer.close()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = open_writer(tmp_path / "whole", 50_000)
    write_all(whole)
    whole.close()
    first = open_writer(tmp_path / "parts", 50_000)
    for name in ("w", "u16"):
        first.write(name, 0, MODEL[name].reshape(-1))
    first.write("b", 0, torch.ones(5))
    first.abandon()
    second = open_writer(tmp_path / "parts", 50_000)
    assert all(second.keep(name) for name in ("w", "u16"))
    for name in MODEL.keys() - {"w", "u16"}:
        second.write(name, 0, MODEL[name].reshape(-1))
    second.close()
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_a_shorter_layout_leaves_nothing_of_a_longer_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100_000)
    writer = open_writer(tmp_path)
    write_all(writer)
    writer.close()
    assert SafetensorsWeights(tmp_path).names


def test_names_and_dtypes_that_the_format_does_not_have_are_refused(tmp_path: Path) -> None:
    for layout, message in [
        ({"__metadata__": TensorInfo((1,), torch.float32)}, "cannot be called"),
        ({"w": TensorInfo((1,), torch.complex64)}, "'w' is torch.complex64"),
    ]:
        with pytest.raises(InvalidData, match=message):
            SafetensorsWriter(tmp_path, layout, shard_bytes=1, metadata={})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="cannot be written: No such file"):
        SafetensorsWriter(tmp_path / "absent", LAYOUT, shard_bytes=1, metadata={})


def test_memory_keeps_shapes() -> None:
    writer = MemoryWriter(LAYOUT)
    write_all(writer, step=10)
    writer.close()
    assert list(writer.tensors) == list(MODEL)
    assert all(equal(writer.tensors[name], tensor) for name, tensor in MODEL.items())
    assert not writer.keep("b")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte. Mounting needs root, which continuous integration has."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED, a full disk: tmpfs cannot be mounted ({mounted.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_known_before_anything_is_written(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(b"x")
    layout = {name: TensorInfo((100_000,), torch.float32) for name in "abcd"}
    with pytest.raises(InvalidData, match=r"disk full: .* needs \d+ bytes, \d+ are free"):
        SafetensorsWriter(small_disk, layout, shard_bytes=400_000, metadata={})
    assert names(small_disk) == ["other"]


def test_files_that_were_there_survive_a_full_disk(small_disk: Path) -> None:
    layout = {name: TensorInfo((100_000,), torch.float32) for name in "ab"}
    writer = SafetensorsWriter(small_disk, layout, shard_bytes=400_000, metadata={})
    writer.abandon()
    before = names(small_disk)
    layout["c"] = TensorInfo((100_000,), torch.float32)
    with pytest.raises(InvalidData, match="disk full"):
        SafetensorsWriter(small_disk, layout, shard_bytes=400_000, metadata={})
    assert names(small_disk) == before


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, there: bool) -> None:
    (tmp_path / "out").mkdir()
    victim = tmp_path / "victim"
    if there:
        victim.write_text("mine")
    (tmp_path / "out" / name).symlink_to(victim)
    layout = {key: TensorInfo((4,), torch.float32) for key in "ab"}
    with pytest.raises(InvalidData, match="is a link, and is not written through"):
        write_two_shards(tmp_path / "out", layout)
    assert victim.exists() is there
    assert not there or victim.read_text() == "mine"


def write_two_shards(folder: Path, layout: dict[str, TensorInfo]) -> None:
    writer = SafetensorsWriter(folder, layout, shard_bytes=16, metadata={})
    for key in layout:
        writer.write(key, 0, torch.ones(4))
    writer.close()
