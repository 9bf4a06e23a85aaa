"""What one MuDSC alignment of two ResNet-50s takes, stage by stage, from two ONNX files to a merge that is restored.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --image-size 128 --rows 128      # smaller

The networks have 25.6 million weights and are drawn at random, the images too: the work is that of trained networks,
but for the number of sweeps. Peaks of memory are the process's so far; the networks are exported by another one. After
it come assignments of 2,048 units, next to scipy's own function.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import torch
from networks import bottleneck_network
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import nn

from ensemerge.align.activations import Observed, correlate
from ensemerge.align.assignment import assign
from ensemerge.align.matching import Matching, match
from ensemerge.align.prepare import MovedWeights
from ensemerge.align.proof import permuted, prove_same, weights_of
from ensemerge.align.similarity import Balanced, SortedWeights, WeightCorrelations
from ensemerge.export import InputSpec, export_module
from ensemerge.graph.derive import derive_symmetry
from ensemerge.graph.files import named, save
from ensemerge.graph.statistics import statistics_of
from ensemerge.graph.surgery import with_weights
from ensemerge.graph.symmetry import Symmetry
from ensemerge.merge.checkpoint import lay_out
from ensemerge.merge.engine import merge_weights
from ensemerge.merge.methods.table import METHODS
from ensemerge.merge.onnx_forms import PairedModels, pair_models
from ensemerge.merge.opened import Library, open_models
from ensemerge.merge.recipe import parse_model_yaml
from ensemerge.repository import Spec
from ensemerge.restore.batch_norm import restore_batch_norm
from ensemerge.weights.arrays import to_array
from ensemerge.weights.writer import MemoryWriter

INPUT = "image"
NAMES = ("first.onnx", "second.onnx")
PROOF_ROWS = 16
SETTLING_ROWS = 8
# How much each block adds to its shortcut. With 1, untrained layers enlarge every rounding until the proof fails.
BLOCK_SCALE = 0.2
UNITS = 2048
ROUNDS = 5
MOST_SECONDS, MOST_BYTES = 600, 4 << 30


@dataclass(frozen=True)
class Stage:
    """What one part of the work took, and the most memory that the process had had by its end."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


class Stages:
    """The stages of a run, in order."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        self.done.append(Stage(name, wall, processor, peak))


# --- The networks


def export(path: Path, seed: int, side: int) -> None:
    """A ResNet-50 with random weights, and the statistics of its own answers to random images.

    With those of a fresh network, 0 and 1, its values would fade from layer to layer.
    """
    torch.manual_seed(seed)
    network = bottleneck_network(BLOCK_SCALE).train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # the statistics of one batch, whole
    with torch.no_grad():
        network(torch.randn(SETTLING_ROWS, 3, side, side))
    export_module(network, [InputSpec(INPUT, (3, side, side))], ("logits",), path)


def export_both(folder: Path, side: int) -> None:
    """In a process of its own, so that its memory does not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        for seed, name in enumerate(NAMES):
            process.submit(export, folder / name, seed, side).result()


# --- The alignment


class Alignment:
    """What `kind: merge` does for `merge_method: mudsc`, one step after the other."""

    def __init__(self, folder: Path, images: np.ndarray, alpha: float) -> None:
        body = {"merge_method": "mudsc", "models": [{"model": name} for name in NAMES]}
        self._recipe = parse_model_yaml(Spec("merged", "merge", None, body, "merged/model.yaml"), METHODS)
        self._folder = folder
        self._feeds = {INPUT: images}
        self._alpha = alpha

    def run(self, stages: Stages, restore_rows: int) -> tuple[Symmetry, Matching]:
        """Everything, timed. Raises CheckFailed where the second network has changed, or statistics do not settle."""
        with stages.stage("load and pair"):
            paired = pair_models(self._recipe, open_models(self._recipe, Library(self._folder)))
            first, second = paired.graphs.values()
        with stages.stage("derive symmetry"):
            symmetry = derive_symmetry(first, self._feeds)
        with stages.stage("compare activations"):
            observed = [Observed(graph, _names(paired, name)) for name, graph in paired.graphs.items()]
            tables = correlate(symmetry, observed, self._feeds, [(0, 1)])[0, 1]
        with stages.stage("match units"):
            ignored = statistics_of(first)
            similarity = Balanced(self._alpha, WeightCorrelations(ignored), tables)
            ours, theirs = (weights_of(graph, symmetry) for graph in (first, second))
            matching = match(symmetry, ours, theirs, similarity, SortedWeights(ignored))
        with stages.stage("prove"):
            few = {name: array[:PROOF_ROWS] for name, array in self._feeds.items()}
            prove_same(second, permuted(second, symmetry, matching.permutations), [few])
        with stages.stage("merge"):
            merged = self._merged(paired, symmetry, matching)
        with stages.stage("restore statistics"):
            restored = restore_batch_norm(merged, {name: array[:restore_rows] for name, array in self._feeds.items()})
        with stages.stage("save"):
            save(restored.model, self._folder / "merged.onnx")
        return symmetry, matching

    def _merged(self, paired: PairedModels, symmetry: Symmetry, matching: Matching) -> ir.Model:
        """The mean of the first network and the second in its order, in the first one's graph."""
        first, second = (paired.models[name] for name in NAMES)
        moved = replace(second, reader=MovedWeights(second.reader, symmetry, matching.permutations))
        _, (output,) = lay_out(self._recipe, dict(zip(NAMES, (first, moved), strict=True)))
        writer = MemoryWriter(output.layout)
        merge_weights(output.jobs, writer)
        return with_weights(paired.form.model, {name: to_array(tensor) for name, tensor in writer.tensors.items()})


