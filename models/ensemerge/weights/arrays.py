"""Tensors of torch and arrays of numpy, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

# dtypes that numpy alone does not know, and as what their bits travel.
_FOREIGN: dict[torch.dtype, tuple[torch.dtype, type]] = {
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz),
}
_TORCH = {np.dtype(there): (np.dtype(f"u{carrier.itemsize}"), here) for here, (carrier, there) in _FOREIGN.items()}


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of its own with the values of `array`, which may be a read-only map of a file."""
    if array.dtype in _TORCH:
        carrier, dtype = _TORCH[array.dtype]
        return torch.from_numpy(array.view(carrier).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The values of `tensor` as an array; `to_tensor` the other way round."""
    if tensor.dtype in _FOREIGN:
        carrier, dtype = _FOREIGN[tensor.dtype]
        return tensor.contiguous().view(carrier).numpy().view(dtype)
    return tensor.numpy()
