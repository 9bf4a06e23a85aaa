"""`ensemerge COMMAND …`: finds the command among the entry points and loads that one alone.

Each package registers its commands in the group `ensemerge.commands`, with the extra that they need.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from ensemerge import __version__

GROUP = "ensemerge.commands"
OURS = ("ensemerge", "ensemerge_client", "ensemerge_protos", "ensemerge_server")
SUMMARIES = {
    "align": "bring one network's units into the order of another's, or show what may move",
    "barrier": "how far the loss rises between two networks",
    "build": "make a version of an ensemble or a merge from its model.yaml",
    "call": "ask a model through a server",
    "demo": "the whole job once, on handwritten digits",
    "export": "bring a torch model into a repository, as ONNX",
    "label": "tell a server the truth about earlier answers",
    "merge": "merge the weights of several models by a recipe",
    "serve": "serve a model repository over gRPC",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is its own, 2 for a command that is unknown or not installed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not words or words[0] in ("-h", "--help"):
        print(_usage(commands))
        return 0
    if words[0] == "--version":
        print(f"ensemerge {__version__}")
        return 0
    if words[0] not in commands:
        print(f"error: unknown command '{words[0]}'\n\n{_usage(commands)}", file=sys.stderr)
        return 2
    return _run(commands[words[0]], words[1:])


def _run(entry: EntryPoint, words: Sequence[str]) -> int:
    try:
        command = _load(entry)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        extra = ",".join(entry.extras)
        print(
            f"error: `ensemerge {entry.name}` needs {error.name}, which is not installed; "
            f"run: pip install 'ensemerge[{extra}]'",
            file=sys.stderr,
        )
        return 2
    try:
        return command(words)
    except KeyboardInterrupt:
        return 130


def _load(entry: EntryPoint) -> Callable[[Sequence[str]], int]:
    """Import a command. Modules live as long as the process: not collecting them saves a quarter of torch's start."""
    gc.disable()
    try:
        command: Callable[[Sequence[str]], int] = entry.load()
        return command
    finally:
        gc.freeze()
        gc.enable()


def _usage(commands: dict[str, EntryPoint]) -> str:
    lines = [f"  {name:<8} {SUMMARIES.get(name, '')}" for name in sorted(commands)]
    return "\n".join(["usage: ensemerge COMMAND …    (each has --help)", "", *lines])
