"""`ensemerge build`: a version of an ensemble or a merge from its model.yaml."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ensemerge.build import build
from ensemerge.cli.shared import show_version
from ensemerge.errors import EnsemergeError
from ensemerge.report.progress import bars
from ensemerge.repository import Repository


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a new version of a model whose model.yaml says how: an ensemble or a merge."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        with bars(console) as notify:
            version = build(Repository(options.model.parent), options.model.name, notify)
    except (EnsemergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show_version(version, as_json=options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemerge build",
        description=main.__doc__,
        epilog="example: ensemerge build models/repository/digits-merged",
    )
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="folder of the model, with its model.yaml")
    parser.add_argument("--json", action="store_true", help="the version's manifest as JSON")
    return parser
