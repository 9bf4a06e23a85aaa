from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ensemerge.errors import InvalidData
from ensemerge.weights.file import WeightFile
from ensemerge.weights.reader import TensorInfo, read
from ensemerge.weights.safetensors import DTYPES, SafetensorsWeights

Header = dict[str, Any]


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(12).remainder(2).reshape(3, 4).to(dtype)


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, *, shape: object = None, dtype: object = "F32") -> Header:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_of_the_official_library_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = {"w": tensor_of(dtype), "zero": torch.zeros((), dtype=dtype), "none": torch.empty(0, 4, dtype=dtype)}
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt", "made": "here"})
    reader = SafetensorsWeights(tmp_path)
    assert reader.metadata == {"format": "pt", "made": "here"}
    assert set(reader.names) == set(expected)
    assert (reader.ties, reader.resident_bytes, reader.folder) == ({}, 0, tmp_path)
    for name, tensor in expected.items():
        assert reader.info(name) == TensorInfo(tuple(tensor.shape), dtype)
        got = read(reader, name)
        assert got.shape == tensor.shape
        assert got.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_windows_can_be_given_back_and_read_again(tmp_path: Path) -> None:
    weights = torch.randn(300_000)
    save_file({"a": torch.ones(5), "w": weights}, tmp_path / "one.safetensors")
    reader = SafetensorsWeights(tmp_path / "one.safetensors")
    for start, stop in [(0, 1), (99_999, 100_001), (131_072, 262_144), (299_999, 300_000), (7, 7)]:
        window = reader.window("w", start, stop)
        assert torch.equal(window, weights[start:stop])
        reader.give_back("w", start, stop)
        assert torch.equal(window, weights[start:stop])
    with pytest.raises(IndexError):
        reader.window("w", 0, 300_001)
    with pytest.raises(KeyError):
        reader.window("v", 0, 1)


def test_a_write_to_a_window_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    reader = SafetensorsWeights(tmp_path)
    reader.window("w", 0, 10).zero_()
    del reader
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_window_outlives_its_reader(tmp_path: Path) -> None:
    save_file({"w": torch.arange(1000)}, tmp_path / "model.safetensors")
    window = SafetensorsWeights(tmp_path).window("w", 10, 1000)
    assert torch.equal(window, torch.arange(10, 1000))


def test_threads_read_what_others_give_back(tmp_path: Path) -> None:
    weights = torch.arange(16 << 20, dtype=torch.int32)  # 64 MiB
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "w": weights}, path)
    reader = SafetensorsWeights(path)
    step = 50_001  # no border falls on a page's
    failures: list[int] = []

    def work(offset: int) -> None:
        for start in range(offset * step, weights.numel(), 4 * step):
            stop = min(start + step, weights.numel())
            if not torch.equal(reader.window("w", start, stop), weights[start:stop]):
                failures.append(start)
            reader.give_back("w", start, stop)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    reader = SafetensorsWeights(path)
    os.truncate(path, 1000)
    with pytest.raises(InvalidData, match="became shorter while it was read"):
        reader.window("w", 0, 1000)


def test_more_shards_than_the_usual_limit_of_open_files(tmp_path: Path) -> None:
    for shard in range(20):
        save_file({f"w{shard}": torch.ones(3)}, tmp_path / f"{shard}.safetensors")
    write_index(tmp_path, {f"w{shard}": f"{shard}.safetensors" for shard in range(20)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 5, hard))
    try:
        assert len(SafetensorsWeights(tmp_path).names) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_are_closed_with_their_reader(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = SafetensorsWeights(tmp_path)
    assert reader.names == ["w"]
    del reader
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    data = b"\x07" + torch.arange(3.0).numpy().tobytes()
    header = {"byte": entry(0, 1, shape=[1], dtype="U8"), "w": entry(1, 13)}
    reader = SafetensorsWeights(write_raw(tmp_path / "old.safetensors", json.dumps(header).encode() + b" ", data))
    offsets = {reader.window(name, 0, 1).data_ptr() % 4 for name in ("byte", "w")}
    assert reader.window("w", 1, 3).tolist() == [1, 2]
    assert 0 in offsets


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"last": entry(8, 12), "none": entry(4, 4, shape=[0]), "first": entry(0, 4), "second": entry(4, 8)}
    assert SafetensorsWeights(write_raw(tmp_path / "m.safetensors", header, b"\0" * 12)).names == [
        "first",
        "none",
        "second",
        "last",
    ]


