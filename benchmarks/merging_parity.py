"""Whether a recipe gives mergekit's numbers with `compat: mergekit`: both run it, every tensor is compared.

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit==0.1.5
    python benchmarks/merging_parity.py --mergekit /tmp/mergekit/bin/python
    python benchmarks/merging_parity.py --mergekit /tmp/mergekit/bin/python --only 'ties*' --keep /tmp/parity

`parity_recipes.py` has the recipes and the small random checkpoints. DARE and DELLA get the same random numbers on
both sides. The exit status is 1 where anything differs that should not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from mergekit_driver import uniforms
from parity_recipes import Case, cases, make_checkpoints
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from ensemerge.errors import EnsemergeError, InvalidSpec, Unavailable
from ensemerge.merge import plan
from ensemerge.merge.checkpoint import Options, plan_merge, write_merge
from ensemerge.merge.engine import Machine
from ensemerge.merge.method import Place
from ensemerge.merge.methods.mergekit import DEVIATIONS, MERGEKIT
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.opened import Library
from ensemerge.merge.recipe import parse_recipes
from ensemerge.merge.vocabulary import TOKENIZER_FILE, read_tokenizer

DRIVER = Path(__file__).with_name("mergekit_driver.py")
OUT = Path(__file__).with_name("results") / "merging_parity.json"
ALLOWED = 1e-6
# What of config.json follows from the recipe.
CONFIG_KEYS = ("num_hidden_layers", "n_layer", "vocab_size")
# What the table needs; a pipe has no width of its own.
PIPE_COLUMNS = 120


@dataclass(frozen=True)
class Comparison:
    """One recipe run by both.

    `broken` says what keeps the results from being compared: an error, other names, shapes or settings. `differs` says
    which numbers differ beyond rounding, and which dtypes; `known` why they may.
    """

    method: str
    family: str
    recipe: str
    tensors: int
    dtype: str  # in which the merged model is written
    largest_difference: float
    broken: Sequence[str]
    differs: Sequence[str] = ()
    known: str = ""

    @property
    def missed(self) -> bool:
        """Whether there is no parity, for no reason that is known."""
        return bool(self.broken) or bool(self.differs and not self.known)

    @property
    def verdict(self) -> str:
        return "[red]differs[/red]" if self.missed else "[yellow]known[/yellow]" if self.differs else "equal"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every recipe with mergekit and with ensemerge, and compare."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    try:
        chosen = _chosen(options.only)
        with _folder(options.keep) as folder:
            found, theirs = run(options.mergekit, folder, chosen)
    except EnsemergeError as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    facts = {"mergekit": theirs, "ensemerge": version("ensemerge"), "torch": torch.__version__}
    _show(found, facts, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"facts": facts, "comparisons": [asdict(one) for one in found]}, indent=2) + "\n")
    return 1 if any(one.missed for one in found) else 0


def _chosen(patterns: Sequence[str]) -> list[Case]:
    """Raises InvalidSpec for a pattern that no recipe fits."""
    every = cases()
    for pattern in patterns:
        if not any(fnmatch(case.file, pattern) for case in every):
            raise InvalidSpec(f"no recipe is named like '{pattern}'; expected such names as {every[0].file}")
    return [case for case in every if any(fnmatch(case.file, pattern) for pattern in patterns)]


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="ensemerge-parity-") as name:
            yield Path(name)
    else:
        keep.mkdir(parents=True)
        yield keep


def run(mergekit: str, folder: Path, chosen: Sequence[Case]) -> tuple[list[Comparison], str]:
    """Merge everything twice under `folder`; returns the comparisons and mergekit's version. Raises Unavailable."""
    make_checkpoints(folder, list(dict.fromkeys(case.family for case in chosen)))
    for case in chosen:
        # One file for both: mergekit passes over a key that it does not know.
        text = yaml.safe_dump({**case.recipe, "compat": "mergekit"}, sort_keys=False)
        (folder / f"{case.file}.yaml").write_text(text)
    report = _run_mergekit(mergekit, folder)
    return [_compared(case, folder, report["failed"][case.file]) for case in chosen], report["version"]


