"""How fast and in how much memory models are merged, next to mergekit and to the least that reading and writing take.

    python benchmarks/merging.py --mergekit /path/to/python        # a Python that has mergekit 0.1.5
    python benchmarks/merging.py --mergekit … --methods linear ties --rounds 3 --out benchmarks/results/merging.json

Four Llama-shaped checkpoints of 1 GB in bfloat16 are made once. In every round each method is run by mergekit, by
`ensemerge merge` with mergekit's numbers, and by `ensemerge merge` as it is; each run is a process of its own, timed
from its start to its end. The bound reads the same files and writes as much. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from checkpoints import Llama, make_family
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ensemerge.weights.open import open_weights
from ensemerge.weights.reader import WeightReader, read

MERGEKIT, OURS, COMPAT, BOUND = "mergekit", "ensemerge", "ensemerge, compat", "bound"
METHODS = ("linear", "slerp", "ties", "dare_ties")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Sample:
    """One process. `work_seconds` leaves out its start and imports, where it says so itself."""

    method: str
    tool: str
    round: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    work_seconds: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, assert that the results are right, show."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    data: Path = options.data
    if not (data / "base").exists():
        console.print(f"making four checkpoints in {data}")
        make_family(data, Llama(), tuned=3)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
        for turn in range(options.rounds):
            for method in options.methods:
                samples += _round(method, turn, options.mergekit, data, Path(scratch))
                console.print(f"round {turn + 1}: {method} done", highlight=False)
    _show(samples, options.methods, console)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    return 0


def _round(method: str, turn: int, mergekit: Path | None, data: Path, scratch: Path) -> list[Sample]:
    recipe = _recipe(method, data)
    samples = []
    for tool, changes in ((OURS, {}), (COMPAT, {"compat": "mergekit"})):
        samples.append(_ours(method, tool, turn, {**recipe, **changes}, scratch))
    if mergekit is not None:
        path = _written(recipe, scratch)
        command = [str(mergekit.parent / "mergekit-yaml"), str(path), str(scratch / MERGEKIT), "--no-copy-tokenizer"]
        samples.append(_timed(command, method, MERGEKIT, turn))
        _assert_equal(method, scratch / MERGEKIT, scratch / COMPAT, data / "base")
    folders = [str(data / name) for name in _models(method)]
    bound = [sys.executable, str(Path(__file__).parent / "merging_bound.py"), str(scratch / "written"), *folders]
    samples.append(_timed(bound, method, BOUND, turn, lambda said: float(said["seconds"])))
    for made in scratch.iterdir():
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return samples


def _ours(method: str, tool: str, turn: int, recipe: Mapping[str, Any], scratch: Path) -> Sample:
    path = _written(recipe, scratch)
    command = [sys.executable, "-m", "ensemerge.cli", "merge", str(path), "--out", str(scratch / tool), "--json"]
    return _timed(command, method, tool, turn, lambda said: float(said["plan_seconds"] + said["merge_seconds"]))


def _models(method: str) -> list[str]:
    return ["base", "tuned-1"] if method == "slerp" else ["base", "tuned-1", "tuned-2", "tuned-3"]


def _recipe(method: str, data: Path) -> dict[str, Any]:
    """The same for both tools."""
    own = {"linear": {"weight": 1.0}, "slerp": {}}.get(method, {"weight": 1.0, "density": 0.5})
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    names = _models(method)
    if method != "linear":
        recipe["base_model"] = str(data / "base")
    if method == "slerp":
        recipe["parameters"] = {"t": 0.5}
    elif method != "linear":
        names = names[1:]
    recipe["models"] = [{"model": str(data / name), **({"parameters": own} if own else {})} for name in names]
    return recipe


def _written(recipe: Mapping[str, Any], scratch: Path) -> Path:
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe)))
    return path


def _timed(
    command: Sequence[str], method: str, tool: str, turn: int, own: Callable[[dict[str, Any]], float] | None = None
) -> Sample:
    """Run a process to its end. Raises CalledProcessError."""
    os.sync()  # what others wrote must not slow down this one's writing
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Watch(process.pid)
    out, errors = process.communicate()
    wall = time.perf_counter() - began
    usage = watch.end()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, errors)
    work = None if own is None else own(json.loads(out.splitlines()[-1]))
    return Sample(method, tool, turn, wall, usage.cpu_seconds, usage.peak_bytes, usage.anonymous_bytes, work)


class _Watch:
    """What a running process uses, read from /proc as it goes."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.cpu_seconds, self.peak_bytes, self.anonymous_bytes = 0.0, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def end(self) -> _Watch:
        self._ended.set()
        self._thread.join()
        return self

    def _look(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                status = dict(line.split(":", 1) for line in (self._folder / "status").read_text().splitlines())
                times = (self._folder / "stat").read_text().rpartition(")")[2].split()
                self.peak_bytes = max(self.peak_bytes, _kilobytes(status.get("VmHWM", "0")))
                self.anonymous_bytes = max(self.anonymous_bytes, _kilobytes(status.get("RssAnon", "0")))
            except OSError:  # it has ended
                return
            self.cpu_seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) << 10


