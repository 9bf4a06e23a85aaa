from pathlib import Path

import numpy as np
import pytest
from support.graphs import from_text, linear_text

from ensemerge.errors import InvalidData, InvalidModel
from ensemerge.graph.files import load
from ensemerge.graph.run import Runner

X = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def test_batches_change_nothing() -> None:
    model = from_text(linear_text())
    whole = Runner(model).run({"x": X})["logits"]
    # The same arithmetic on other row counts: a matrix product may sum in another order.
    assert Runner(model, batch_rows=3).run({"x": X})["logits"] == pytest.approx(whole, abs=1e-6)


def test_feeds_that_do_not_fit_are_refused() -> None:
    runner = Runner(from_text(linear_text()))
    with pytest.raises(InvalidData, match=r"expected arrays for \['x'\], got \['y'\]"):
        runner.run({"y": X})
    with pytest.raises(InvalidData, match="one number of rows, at least 1"):
        runner.run({"x": X[:0]})


def test_a_damaged_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00\x01 not a model")
    with pytest.raises(InvalidModel):
        Runner(path)
    with pytest.raises(InvalidModel, match=r"model\.onnx is no ONNX model"):
        load(path)
    with pytest.raises(InvalidModel, match="no ONNX model at"):
        load(tmp_path / "missing.onnx")
