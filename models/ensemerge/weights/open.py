"""Which reader a path needs, told by what lies there."""

from __future__ import annotations

from pathlib import Path

from ensemerge.errors import InvalidData
from ensemerge.weights.reader import WeightReader
from ensemerge.weights.safetensors import ADAPTER_FILE, INDEX_SUFFIX, SUFFIX, SafetensorsWeights
from ensemerge.weights.torch_files import FILE, INDEX, SUFFIXES, TorchWeights

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")


def open_weights(path: Path) -> WeightReader:
    """A reader of the file or the folder at `path`.

    In a folder safetensors come first, then torch files, then ONNX. Raises InvalidData, InvalidModel.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise InvalidData(f"there is nothing at {path}; expected a folder or a file of weights")
    if path.name.endswith((SUFFIX, INDEX_SUFFIX)):
        return SafetensorsWeights(path)
    if path.suffix in SUFFIXES or path.name.endswith(".index.json"):
        return TorchWeights(path)
    if path.suffix == ".onnx":
        return _open_onnx(path)
    return _open_by_content(path)


def onnx_file(path: Path) -> Path | None:
    """The graph whose weights `open_weights` reads at `path`; None where it reads files of another kind."""
    if not path.is_dir():
        return path if path.suffix == ".onnx" else None
    names = _names(path)
    if any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names) or FILE in names or INDEX in names:
        return None
    graphs = [name for name in names if name.endswith(".onnx")]
    if "model.onnx" in graphs:
        return path / "model.onnx"
    return path / graphs[0] if len(graphs) == 1 else None


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name not in _ADAPTER_FILES)


def _open_folder(folder: Path) -> WeightReader:
    names = _names(folder)
    if any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in names):
        return SafetensorsWeights(folder)
    if FILE in names or INDEX in names:
        return TorchWeights(folder)
    graph = onnx_file(folder)
    if graph is not None:
        return _open_onnx(graph)
    torch_files = [name for name in names if name.endswith(SUFFIXES)]
    if len(torch_files) == 1:
        return TorchWeights(folder / torch_files[0])
    if ADAPTER_CONFIG in names:
        raise InvalidData(f"{folder} is an adapter, not a model; name it beside its base model, as base+adapter")
    raise InvalidData(
        f"{folder} has no weights that can be told apart: expected *{SUFFIX}, {FILE} or model.onnx, "
        f"got {', '.join(names[:10]) or 'an empty folder'}{' …' if len(names) > 10 else ''}"
    )


def _open_by_content(path: Path) -> WeightReader:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return TorchWeights(path)
    if start[8:] == b"{":
        return SafetensorsWeights(path)
    raise InvalidData(
        f"{path} is no file of weights by its name or its first bytes; expected *{SUFFIX}, *.pt or *.onnx"
    )


def _open_onnx(path: Path) -> WeightReader:
    from ensemerge.weights.onnx import read_onnx  # half a second that a merge of safetensors need not spend

    return read_onnx(path)