def _assert_equal(method: str, theirs: Path, ours: Path, base: Path) -> None:
    """In mergekit's own way both give the same, but for what is said here. Raises AssertionError."""
    a, b = open_weights(theirs), open_weights(ours)
    assert set(a.names) == set(b.names)
    differing, largest = _difference(a, b)
    # Both round to bfloat16, mergekit some of it along the way; of equal magnitudes it keeps others.
    limits = {"linear": (0.02, 2**-9), "slerp": (0.02, 2**-9), "ties": (0.10, 0.02)}
    if method in limits:
        most, far = limits[method]
        assert differing <= most, f"{method}: {differing:.1%} of the elements differ"
        assert largest <= far, f"{method}: an element differs by {largest}"
    else:  # other masks were drawn: as many elements must have moved, as far
        ours_moved, theirs_moved = (_moved(reader, open_weights(base)) for reader in (b, a))
        assert abs(ours_moved[0] - theirs_moved[0]) < 0.01, (ours_moved, theirs_moved)
        assert abs(ours_moved[1] / theirs_moved[1] - 1) < 0.02, (ours_moved, theirs_moved)


def _moved(merged: WeightReader, base: WeightReader) -> tuple[float, float]:
    """The share of elements that differ from the base, and by how much on average, over a few tensors."""
    names = list(merged.names)[:: max(1, len(merged.names) // 9)]
    steps = torch.cat([(read(merged, name).float() - read(base, name).float()).reshape(-1).abs() for name in names])
    return float((steps > 0).float().mean()), float(steps.mean())


def _difference(a: WeightReader, b: WeightReader) -> tuple[float, float]:
    """The share of elements that differ, and the largest difference, over a few tensors."""
    names = list(a.names)[:: max(1, len(a.names) // 9)]
    differing = total = 0
    largest = 0.0
    for name in names:
        difference = (read(a, name).float() - read(b, name).float()).abs()
        differing += int(torch.count_nonzero(difference))
        total += difference.numel()
        largest = max(largest, float(difference.max()))
    return differing / total, largest


def _show(samples: Sequence[Sample], methods: Sequence[str], console: Console) -> None:
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title="Merging four models of 1 GB", title_justify="left"
    )
    for heading in ("method", "tool", "wall s", "CPU s", "peak", "anonymous", "mergekit : this", "this : bound"):
        table.add_column(heading, justify="left" if heading in ("method", "tool") else "right", no_wrap=True)
    for method in methods:
        for tool in (MERGEKIT, OURS, COMPAT, BOUND):
            those = [sample for sample in samples if (sample.method, sample.tool) == (method, tool)]
            if those:
                table.add_row(*_row(those, samples))
    console.print(table)
    console.print(
        "wall: the whole process, median (least to most) of the rounds; this : bound leaves out start and imports",
        highlight=False,
    )


def _row(those: Sequence[Sample], samples: Sequence[Sample]) -> list[str]:
    first = those[0]
    walls = [sample.wall_seconds for sample in those]
    return [
        first.method,
        first.tool,
        f"{median(walls):.1f} ({min(walls):.1f} to {max(walls):.1f})",
        f"{median(sample.cpu_seconds for sample in those):.1f}",
        f"{max(sample.peak_bytes for sample in those) >> 20} MiB",
        f"{max(sample.anonymous_bytes for sample in those) >> 20} MiB",
        _ratios(those, samples, MERGEKIT, lambda this, other: other.wall_seconds / this.wall_seconds),
        _ratios(those, samples, BOUND, lambda this, other: (this.work_seconds or 0) / (other.work_seconds or 1)),
    ]


def _ratios(
    those: Sequence[Sample], samples: Sequence[Sample], other: str, ratio: Callable[[Sample, Sample], float]
) -> str:
    """The median over the rounds, and their spread."""
    if those[0].tool in (other, BOUND, MERGEKIT):
        return ""
    pairs = [(a, b) for a in those for b in samples if (b.method, b.tool, b.round) == (a.method, other, a.round)]
    found = [ratio(a, b) for a, b in pairs]
    return f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/merging.py", description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit", type=Path, help="a Python in whose environment mergekit is installed")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "merging-benchmark", help="checkpoints"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="every figure as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
