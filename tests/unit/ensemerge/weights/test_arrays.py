import ml_dtypes
import numpy as np
import pytest

from ensemerge.weights.arrays import to_array, to_tensor
from ensemerge.weights.raw import raw_bytes

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.bool_, np.uint16]
FOREIGN = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz]


@pytest.mark.parametrize("dtype", [*DTYPES, *FOREIGN])
def test_every_dtype_comes_back_as_it_went(dtype: type) -> None:
    arrays: list[np.ndarray] = [np.array([0, 1, 2], dtype), np.array(1, dtype), np.empty((0, 2), dtype)]
    for array in arrays:
        tensor = to_tensor(array)
        back = to_array(tensor)
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert raw_bytes(tensor).tobytes() == array.tobytes()


def test_a_tensor_is_its_own() -> None:
    array = np.zeros(3, np.float32)
    to_tensor(array).fill_(1)
    assert not array.any()
