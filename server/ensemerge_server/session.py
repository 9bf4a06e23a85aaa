"""The server's only door to ONNX Runtime: one model file, ready to run."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

# ONNX Runtime sends its maker usage data unless this is set before it is loaded. Whoever wants to can say 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from ensemerge.errors import ExecutionFailed, InvalidModel, InvalidSpec
from ensemerge.measures.differences import relative_difference
from ensemerge_protos.datatypes import NUMPY
from ensemerge_server.servable import Arrays, Signature, TensorSpec
from ensemerge_server.settings import Settings, usable_cores

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
# Measured with batches of 1 to 32: models above it gain from more threads, models far below it lose.
QUICK_SECONDS = 300e-6
WARM_UP_RUNS = 5
# A slow model is warm after one run, and shows in it that it is slow.
WARM_UP_SECONDS = 0.25
# A batch may be summed in another order: 1e-6 in single precision, 1e-3 in half.
INDEPENDENCE_BOUND = 1e-2

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def open_session(path: Path, settings: Settings) -> Session:
    """A session that is warm, with as many threads as pay. Raises InvalidModel, InvalidSpec.

    Handing a run of some microseconds to a second thread costs more than that thread can save.
    """
    session = Session(path, settings.device, settings.threads or usable_cores())
    # Zeros tell nothing where a row may have any size.
    quick = session.warm_up() < QUICK_SECONDS and _has_fixed_rows(session.signature)
    if quick and not settings.threads and session.provider == CPU:
        session = Session(path, settings.device, threads=1)
        session.warm_up()
    if session.signature.batched and not _rows_are_independent(session):
        log.warning("%s: rows influence each other; requests to it are never batched", path)
        session.signature = replace(session.signature, batched=False)
    return session


class Session:
    """A model in ONNX Runtime. One owner at a time runs it. Raises InvalidModel when the file cannot be used."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        if not path.is_file():
            raise InvalidModel(f"there is no {path}; expected an ONNX file")
        providers = _providers(device)
        try:
            self._session = onnxruntime.InferenceSession(str(path), _options(threads), providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise InvalidModel(f"ONNX Runtime cannot load {path}: {error}") from error
        self.signature = _signature(self._session)
        self.provider = self._session.get_providers()[0]
        self.threads = threads
        # The provider that was asked for may fail to load, for want of a driver or a library: then the CPU takes over.
        if device == "cuda" and self.provider != CUDA:
            raise InvalidSpec(f"device is cuda, but {path} runs on {self.provider}; check the driver, CUDA and cuDNN")

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
        """Run once; the outputs come in the order asked for. Raises ExecutionFailed."""
        try:
            values: list[np.ndarray] = self._session.run(outputs, inputs)
        except Exception as error:
            raise ExecutionFailed(f"the model failed while it ran: {error}") from error
        return values

    def warm_up(self) -> float:
        """Run one row of zeros a few times, so that the first caller does not pay for lazy initialisation.

        Returns the seconds of the quickest run. A model may have good reasons to refuse zeros: then it is infinity,
        the first caller pays, and the log says so.
        """
        zeros = {spec.name: _zeros(spec) for spec in self.signature.inputs}
        outputs = [spec.name for spec in self.signature.outputs]
        taken: list[float] = []
        try:
            while len(taken) < WARM_UP_RUNS and sum(taken) < WARM_UP_SECONDS:
                taken.append(self._timed(zeros, outputs))
        except ExecutionFailed as error:
            log.warning("no warm-up: %s", error)
            return math.inf
        return min(taken)

    def _timed(self, inputs: Arrays, outputs: Sequence[str]) -> float:
        started = time.perf_counter()
        self.run(inputs, outputs)
        return time.perf_counter() - started


def _has_fixed_rows(signature: Signature) -> bool:
    """Whether the batch is the only axis that varies."""
    return all(axis >= 0 for spec in signature.inputs for axis in spec.shape[1:])


def _rows_are_independent(session: Session) -> bool:
    """Whether two random rows have the same answers together as alone. A file that was copied here proved nothing."""
    if not _has_fixed_rows(session.signature) or any(spec.datatype == "BYTES" for spec in session.signature.inputs):
        return True
    outputs = [spec.name for spec in session.signature.outputs]
    pair = {spec.name: _random_rows(spec, 2) for spec in session.signature.inputs}
    try:
        together = session.run(pair, outputs)
        alone = [session.run({name: rows[i : i + 1] for name, rows in pair.items()}, outputs) for i in range(2)]
    except ExecutionFailed as error:
        log.warning("no check whether rows are independent: %s", error)
        return True
    one_by_one = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
    return all(
        relative_difference(got, expected) <= INDEPENDENCE_BOUND
        for got, expected in zip(together, one_by_one, strict=True)
    )


def _random_rows(spec: TensorSpec, rows: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    shape, dtype = (rows, *spec.shape[1:]), NUMPY[spec.datatype]
    values = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(2, size=shape)
    return values.astype(dtype)


def check_installation() -> None:
    """Both builds of ONNX Runtime write the same files; with both installed one is broken. Raises InvalidSpec."""
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in distributions()}
    if {"onnxruntime", "onnxruntime-gpu"} <= names:
        raise InvalidSpec(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, "
            "then install ensemerge[server] or ensemerge[server-gpu]"
        )


def available_device() -> str:
    """What sessions run on with `device: auto`."""
    return "cuda" if CUDA in onnxruntime.get_available_providers() else "cpu"


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Every session has its own pool. Idle pools that spin take the cores from the one that works.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _providers(device: str) -> list[Any]:
    if device == "cuda" and available_device() != "cuda":
        raise InvalidSpec(
            "device is cuda, but ONNX Runtime offers none here; install ensemerge[server-gpu], or use cpu"
        )
    if device == "cpu" or available_device() == "cpu":
        return [CPU]
    # The default, an exhaustive search for the quickest convolution, is repeated for every new batch size.
    return [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def _signature(session: Any) -> Signature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    first_axes = {(value.shape or [None])[0] for value in (*inputs, *outputs)}
    # One symbol for axis 0 everywhere is the exporter's promise that it is the batch. -1 alone could be a length.
    batched = len(first_axes) == 1 and isinstance(next(iter(first_axes)), str)
    return Signature(_specs(inputs), _specs(outputs), batched)


def _specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value.name, _datatype(value), _shape(value)) for value in values)


def _datatype(value: Any) -> str:
    if value.type not in _DATATYPES:
        raise InvalidModel(f"'{value.name}' is a {value.type}; expected one of {', '.join(_DATATYPES)}")
    return _DATATYPES[value.type]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)


def _zeros(spec: TensorSpec) -> np.ndarray:
    shape = [max(axis, 1) for axis in spec.shape]
    if spec.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, NUMPY[spec.datatype])
