"""`ensemerge align`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.zoo import exported, feeds

from ensemerge.align.proof import permuted
from ensemerge.cli import main
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.files import load
from ensemerge.graph.permute import random_permutations
from ensemerge.graph.surgery import held_tensors


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A network, and the same with its units in another order."""
    model = exported("resnet")
    symmetry = derive_symmetry(model)
    shuffled = permuted(model, symmetry, random_permutations(symmetry, np.random.default_rng(0)))
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for path, one in zip(paths, (model, shuffled), strict=True):
        ir.save(one, path)
    return paths


@pytest.mark.parametrize("by", ["weights", "activations", "both"])
def test_a_shuffled_network_comes_back(
    pair: tuple[Path, Path], by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "aligned.onnx"
    np.savez(data, **feeds("resnet", rows=200))  # type: ignore[arg-type]
    words = ["align", *map(str, pair), "--out", str(out), "--by", by, "--data", str(data), "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["difference"] <= facts["bound"]
    ours, theirs = held_tensors(load(pair[0])), held_tensors(load(out))
    assert all(np.array_equal(tensor.numpy(), theirs[name].numpy()) for name, tensor in ours.items())


def test_what_may_move_is_shown(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "graph.svg"
    assert main(["align", "--explain", str(pair[0]), "--svg", str(picture)]) == 0
    assert "Units that move together" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.onnx"], "expected two models and --out, or --explain MODEL"),
        (["a.onnx", "b.onnx"], "expected two models and --out"),
        (["a.onnx", "b.onnx", "--out", "a.onnx"], "is there already"),
        (["a.onnx", "b.onnx", "--out", "c.onnx", "--by", "both"], "needs data"),
        (["a.onnx", "nothing.onnx", "--out", "c.onnx"], "nothing.onnx"),
        (["--explain", "nothing.onnx"], "no ONNX model at nothing.onnx"),
    ],
)
def test_what_cannot_be_done_is_said(
    pair: tuple[Path, Path],
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(pair[0].parent)
    assert main(["align", *words]) == 1
    assert said in capsys.readouterr().err
    assert not Path("c.onnx").exists()
