import ml_dtypes
import numpy as np
import pytest
import torch
from support.graphs import from_text, linear_text

from ensemerge.weights.reader import OnnxWeights, RenamedWeights, to_array, to_tensor


def test_weights_are_read_by_name_and_are_the_readers_own() -> None:
    model = from_text(linear_text())
    reader = OnnxWeights(model)
    assert set(reader.names) == {"w", "b"}
    reader.read("b").zero_()
    again = reader.read("b")
    assert again.abs().sum() > 0


def test_other_names_lead_to_the_same_weights() -> None:
    reader = OnnxWeights(from_text(linear_text(prefix="val_")))
    renamed = RenamedWeights(reader, {"w": "val_w"})
    assert renamed.names == ["w"]
    assert torch.equal(renamed.read("w"), reader.read("val_w"))
    with pytest.raises(KeyError):
        renamed.read("b")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, np.bool_, ml_dtypes.bfloat16])
def test_every_dtype_comes_back_as_it_went(dtype: type) -> None:
    arrays: list[np.ndarray] = [np.array([0, 1, 2], dtype), np.array(1, dtype), np.empty((0, 2), dtype)]
    for array in arrays:
        back = to_array(to_tensor(array))
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
