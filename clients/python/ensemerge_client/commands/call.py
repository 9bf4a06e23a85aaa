"""`ensemerge call`: ask a model through a server."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ensemerge_client.client import Client
from ensemerge_client.errors import ClientError, InvalidArgument
from ensemerge_client.results import ModelMetadata, Parameter, Result, TensorMetadata
from ensemerge_protos.datatypes import NUMPY

EXAMPLE = "example: ensemerge call digits --input image=digit.npy --parameter user_id=u-17"
SHOWN_VALUES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a model about arrays from files (.npy, .npz, .json), zeros or random values, and show the answer.

    Without a model, show what the server has.
    """
    options = _parser().parse_args(arguments)
    try:
        with Client(options.server, timeout_seconds=options.timeout) as client:
            print(_answer(client, options) if options.model else _overview(client, as_json=options.json))
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _answer(client: Client, options: argparse.Namespace) -> str:
    metadata = client.model_metadata(options.model, options.version)
    if options.metadata:
        return json.dumps(asdict(metadata)) if options.json else _metadata_as_text(metadata)
    inputs = read_inputs(options.input, metadata, options.fill)
    parameters = dict(_parameter(text) for text in options.parameter)
    result = client.infer(options.model, inputs, version=options.version, id=options.id, parameters=parameters)
    return _as_json(result) if options.json else _as_text(result)


def _overview(client: Client, *, as_json: bool) -> str:
    """The server, whether it is ready, and each model with its state."""
    server, ready, models = client.server_metadata(), client.is_ready(), client.models()
    if as_json:
        return json.dumps({**asdict(server), "ready": ready, "models": [asdict(model) for model in models]})
    lines = [f"{server.name} {server.version}: {'ready' if ready else 'not ready'}"]
    lines += [f"  {model.name}:{model.version or '-'} {model.state} {model.reason}".rstrip() for model in models]
    return "\n".join(lines)


def _metadata_as_text(metadata: ModelMetadata) -> str:
    lines = [f"{metadata.name}:{','.join(metadata.versions)} ({metadata.platform})"]
    for word, tensors in (("takes", metadata.inputs), ("gives", metadata.outputs)):
        lines += [f"  {word} {tensor.name} {tensor.datatype} {list(tensor.shape)}" for tensor in tensors]
    return "\n".join(lines)


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
    """An array from a file, in the input's dtype; one row gets its batch axis. Raises InvalidArgument."""
    try:
        array = _loaded(path, spec.name).astype(NUMPY.get(spec.datatype, np.dtype(object)))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidArgument(
            f"{path} cannot be read as input '{spec.name}' ({spec.datatype}): {error}; expected .npy, .npz or .json"
        ) from error
    return np.asarray(array[np.newaxis] if array.ndim == len(spec.shape) - 1 else array)


def _loaded(path: Path, name: str) -> np.ndarray:
    if path.suffix == ".json":
        return np.array(json.loads(path.read_text()))
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        return np.asarray(loaded[name] if path.suffix == ".npz" else loaded)


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
    parser.add_argument(
        "model", nargs="?", help="a model, an ensemble, a merge or an experiment; else show what there is"
    )
    parser.add_argument("--metadata", action="store_true", help="show what the model takes and gives, and ask nothing")
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
