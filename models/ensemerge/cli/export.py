"""`ensemerge export`: bring a torch model into a repository, as ONNX."""

from __future__ import annotations

import argparse
import importlib
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ensemerge.cli.shared import show_version
from ensemerge.errors import EnsemergeError, InvalidData
from ensemerge.export import InputSpec, Provenance, publish_module
from ensemerge.repository import SCALES, TASK_KINDS, Repository, Task, sha256

_INPUT = re.compile(r"(?P<name>[^:]+):(?P<shape>(\d+(x\d+)*)?)(:(?P<dtype>\w+)(:(?P<high>\d+))?)?")
EXAMPLE = "example: ensemerge export digits.net:make_net net.pt --to models/repository/digits-a --input image:1x8x8"


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a torch model, with a dynamic batch, normalisation kept, compared with torch at several batch sizes."""
    options = _parser().parse_args(arguments)
    try:
        module = load_module(options.factory, options.checkpoint)
        version = publish_module(
            Repository(options.to.parent, create=True),
            options.to.name,
            module,
            [parse_input(text) for text in options.input],
            outputs=options.output or ["logits"],
            task=_task(options),
            provenance=Provenance({options.checkpoint.name: sha256(options.checkpoint)}, {"factory": options.factory}),
        )
    except (EnsemergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show_version(version, as_json=options.json)
    return 0


def load_module(factory: str, checkpoint: Path) -> nn.Module:
    """Call `package.module:factory` and load the checkpoint's weights into what it returns. Raises InvalidData.

    The factory is your code and runs; the checkpoint is data: tensors only, nothing in it is executed.
    """
    make = _find(factory)
    try:
        made = make()
    except Exception as error:  # it is somebody else's code
        raise InvalidData(f"'{factory}' failed: {error!r}; expected a function that needs no arguments") from error
    if not isinstance(made, nn.Module):
        raise InvalidData(f"'{factory}' gives {type(made).__name__}; expected a function that makes a torch module")
    try:
        made.load_state_dict(read_checkpoint(checkpoint))
    except RuntimeError as error:
        raise InvalidData(f"{checkpoint} does not fit the module: {error}") from error
    return made


def _find(factory: str) -> Callable[[], object]:
    """The function that `package.module:factory` names, as seen from the folder where the command runs."""
    module_name, _, name = factory.partition(":")
    # For good: what the factory imports when it is called lies there too.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidData(f"'{factory}' cannot be found: {error}; expected package.module:factory") from error
    if not callable(found):
        raise InvalidData(f"'{factory}' is a {type(found).__name__}; expected a function that makes a torch module")
    return cast("Callable[[], object]", found)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors by name from a torch or safetensors file; a `state_dict` inside a larger checkpoint is found.

    Raises InvalidData.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, ValueError) as error:
        raise InvalidData(f"{path} is no checkpoint of tensors that can be read: {error}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise InvalidData(
            f"{path} holds a {type(state).__name__}; expected tensors by name, as state_dict() gives them"
        )
    return state


def parse_input(text: str) -> InputSpec:
    """`NAME:SHAPE[:DTYPE[:HIGH]]`, the shape without the batch, such as `image:3x32x32`. Raises InvalidData."""
    match = _INPUT.fullmatch(text)
    if match is None:
        raise InvalidData(f"--input {text}: expected NAME:SHAPE[:DTYPE[:HIGH]], such as image:3x32x32")
    shape = tuple(int(axis) for axis in match["shape"].split("x") if axis)
    return InputSpec(match["name"], shape, match["dtype"] or "float32", int(match["high"] or 2))


def _task(options: argparse.Namespace) -> Task | None:
    """The task as far as it was stated; None leaves it to the graph."""
    if not (options.task or options.scale or options.classes):
        return None
    classes = tuple(options.classes.split(",")) if options.classes else ()
    output = (options.output or ["logits"])[0]
    return Task(options.task or "classification", output, options.scale or "logits", classes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge export", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("factory", metavar="PACKAGE.MODULE:FACTORY", help="a function that makes the module")
    parser.add_argument("checkpoint", type=Path, help="its weights: .pt or .safetensors")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="REPOSITORY/NAME", help="the model to make a version of"
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="NAME:SHAPE[:DTYPE[:HIGH]]",
        help="an input, its shape without the batch; repeat in the order of the module's arguments",
    )
    parser.add_argument("--output", action="append", help="what to call an output (default logits); repeat in order")
    parser.add_argument("--task", choices=TASK_KINDS, help="what the first output means; else the graph is asked")
    parser.add_argument("--scale", choices=SCALES, help="of a classification (default logits)")
    parser.add_argument("--classes", default="", metavar="NAME,NAME,…", help="names of the classes")
    parser.add_argument("--json", action="store_true", help="the version's manifest as JSON")
    return parser