def _run_mergekit(python: str, folder: Path) -> dict[str, Any]:
    """All recipes in one process: its imports take longer than the merges. Raises Unavailable."""
    command = [python, str(DRIVER), str(folder)]
    # Hash order decides which model's tokens mergekit adds first.
    environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise Unavailable(
            f"{python} does not run: {error}; expected the Python of an environment with mergekit"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"mergekit did not run with {python}: {last}; expected `pip install mergekit==0.1.5` there")
    report: dict[str, Any] = json.loads((folder / "mergekit.json").read_text())
    return report


class SharedDraws:
    """The driver's random numbers, in place of ours: those of an element depend on the tensor's size alone."""

    def __init__(self, seed: int) -> None:
        """`seed` is the recipe's, which mergekit's generator has no counterpart for."""

    def keep(self, place: Place, model: int, probability: torch.Tensor | float, count: int) -> torch.Tensor:
        drawn = torch.from_numpy(uniforms(place.numel)[place.start : place.start + count])
        return drawn < torch.as_tensor(probability, dtype=torch.float32)


def _compared(case: Case, folder: Path, failed: str | None) -> Comparison:
    ours, theirs = folder / "ensemerge" / case.file, folder / "mergekit" / case.file
    errors = [] if failed is None else [f"mergekit: {failed}"]
    try:
        _merge(folder / f"{case.file}.yaml", ours)
    except EnsemergeError as error:
        errors.append(f"ensemerge: {error}")
    if errors:
        return Comparison(case.method, case.family, case.name, 0, "", float("nan"), errors)
    mine, other = _weights(ours), _weights(theirs)
    broken = [*shapes_differ(mine, other), *_config_differs(ours, theirs), *_tokens_differ(ours, theirs)]
    if not broken:
        mine = _rows_as_in(theirs, ours, mine)
    largest, differs = numbers_differ(mine, other)
    dtype = str(next(iter(mine.values())).dtype).removeprefix("torch.")
    return Comparison(case.method, case.family, case.name, len(mine), dtype, largest, broken, differs, case.known)