LIES: dict[str, tuple[object, bytes, str]] = {
    "no JSON": (b"{nonsense", b"", "not JSON"),
    "no object": ([1, 2], b"", "expected an object of tensors"),
    "deep": (b"[" * 100_000, b"", "not JSON"),
    "no text": (b"\xff\xfe{}", b"", "not JSON"),
    "a tensor twice": (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}', b"", "key 'w' is there twice"),
    "a shape twice": (b'{"w":{"shape":[0],"shape":[1]}}', b"", "key 'shape' is there twice"),
    "NaN": (b'{"w":NaN}', b"", "NaN is no JSON"),
    "no entry": ({"w": 3}, b"", "'w': expected an object"),
    "unknown dtype": ({"w": entry(0, 4, dtype="F4")}, b"\0" * 4, "'w': dtype 'F4' is unknown"),
    "dtype of another kind": ({"w": entry(0, 4, dtype=[1])}, b"\0" * 4, "dtype .* is unknown"),
    "negative size": ({"w": entry(0, 4, shape=[-1])}, b"\0" * 4, "'shape' is"),
    "two negative sizes": ({"w": entry(0, 4, shape=[-1, -1])}, b"\0" * 4, "'shape' is"),
    "size with a point": ({"w": entry(0, 4, shape=[1.0])}, b"\0" * 4, "'shape' is"),
    "size that is a truth": ({"w": entry(0, 4, shape=[True])}, b"\0" * 4, "'shape' is"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4, "'shape' is None"),
    "size beyond all memory": ({"w": entry(0, 0, shape=[1 << 63, 0])}, b"", "'shape' is"),
    "product beyond 64 bits": ({"w": entry(0, 4, shape=[1 << 32, 1 << 32, 4])}, b"\0" * 4, "has 29514790"),
    "wrong byte count": ({"w": entry(0, 8, shape=[1])}, b"\0" * 8, "has 4 bytes, but its offsets"),
    "end before begin": ({"w": entry(8, 4, shape=[1])}, b"\0" * 8, "an end not before it"),
    "three offsets": ({"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}, b"", "a begin and an end"),
    "negative offset": ({"w": entry(-4, 0, shape=[1])}, b"\0" * 4, "'data_offsets' is"),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "'b' begins at byte 4 and overlaps tensor 'a'"),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12, "'b' begins at byte 8 and leaves a hole"),
    "a hole at the start": ({"a": entry(4, 8)}, b"\0" * 8, "leaves a hole after the header"),
    "beyond the file": ({"a": entry(0, 400)}, b"\0" * 8, "cut off"),
    "bytes behind": ({"a": entry(0, 4)}, b"\0" * 5, "nothing after the last tensor"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "object of strings"),
    "metadata that is a list": ({"__metadata__": ["a"]}, b"", "object of strings"),
}


@pytest.mark.parametrize(("header", "data", "message"), LIES.values(), ids=list(LIES))
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "lie.safetensors", header, data)
    with pytest.raises(InvalidData, match=message) as caught:
        SafetensorsWeights(path)
    assert "lie.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [3, 100, 100_000_001, (1 << 64) - 1])
def test_a_header_of_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InvalidData, match=r"lie\.safetensors"):
        SafetensorsWeights(write_raw(tmp_path / "lie.safetensors", {}, length=length))