def _names(paired: PairedModels, name: str) -> dict[str, str]:
    """What the values of the first network are called in another."""
    return {named(ours): named(theirs) for ours, theirs in paired.pairings[name].items()}


# --- Assignments


def assignments() -> dict[str, dict[str, float]]:
    """The median seconds of one assignment of 2,048 units, by table and by who assigns; in turn, round by round."""
    generator = np.random.default_rng(0)
    random = generator.standard_normal((UNITS, UNITS))
    # Correlations of trained networks lie in between: some partners stand out, many do not.
    planted = 0.1 * random + np.eye(UNITS)[generator.permutation(UNITS)]
    contenders: dict[str, Callable[[np.ndarray], object]] = {
        "assign": assign,
        "scipy": lambda table: linear_sum_assignment(table, maximize=True),
    }
    return {name: _timed(table, contenders) for name, table in (("random", random), ("planted", planted))}


def _timed(table: np.ndarray, contenders: Mapping[str, Callable[[np.ndarray], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender(table)
            seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the networks, align and merge them, show what it took."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    stages = Stages()
    shape = (options.rows, 3, options.image_size, options.image_size)
    with tempfile.TemporaryDirectory() as scratch:
        export_both(Path(scratch), options.image_size)
        images = np.random.default_rng(0).standard_normal(shape, np.float32)
        symmetry, matching = Alignment(Path(scratch), images, options.alpha).run(stages, options.restore_rows)
    console.print(_stage_table(stages.done))
    console.print(
        f"{len(symmetry.free)} spaces, {sum(space.size for space in symmetry.free)} units; {matching.sweeps} sweeps "
        f"from the better start ({matching.start}); {options.rows} images of {options.image_size}×"
        f"{options.image_size}, statistics from {options.restore_rows}"
    )
    console.print(_verdict(stages.done))
    for table, seconds in assignments().items():
        figures = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        console.print(f"assignment of {UNITS:,} units, {table}: {figures}")
    return 0


def _stage_table(stages: Sequence[Stage]) -> Table:
    table = Table("stage", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("wall s", "CPU s", "peak so far"):
        table.add_column(column, justify="right")
    for stage in stages:
        figures = (f"{stage.wall_seconds:.1f}", f"{stage.cpu_seconds:.1f}", f"{stage.peak_bytes >> 20} MiB")
        table.add_row(stage.name, *figures)
    total = (sum(stage.wall_seconds for stage in stages), sum(stage.cpu_seconds for stage in stages))
    table.add_section()
    table.add_row("in all", *(f"{value:.1f}" for value in total), f"{stages[-1].peak_bytes >> 20} MiB")
    return table


def _verdict(stages: Sequence[Stage]) -> str:
    seconds, peak = sum(stage.wall_seconds for stage in stages), stages[-1].peak_bytes
    time_kept = "within" if seconds <= MOST_SECONDS else "not within"
    memory_kept = "within" if peak <= MOST_BYTES else "not within"
    return f"{time_kept} {MOST_SECONDS // 60} minutes, {memory_kept} {MOST_BYTES >> 30} GiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/alignment.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="calibration images for activations")
    parser.add_argument("--restore-rows", type=int, default=32, help="of them for the statistics of the merge")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--alpha", type=float, default=0.5, help="the share of weights in the similarity")
    return parser


if __name__ == "__main__":
    sys.exit(main())