def _merge(recipe: Path, out: Path) -> None:
    """Raises EnsemergeError."""
    text = recipe.read_text()
    (parsed,) = parse_recipes(text, recipe.name, METHODS)
    out.parent.mkdir(exist_ok=True)
    with mock.patch.object(plan, "KeyedDraws", SharedDraws):
        merge = plan_merge(parsed, text, Library(recipe.parent), Options(Machine(threads=1)))
    write_merge(merge, out)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def shapes_differ(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors that only one has, and those whose shapes differ."""
    wrong = [f"{name}: only mergekit has it" for name in theirs if name not in ours]
    wrong += [f"{name}: only ensemerge has it" for name in ours if name not in theirs]
    shapes = {name: (list(ours[name].shape), list(theirs[name].shape)) for name in ours if name in theirs}
    return wrong + [f"{name}: {mine}, mergekit {other}" for name, (mine, other) in shapes.items() if mine != other]


def numbers_differ(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> tuple[float, list[str]]:
    """The largest absolute difference in tensors that both have, and where dtypes differ, or numbers by too much."""
    wrong: list[str] = []
    largest = 0.0
    for name in (name for name in ours if name in theirs and ours[name].shape == theirs[name].shape):
        mine, other = ours[name], theirs[name]
        difference = (mine.double() - other.double()).abs()
        largest = max(largest, float(difference.max()))
        # Not the other way round: a NaN is beyond, too.
        beyond = int((~(difference <= _allowed(other))).sum())
        if mine.dtype != other.dtype:
            wrong.append(f"{name}: {mine.dtype}, mergekit {other.dtype}")
        elif beyond:
            wrong.append(f"{name}: {beyond} of {mine.numel()} elements differ, by up to {float(difference.max()):.1e}")
    return largest, wrong


def _allowed(theirs: torch.Tensor) -> torch.Tensor:
    """1e-6; in a narrow dtype one step, since a sum near the middle between two of its numbers may go either way."""
    if theirs.dtype == torch.float32:
        return torch.tensor(ALLOWED, dtype=torch.float64)
    return theirs.double().abs() * torch.finfo(theirs.dtype).eps + ALLOWED


def _tokens_differ(ours: Path, theirs: Path) -> list[str]:
    if not (theirs / TOKENIZER_FILE).exists():  # the recipe says nothing of tokens
        return []
    differing = set(read_tokenizer(ours).ids) ^ set(read_tokenizer(theirs).ids)
    return [f"tokens that only one has: {sorted(differing)}"] if differing else []


def _rows_as_in(theirs: Path, ours: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors with the rows of embedding and head where mergekit has them: it adds tokens in no fixed order."""
    moved = dict(weights)
    if not (theirs / TOKENIZER_FILE).exists():
        return moved
    mine, other = read_tokenizer(ours).ids, read_tokenizer(theirs).ids
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.arange(len(weights[name]))
        rows[[other[token] for token in mine]] = torch.tensor(list(mine.values()))
        moved[name] = weights[name][rows]
    return moved


def _config_differs(ours: Path, theirs: Path) -> list[str]:
    mine, other = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    return [
        f"config.json: {key} is {mine.get(key)}, mergekit {other.get(key)}"
        for key in CONFIG_KEYS
        if mine.get(key) != other.get(key)
    ]


def _show(found: Sequence[Comparison], facts: Mapping[str, str], console: Console) -> None:
    console.print(_table(found))
    console.print()
    missed, known = [one for one in found if one.missed], [one for one in found if one.differs and not one.missed]
    for one in missed:
        for line in (*one.broken, *one.differs):
            console.print(f"[red]{one.method}, {one.recipe} ({one.family}):[/red] {line}", highlight=False)
    console.print(_summary([one for one in found if not one.missed and not one.differs]))
    console.print(f"{len(known)} recipes differ as known, {len(missed)} for no reason that is known")
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim", highlight=False)
    if known:
        console.print("\n[bold]What `compat: mergekit` does not reproduce[/bold]")
    for reason in dict.fromkeys(one.known for one in known):
        methods = ", ".join(dict.fromkeys(one.method for one in known if one.known == reason))
        console.print(f"{methods}: {reason}", highlight=False)
    console.print("\n[bold]What our default does otherwise, without `compat: mergekit`[/bold]")
    for method in dict.fromkeys(one.method for one in found):
        console.print(f"{method}: {DEVIATIONS.get(method, 'nothing')}", highlight=False)


def _summary(equal: Sequence[Comparison]) -> str:
    methods, tensors = len({one.method for one in equal}), sum(one.tensors for one in equal)
    largest = max((one.largest_difference for one in equal if one.dtype == "float32"), default=0.0)
    return (
        f"{len(equal)} recipes agree: {methods} of {len(MERGEKIT)} methods, {tensors:,} tensors, largest difference in "
        f"float32 {largest:.1e}"
    )


def _table(found: Sequence[Comparison]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("method", "checkpoints", "recipe"):
        table.add_column(heading)
    for heading in ("tensors", "written as", "largest difference", "verdict"):
        table.add_column(heading, justify="right")
    method = ""
    for one in found:
        figures = f"{one.tensors}", one.dtype, f"{one.largest_difference:.1e}", one.verdict
        table.add_row(one.method if one.method != method else "", one.family, one.recipe, *figures)
        method = one.method
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--mergekit", required=True, metavar="PYTHON", help="the Python of mergekit's environment")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="recipes by name, such as 'ties*' or '*gpt2*'"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for checkpoints, recipes and merges")
    parser.add_argument("--out", type=Path, default=OUT, help="the comparisons as JSON (%(default)s)")
    return parser


if __name__ == "__main__":
    # One thread: the merges are tiny, and whoever measures beside them is not disturbed.
    torch.set_num_threads(1)
    sys.exit(main())