def test_a_header_may_not_swallow_the_data(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(100)}, path)
    content = path.read_bytes()
    path.write_bytes((len(content) - 8).to_bytes(8, "little") + content[8:])
    with pytest.raises(InvalidData, match="not JSON"):
        SafetensorsWeights(path)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(20), "v": torch.ones(3)}, path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidData):
            SafetensorsWeights(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InvalidData, match="no regular file"):
        SafetensorsWeights(tmp_path / "pipe.safetensors")
    with pytest.raises(InvalidData, match="cannot be opened"):
        SafetensorsWeights(tmp_path / "absent.safetensors")


def test_a_file_may_be_larger_than_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    assert WeightFile(path).window((1 << 40) - 8, 2, torch.float32).tolist() == [0, 0]


def test_an_empty_file_has_an_empty_window(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert WeightFile(tmp_path / "empty").window(0, 0, torch.float32).shape == (0,)


def sharded(folder: Path) -> Header:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((2,), 1.0), "b": torch.full((3,), 2.0)}, folder / "one.safetensors")
    save_file({"c": torch.full((4,), 3.0)}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def write_index(folder: Path, shards: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        reader = SafetensorsWeights(path)
        assert reader.names == ["a", "b", "c"]
        assert reader.folder == tmp_path
        assert read(reader, "c").tolist() == [3, 3, 3, 3]


def test_a_shard_may_be_a_link_as_in_a_cache(tmp_path: Path) -> None:
    shards = sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("one", "two"):
        (snapshot / f"{name}.safetensors").symlink_to(tmp_path / "blobs" / f"{name}.safetensors")
    write_index(snapshot, shards)
    assert SafetensorsWeights(snapshot).names == ["a", "b", "c"]


WRONG_INDICES: dict[str, tuple[Callable[[Header], object], str]] = {
    "a missing shard": (lambda shards: shards | {"c": "three.safetensors"}, "names the file 'three.safetensors'"),
    "a tensor that is not there": (
        lambda shards: shards | {"d": "one.safetensors"},
        "holds tensor 'd', but it does not",
    ),
    "a tensor elsewhere": (lambda shards: shards | {"b": "two.safetensors"}, "tensor 'b'"),
    "a tensor left out": (lambda shards: {"a": "one.safetensors"}, "holds tensor 'b', which"),
    "a path upwards": (lambda shards: shards | {"c": "../two.safetensors"}, "expected a file of the folder"),
    "a path from the root": (lambda shards: shards | {"c": "/etc/hostname"}, "expected a file of the folder"),
    "a path of Windows": (lambda shards: shards | {"c": "C:\\two.safetensors"}, "expected a file of the folder"),
    "a path upwards of Windows": (
        lambda shards: shards | {"c": "..\\two.safetensors"},
        "expected a file of the folder",
    ),
    "a number": (lambda shards: shards | {"c": 3}, "expected a file of the folder"),
    "an empty name": (lambda shards: shards | {"c": ""}, "expected a file of the folder"),
    "no map": (lambda shards: None, "'weight_map'"),
    "an empty map": (lambda shards: {}, "'weight_map'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_INDICES.values(), ids=list(WRONG_INDICES))
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Callable[[Header], object], message: str) -> None:
    folder = tmp_path / "model"
    write_index(folder, change(sharded(folder)))
    with pytest.raises(InvalidData, match=message):
        SafetensorsWeights(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    save_file({"a": torch.ones(2), "c": torch.ones(4)}, tmp_path / "two.safetensors")
    write_index(tmp_path, shards)
    with pytest.raises(InvalidData, match="holds tensor 'a'"):
        SafetensorsWeights(tmp_path)


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path))
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidData, match=r"two\.safetensors .*cut off"):
        SafetensorsWeights(tmp_path)


def test_a_folder_must_say_which_file_is_meant(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="got none"):
        SafetensorsWeights(tmp_path)
    sharded(tmp_path)
    with pytest.raises(InvalidData, match=r"got one\.safetensors, two\.safetensors"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "x.safetensors.index.json").touch()
    (tmp_path / "y.safetensors.index.json").touch()
    with pytest.raises(InvalidData, match="several indices"):
        SafetensorsWeights(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert SafetensorsWeights(tmp_path).names == ["w"]
