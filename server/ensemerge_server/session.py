"""The server's only door to ONNX Runtime: one model file, ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

# ONNX Runtime sends its maker usage data unless this is set before it is loaded. Whoever wants to can say 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from ensemerge.errors import ExecutionFailed, InvalidModel, InvalidSpec
from ensemerge_protos.datatypes import NUMPY
from ensemerge_server.servable import Arrays, Signature, TensorSpec
from ensemerge_server.settings import Settings, usable_cores

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

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


class Session:
    """A model in ONNX Runtime. One owner at a time runs it. Raises InvalidModel when the file cannot be used."""

    def __init__(self, path: Path, settings: Settings) -> None:
        if not path.is_file():
            raise InvalidModel(f"there is no {path}; expected an ONNX file")
        providers = _providers(settings)
        try:
            self._session = onnxruntime.InferenceSession(str(path), _options(settings), providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this one
            raise InvalidModel(f"ONNX Runtime cannot load {path}: {error}") from error
        self.signature = _signature(self._session)
        self.provider = self._session.get_providers()[0]
        # The provider that was asked for may fail to load, for want of a driver or a library: then the CPU takes over.
        if settings.device == "cuda" and self.provider != CUDA:
            raise InvalidSpec(f"device is cuda, but {path} runs on {self.provider}; check the driver, CUDA and cuDNN")

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
        """Run once; the outputs come in the order asked for. Raises ExecutionFailed."""
        try:
            values: list[np.ndarray] = self._session.run(outputs, inputs)
        except Exception as error:
            raise ExecutionFailed(f"the model failed while it ran: {error}") from error
        return values

    def warm_up(self) -> None:
        """Run one row of zeros, so that the first caller does not pay for lazy initialisation.

        A model may have good reasons to refuse zeros; then the first caller pays, and the log says so.
        """
        zeros = {spec.name: _zeros(spec) for spec in self.signature.inputs}
        try:
            self.run(zeros, [spec.name for spec in self.signature.outputs])
        except ExecutionFailed as error:
            log.warning("no warm-up: %s", error)


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


def _options(settings: Settings) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Every session has its own pool. Idle pools that spin take the cores from the one that works.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _providers(settings: Settings) -> list[Any]:
    if settings.device == "cuda" and available_device() != "cuda":
        raise InvalidSpec(
            "device is cuda, but ONNX Runtime offers none here; install ensemerge[server-gpu], or use cpu"
        )
    if settings.device == "cpu" or available_device() == "cpu":
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
