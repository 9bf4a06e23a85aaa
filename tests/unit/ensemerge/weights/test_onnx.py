from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from ensemerge.errors import InvalidData, InvalidModel, StructureMismatch
from ensemerge.graph.run import Runner
from ensemerge.weights.onnx import OnnxWeights, read_onnx
from ensemerge.weights.onnx_writer import OnnxWriter
from ensemerge.weights.reader import TensorInfo, read

WIDTH = 24  # 24 × 24 floats are more than what is kept inline


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    square = generator.standard_normal((3, WIDTH, WIDTH)).astype(np.float32)
    return {"w": square[0], "kept": square[1], "b": generator.standard_normal(WIDTH).astype(np.float32)}


def network(weights: dict[str, np.ndarray], *extra: onnx.TensorProto) -> onnx.ModelProto:
    """`x @ w @ kept + b`, `kept` a Constant node, `b` stored as a list of floats."""
    nodes = [
        helper.make_node("Constant", [], ["kept"], value=numpy_helper.from_array(weights["kept"], "inner")),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "kept"], ["g"]),
        helper.make_node("Add", ["g", "b"], ["y"]),
    ]
    typed = helper.make_tensor("b", onnx.TensorProto.FLOAT, [WIDTH], weights["b"].tolist())
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(weights["w"], "w"), typed, *extra]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def expected_output(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    out: np.ndarray = x @ weights["w"] @ weights["kept"] + weights["b"]
    return out


def save(folder: Path, *, external: bool) -> Path:
    path = folder / "model.onnx"
    proto = network(arrays())
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin", size_threshold=1)
    return path


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_initializers_and_constants_are_weights(tmp_path: Path, external: bool) -> None:
    reader = read_onnx(save(tmp_path, external=external))
    assert reader.names == ["w", "b", "kept"]
    for name, array in arrays().items():
        assert reader.info(name) == TensorInfo(array.shape, torch.float32)
        assert np.array_equal(read(reader, name).numpy(), array)
        reader.give_back(name, 0, array.size)
        assert np.array_equal(reader.window(name, 3, 20).numpy(), array.reshape(-1)[3:20])
    held = sum(array.nbytes for name, array in arrays().items() if not external or name != "w")
    assert held <= reader.resident_bytes <= 2 * held
    with pytest.raises(IndexError):
        reader.window("b", 0, WIDTH + 1)


def test_windows_of_inline_weights_are_the_callers_own() -> None:
    reader = OnnxWeights(ir.from_proto(network(arrays())), None)
    reader.window("w", 0, 10).zero_()
    assert np.array_equal(read(reader, "w").numpy(), arrays()["w"])


def test_dtypes_strings_and_what_torch_does_not_have() -> None:
    extra = [
        numpy_helper.from_array(np.array([1, -2], ml_dtypes.bfloat16), "bf16"),
        helper.make_tensor("f8", onnx.TensorProto.FLOAT8E5M2, [2], [1.0, -2.0]),
        numpy_helper.from_array(np.array(7, np.int64), "step"),
        numpy_helper.from_array(np.array([True, False]), "mask"),
        numpy_helper.from_array(np.array(["a", "b"], object), "words"),
    ]
    reader = OnnxWeights(ir.from_proto(network(arrays(), *extra)), None)
    assert reader.names == ["w", "b", "bf16", "f8", "step", "mask", "kept"]
    assert read(reader, "bf16").tolist() == [1, -2]
    assert read(reader, "bf16").dtype == torch.bfloat16
    assert read(reader, "f8").float().tolist() == [1, -2]
    assert read(reader, "step").item() == 7
    assert read(reader, "mask").tolist() == [True, False]
    four_bits = helper.make_tensor("q", onnx.TensorProto.INT4, [2], [1, 2])
    with pytest.raises(InvalidModel, match="weight 'q' is INT4"):
        OnnxWeights(ir.from_proto(network(arrays(), four_bits)), None)


def external_tensor(name: str, location: str, offset: int, length: int | None) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def save_raw(folder: Path, *tensors: onnx.TensorProto) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "d.bin").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    (folder / "model.onnx").write_bytes(network(arrays(), *tensors).SerializeToString())
    return folder / "model.onnx"


