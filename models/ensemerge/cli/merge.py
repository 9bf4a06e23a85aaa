"""`ensemerge merge`: a merged model from a recipe file, mergekit's or ours."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ensemerge.errors import EnsemergeError, InvalidData, InvalidSpec
from ensemerge.merge.allocator import keep_freed_memory
from ensemerge.merge.checkpoint import SHARD_BYTES, Merge, Options, Written, plan_merge, write_merge
from ensemerge.merge.companions import RECIPE_FILE
from ensemerge.merge.engine import Machine
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.opened import Library
from ensemerge.merge.plan import MergePlan, peak_bytes, refuse_full_disk
from ensemerge.merge.problems import Problems
from ensemerge.merge.recipe import Recipe, parse_recipes
from ensemerge.merge.sizes import parse_size, show_size
from ensemerge.merge.staging import refuse_existing

EXAMPLE = "example: ensemerge merge recipe.yaml --out merged --memory 2GiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge the weights of several models as a recipe says: safetensors, torch files or ONNX, of any size."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        _run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (EnsemergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    text = _read(options.recipe)
    recipes = parse_recipes(text, str(options.recipe), METHODS)
    if options.seed is not None:
        recipes = [replace(recipe, seed=options.seed) for recipe in recipes]
    parts = {recipe.name: _intermediate(options) / recipe.name for recipe in recipes if recipe.name is not None}
    library = Library(options.recipe.absolute().parent, parts)
    _refuse_beforehand(recipes, library, options, text)
    plans: list[MergePlan] = []
    for recipe in recipes:
        out = options.out if recipe.name is None else parts[recipe.name]
        if any(not parts[name].exists() for name in recipe.needs(list(parts))):
            print(f"{recipe.name or out} is planned when the merges that it uses are there", file=sys.stderr)
        elif out.exists():
            print(f"{out} is there already, and used as it is", file=sys.stderr)
        else:
            plans += _merge(recipe, text, library, out, options)
    if options.dry_run:
        _show(plans, options.json)


def _refuse_beforehand(recipes: Sequence[Recipe], library: Library, options: argparse.Namespace, text: str) -> None:
    """What would stop a later merge of the file, before the first begins. Raises InvalidSpec, InvalidData."""
    problems = Problems()
    if any(recipe.name is None for recipe in recipes):
        refuse_existing(options.out)
    for reference in (reference for recipe in recipes for reference in recipe.references()):
        for path in filter(None, (reference.model, reference.lora)):
            try:
                library.path(path)
            except EnsemergeError as error:
                problems.add(str(error))
    problems.raise_any()
    for part in library.made.values():
        kept = [file.read_text(encoding="utf-8") for file in (*part.glob(RECIPE_FILE), *part.glob(f"*/{RECIPE_FILE}"))]
        if part.exists() and set(kept) != {text}:
            raise InvalidData(f"{part} was made by another recipe; remove it, or choose another --intermediate")


def _merge(
    recipe: Recipe, text: str, library: Library, out: Path, options: argparse.Namespace
) -> tuple[MergePlan, ...]:
    """Plan a merge, and unless it is a dry run carry it out."""
    began = time.perf_counter()
    merge = plan_merge(recipe, text, library, _options(options))
    refuse_full_disk(merge.plan.outputs, out)
    if not options.dry_run:
        planned = time.perf_counter()
        written = _write(merge, out)
        seconds = {"plan_seconds": planned - began, "merge_seconds": time.perf_counter() - planned}
        _report(merge.plan, out, written, seconds, as_json=options.json)
    return (merge.plan,)


def _write(merge: Merge, out: Path) -> Written:
    if not sys.stderr.isatty():
        return write_merge(merge, out)
    from rich.console import Console  # a tenth of a second that a script need not spend

    from ensemerge.report.progress import byte_bar

    with byte_bar(Console(stderr=True)) as notify:
        return write_merge(merge, out, notify)


def _show(plans: Sequence[MergePlan], as_json: bool) -> None:
    from rich.console import Console

    from ensemerge.merge.estimate import estimate_seconds
    from ensemerge.report.merging import plan_facts, show_plan

    estimated = [(plan, estimate_seconds(plan)) for plan in plans]
    if as_json:
        print(json.dumps([plan_facts(plan, seconds) for plan, seconds in estimated], indent=2))
        return
    for plan, seconds in estimated:
        show_plan(plan, seconds, Console())


def _report(plan: MergePlan, out: Path, written: Written, seconds: Mapping[str, float], *, as_json: bool) -> None:
    notes = [*plan.notes, *written.remarks]
    if as_json:
        facts = {"out": str(out), **seconds, "read_bytes": plan.read_bytes, "write_bytes": plan.write_bytes}
        facts |= {"threads": plan.machine.threads, "peak_bytes": peak_bytes()}
        facts |= {"resumed_tensors": written.resumed, "notes": notes}
        print(json.dumps(facts))
        return
    for note in notes:
        print(f"note: {note}")
    if written.resumed:
        print(f"went on from an interrupted try that had written {written.resumed} tensors")
    took = seconds["merge_seconds"]
    speed, peak = show_size(plan.read_bytes / took), show_size(peak_bytes())
    print(f"{out}: {show_size(plan.write_bytes)} in {took:.1f} s, {speed}/s read, {peak} of memory at most")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{path} is no text in UTF-8: {error}") from error
    except OSError as error:
        raise InvalidSpec(f"{path} cannot be read: {error.strerror}; expected a recipe") from error


def _intermediate(options: argparse.Namespace) -> Path:
    chosen: Path | None = options.intermediate
    out: Path = options.out
    return chosen or out.with_name(f"{out.name}-parts")


def _options(options: argparse.Namespace) -> Options:
    machine = Machine(device=_device(options.device))
    if options.threads is not None:
        if options.threads < 1:
            raise InvalidSpec(f"--threads {options.threads}: expected at least 1")
        machine = replace(machine, threads=options.threads)
    memory = None if options.memory is None else parse_size(options.memory, "--memory")
    return Options(machine, memory, parse_size(options.shard_size, "--shard-size"), options.graph)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidSpec("--device cuda: torch sees no CUDA device here; expected cpu or auto")
    return torch.device(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge merge", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("recipe", type=Path, help="a recipe in mergekit's language; docs/recipes.md has the additions")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the merged model")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--memory", metavar="SIZE", help="the most that the process may hold, such as 512MiB")
    parser.add_argument("--threads", type=int, help="how many cores to use (default: all that there are)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--shard-size", default=str(SHARD_BYTES), metavar="SIZE", help="of safetensors (default 5GB)")
    parser.add_argument("--seed", type=int, help="of random methods, instead of the recipe's")
    parser.add_argument("--graph", type=Path, metavar="MODEL.onnx", help="put the merged checkpoint into this export")
    parser.add_argument(
        "--intermediate", type=Path, metavar="DIR", help="where merges with a name go that later ones use (OUT-parts)"
    )
    parser.add_argument("--json", action="store_true", help="figures for a script")
    return parser
