"""`ensemerge call`: ask a model through a server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemerge_client.client import Client
from ensemerge_client.errors import ClientError, InvalidArgument
from ensemerge_client.results import ModelMetadata, Parameter, Result, TensorMetadata
from ensemerge_protos.datatypes import NUMPY

EXAMPLE = "example: ensemerge call digits --input image=digit.npy --parameter user_id=u-17"
SHOWN_VALUES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a model about arrays from files (.npy, .npz, .json), zeros or random values, and show the answer."""
    options = _parser().parse_args(arguments)
    try:
        with Client(options.server, timeout_seconds=options.timeout) as client:
            metadata = client.model_metadata(options.model, options.version)
            inputs = read_inputs(options.input, metadata, options.fill)
            parameters = dict(_parameter(text) for text in options.parameter)
            result = client.infer(options.model, inputs, version=options.version, id=options.id, parameters=parameters)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_as_json(result) if options.json else _as_text(result))
    return 0


def read_inputs(words: Sequence[str], metadata: ModelMetadata, fill: str) -> dict[str, np.ndarray]:
    """The arrays of a call: those named `input=file`, the rest filled with `zeros` or `random` values.

    Raises InvalidArgument.
    """
    specs = {spec.name: spec for spec in metadata.inputs}
    inputs: dict[str, np.ndarray] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in specs:
            raise InvalidArgument(f"--input {word}: expected NAME=FILE with one of the inputs {', '.join(specs)}")
        inputs[name] = _read(Path(path), specs[name])
    missing = [name for name in specs if name not in inputs]
    if missing and not fill:
        raise InvalidArgument(f"no value for {', '.join(missing)}; give --input {missing[0]}=FILE, or --fill random")
    return {**inputs, **{name: _filled(specs[name], fill) for name in missing}}


def _read(path: Path, spec: TensorMetadata) -> np.ndarray:
    """An array from a file, in the input's dtype; one row gets its batch axis."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            array = np.load(path, allow_pickle=False)[spec.name]
        else:
            array = np.array(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgument(
            f"{path} cannot be read as input '{spec.name}': {error}; expected .npy, .npz or .json"
        ) from error
    if array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    return np.asarray(array.astype(NUMPY.get(spec.datatype, array.dtype)))


def _filled(spec: TensorMetadata, fill: str) -> np.ndarray:
    shape = [max(axis, 1) for axis in spec.shape]
    dtype = NUMPY[spec.datatype]
    if spec.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    values = np.random.default_rng().standard_normal(shape) if fill == "random" else np.zeros(shape)
    return values.astype(dtype)


def _parameter(text: str) -> tuple[str, Parameter]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidArgument(f"--parameter {text}: expected NAME=VALUE")
    return name, value


def _as_text(result: Result) -> str:
    lines = [f"{result.model}:{result.version}"]
    for name, array in result.outputs.items():
        values = np.array2string(array, precision=4, suppress_small=True, threshold=SHOWN_VALUES)
        lines.append(f"  {name} {array.dtype} {list(array.shape)}\n{values}")
    lines += [f"  {name}: {value}" for name, value in sorted(result.parameters.items())]
    return "\n".join(lines)


def _as_json(result: Result) -> str:
    outputs = {name: array.tolist() for name, array in result.outputs.items()}
    return json.dumps(
        {
            "model": result.model,
            "version": result.version,
            "id": result.id,
            "outputs": outputs,
            "parameters": dict(result.parameters),
        },
        default=_text,
    )


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge call", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("model", help="a model, an ensemble, a merge or an experiment of the server")
    parser.add_argument("--server", default="localhost:8001", help="host:port (default localhost:8001)")
    parser.add_argument("--version", default="", help="a version; the newest by default")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE", help="array of an input; repeat")
    parser.add_argument("--fill", choices=("zeros", "random"), default="", help="value of inputs that no file gives")
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="such as an experiment's unit"
    )
    parser.add_argument("--id", default="", help="the request's id")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--json", action="store_true", help="the whole answer as one line of JSON")
    return parser
