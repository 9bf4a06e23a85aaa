"""`ensemerge align`: bring one network's units into the order of another's, or show what may move in a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ensemerge.errors import EnsemergeError, InvalidSpec
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.feeds import read_arrays
from ensemerge.graph.files import load, save
from ensemerge.graph.surgery import with_weights
from ensemerge.merge.alignment import Aligned, align_models
from ensemerge.merge.alignment_spec import ACTIVATIONS, BOTH, WEIGHTS, Alignment
from ensemerge.merge.onnx_forms import pair_models
from ensemerge.merge.opened import Library, open_models
from ensemerge.merge.recipe import Recipe, Source
from ensemerge.merge.references import parse_model
from ensemerge.report.drawing import draw_symmetry
from ensemerge.report.progress import bars
from ensemerge.report.symmetry import symmetry_facts, symmetry_tables
from ensemerge.weights.arrays import to_array
from ensemerge.weights.reader import read

EXAMPLE = "example: ensemerge align a.onnx b.onnx --out b-aligned.onnx --data calibration.npz --by both"


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the units of network B into the order of A's. B still computes what it did, which is proved."""
    options = _parser().parse_args(arguments)
    try:
        _explain(options) if options.explain is not None else _align(options)
    except (EnsemergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(options: argparse.Namespace) -> None:
    """Which units may change places, as a table and, where one is wanted, as a picture."""
    model = load(options.explain)
    symmetry = derive_symmetry(model, None if options.data is None else read_arrays(options.data))
    if options.svg is not None:
        options.svg.write_text(draw_symmetry(model, symmetry), encoding="utf-8")
    if options.json:
        print(json.dumps(symmetry_facts(symmetry), indent=2))
        return
    console = Console()
    for table in symmetry_tables(symmetry):
        console.print(table)


def _align(options: argparse.Namespace) -> None:
    if len(options.models) != 2 or options.out is None:
        raise InvalidSpec("expected two models and --out, or --explain MODEL")
    if options.out.exists():
        raise InvalidSpec(f"{options.out} is there already; remove it, or choose another name")
    first, second = (str(path) for path in options.models)
    recipe = Recipe("linear", tuple(Source(parse_model(name, "models")) for name in (first, second)))
    paired = pair_models(recipe, open_models(recipe, Library(Path.cwd())))
    alignment = Alignment(options.by, options.alpha, starts=options.starts)
    feeds = None if options.data is None else read_arrays(options.data)
    with bars(Console(stderr=True)) as notify:
        aligned = align_models(paired, alignment, feeds, notify=notify)
    reader = aligned.models[second].reader
    weights = {name: to_array(read(reader, name)) for name in reader.names}
    save(with_weights(paired.form.model, weights), options.out)
    _report(aligned, options)


def _report(aligned: Aligned, options: argparse.Namespace) -> None:
    (check,) = aligned.checks
    if options.json:
        facts = {"out": str(options.out), "similarity": aligned.similarity, "difference": check.difference}
        print(json.dumps({**facts, "bound": check.bound}))
        return
    print(f"{options.out}: {options.models[1]} in the order of {options.models[0]}'s units")
    print(f"{check.detail} is {check.difference:.1e}, at most {check.bound:.0e} is allowed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge align", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx", help="A, which stays, and B")
    parser.add_argument("--out", type=Path, help="where the aligned B goes; it has A's names")
    parser.add_argument("--by", choices=(WEIGHTS, ACTIVATIONS, BOTH), default=WEIGHTS, help="what units are matched by")
    parser.add_argument("--alpha", type=float, default=0.5, help="the share of weights in --by both (default 0.5)")
    parser.add_argument("--starts", type=int, default=0, help="random orders to begin at, beside the usual ones")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="unlabelled inputs, arrays by input name")
    parser.add_argument("--explain", type=Path, metavar="MODEL.onnx", help="show which units of a network may move")
    parser.add_argument("--svg", type=Path, help="with --explain: draw the graph, coloured by what moves together")
    parser.add_argument("--json", action="store_true", help="figures for a script")
    return parser
