"""The limit: ONNX Runtime in this process, with the threads that the server's sessions have."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

THREADS = 1
# One run is no measurement, however long it takes.
RUNS_AT_LEAST = 2

Arrays = Mapping[str, np.ndarray]


class InProcess:
    """A model without a server around it."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The outputs by name."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def items_per_second(self, inputs: Arrays, rows: int, seconds: float) -> float:
        """Rows computed in a second, in batches of `rows` copies of the one row of `inputs`, for about `seconds`."""
        batch = {name: np.repeat(array, rows, axis=0) for name, array in inputs.items()}
        names = [output.name for output in self._session.get_outputs()]
        self._session.run(names, batch)  # the first run of a shape allocates
        runs = 0
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds or runs < RUNS_AT_LEAST:
            self._session.run(names, batch)
            runs += 1
        return runs * rows / elapsed