def test_initializers_at_one_place_are_tied(tmp_path: Path) -> None:
    places = {"one": 0, "two": 16, "three": 0}
    path = save_raw(tmp_path / "m", *(external_tensor(name, "d.bin", offset, 16) for name, offset in places.items()))
    reader = read_onnx(path)
    assert reader.ties == {"three": "one"}
    assert read(reader, "two").tolist() == [4, 5, 6, 7]
    assert (
        read(read_onnx(save_raw(tmp_path / "n", external_tensor("open", "d.bin", 16, None))), "open").tolist()[0] == 4
    )


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("d.bin", 20, 16, "has 32; the file is cut off"),
        ("d.bin", 0, 12, "has 16 bytes, but 12"),
        ("d.bin", 1 << 62, 16, "cut off"),
        ("absent.bin", 0, 16, "missing"),
        ("../d.bin", 0, 16, "expected a file in the model's folder"),
        ("/etc/passwd", 0, 16, "expected a file in the model's folder"),
        ("link.bin", 0, 16, "a link out of the model's folder"),
    ],
)
def test_external_data_that_cannot_be_true_is_refused(
    tmp_path: Path, location: str, offset: int, length: int, message: str
) -> None:
    path = save_raw(tmp_path / "m", external_tensor("e", location, offset, length))
    (tmp_path / "d.bin").write_bytes(bytes(32))
    (path.parent / "link.bin").symlink_to(tmp_path / "d.bin")
    with pytest.raises(InvalidModel, match=message) as caught:
        read_onnx(path)
    assert "'e'" in str(caught.value)


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    save_raw(tmp_path / "blobs", external_tensor("e", "d.bin", 0, 16))
    (tmp_path / "snapshot").mkdir()
    for name in ("model.onnx", "d.bin"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert read(read_onnx(tmp_path / "snapshot" / "model.onnx"), "e").tolist() == [0, 1, 2, 3]


def test_what_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff\xff nonsense")
    for name in ("m.onnx", "absent.onnx"):
        with pytest.raises(InvalidModel, match="no ONNX model that can be read"):
            read_onnx(tmp_path / name)


@pytest.mark.parametrize("source_external", [False, True], ids=["from inline", "from external"])
@pytest.mark.parametrize("external", [False, True], ids=["to inline", "to external"])
def test_the_written_graph_computes_with_the_new_weights(tmp_path: Path, source_external: bool, external: bool) -> None:
    source = save(tmp_path, external=source_external)
    model = ir.load(source)
    reader = OnnxWeights(model, source)
    new = {name: torch.from_numpy(array * (1 + k)) for k, (name, array) in enumerate(arrays().items())}
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "merged.onnx"
    layout = {name: reader.info(name) for name in reader.names}
    writer = OnnxWriter(path, model, layout, source=source, external=external)
    assert writer.total_bytes == sum(info.nbytes for info in layout.values())
    for name, tensor in reversed(new.items()):
        half = tensor.numel() // 2
        writer.write(name, half, tensor.reshape(-1)[half:])
        writer.write(name, 0, tensor.reshape(-1)[:half])
    assert not path.exists()
    writer.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["merged.onnx", "merged.onnx.data"][: 1 + external]
    x = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)
    merged = {name: tensor.numpy() for name, tensor in new.items()}
    got = Runner(path).run({"x": x})["y"]
    assert np.allclose(got, expected_output(merged, x), atol=1e-3)
    written = read_onnx(path)
    assert written.names == reader.names
    for name, tensor in new.items():
        assert torch.equal(read(written, name), tensor)
    for name, array in arrays().items():
        assert np.array_equal(read(OnnxWeights(model, source), name).numpy(), array), "the caller's graph was changed"


def test_what_the_layout_leaves_out_is_carried_over_and_ties_stay(tmp_path: Path) -> None:
    words = numpy_helper.from_array(np.array(["a"], object), "words")
    places = {"one": 0, "two": 16, "three": 0}
    tensors = [external_tensor(name, "d.bin", offset, 16) for name, offset in places.items()]
    source = save_raw(tmp_path / "m", words, *tensors)
    path = tmp_path / "out.onnx"
    writer = OnnxWriter(path, ir.load(source), {"one": TensorInfo((4,), torch.float32)}, source=source)
    writer.write("one", 0, torch.full((4,), 9.0))
    writer.close()
    written = read_onnx(path)
    assert [read(written, name).tolist() for name in places] == [[9] * 4, [4, 5, 6, 7], [9] * 4]
    assert np.array_equal(read(written, "w").numpy(), arrays()["w"])
    assert ir.load(path).graph.initializers["words"].const_value is not None


def test_large_ties_share_one_place_in_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    big = np.arange(WIDTH * WIDTH, dtype=np.float32)
    (folder / "d.bin").write_bytes(big.tobytes())
    tensors = [external_tensor(name, "d.bin", 0, None) for name in ("one", "two")]
    for tensor in tensors:
        tensor.dims[0] = big.size
    (folder / "model.onnx").write_bytes(network(arrays(), *tensors).SerializeToString())
    reader = read_onnx(folder / "model.onnx")
    layout = {name: reader.info(name) for name in reader.names if name not in reader.ties}
    path = tmp_path / "out.onnx"
    writer = OnnxWriter(path, ir.load(folder / "model.onnx"), layout, source=folder / "model.onnx")
    for name, info in layout.items():
        writer.write(name, 0, reader.window(name, 0, info.numel))
    writer.close()
    assert read_onnx(path).ties == {"two": "one"}


def test_the_writer_knows_what_the_graph_expects(tmp_path: Path) -> None:
    model = ir.from_proto(network(arrays()))
    for layout in ({"v": TensorInfo((2,), torch.float32)}, {"b": TensorInfo((WIDTH,), torch.float16)}):
        with pytest.raises(StructureMismatch, match=r"'[vb]'"):
            OnnxWriter(tmp_path / "m.onnx", model, layout)
    writer = OnnxWriter(tmp_path / "m.onnx", model, {"b": TensorInfo((WIDTH,), torch.float32)})
    writer.write("b", 0, torch.ones(3))
    with pytest.raises(InvalidData, match=f"3 elements of tensor 'b' were written, not all {WIDTH}"):
        writer.close()
    assert not (tmp_path / "m.onnx").exists()


def test_only_what_lies_in_the_external_file_outlives_an_interruption(tmp_path: Path) -> None:
    model = ir.from_proto(network(arrays()))
    layout = {name: TensorInfo(arrays()[name].shape, torch.float32) for name in ("w", "b")}
    first = OnnxWriter(tmp_path / "m.onnx", model, layout)
    first.write("w", 0, torch.full((WIDTH * WIDTH,), 3.0))
    first.abandon()
    second = OnnxWriter(tmp_path / "m.onnx", model, layout)
    assert (second.keep("w"), second.keep("b")) == (True, False)
    second.write("b", 0, torch.zeros(WIDTH))
    second.close()
    assert set(read(read_onnx(tmp_path / "m.onnx"), "w").reshape(-1).tolist()) == {3.0}
