"""`ensemerge barrier`: how far the loss rises on the straight line between two networks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ensemerge.connect.labelled import Labelled, read_labelled
from ensemerge.connect.linear import Curve, Point, as_it_is, barrier
from ensemerge.errors import EnsemergeError, InvalidModel, InvalidSpec
from ensemerge.graph.feeds import read_arrays
from ensemerge.graph.files import load
from ensemerge.graph.run import Arrays
from ensemerge.graph.tasks import infer_task, settle_task
from ensemerge.progress import Notify
from ensemerge.report.progress import bars
from ensemerge.repository import Repository, Task, parse_reference
from ensemerge.restore.choose import restore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLE = "example: ensemerge barrier digits-a digits-b --repository models/repository --data test.npz --plot line.png"
PICTURES = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Walk from network A to network B in a straight line, and say how far loss and error rise on the way."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plot is not None:
        _refuse_picture(parser, options.plot)
    try:
        with bars(Console(stderr=True)) as notify:
            walked = _walk(options, notify)
        if options.plot is not None:
            _draw(walked, options.plot)
    except (EnsemergeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([each.to_dict() for each in walked], indent=2))
    else:
        _show(walked)
    return 0


@dataclass(frozen=True)
class _Network:
    """A network, what a person called it, and what its answer means."""

    name: str
    model: ir.Model
    task: Task | None

    @property
    def classification(self) -> Task:
        if self.task is None or self.task.kind != "classification":
            raise InvalidModel(
                f"'{self.name}' is no classifier as far as its graph tells; expected one output (batch, classes), or a "
                "model of a repository with `task:` in its model.yaml"
            )
        return self.task


@dataclass(frozen=True)
class _Walked:
    """A curve, the names of its ends, and what was restored on the way, each thing once."""

    start: str
    end: str
    curve: Curve
    restored: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.start} → {self.end}"

    def to_dict(self) -> dict[str, object]:
        heights = {"loss_barrier": self.curve.loss_barrier, "error_barrier": self.curve.error_barrier}
        return {"from": self.start, "to": self.end, **heights, "restored": list(self.restored), **asdict(self.curve)}


@dataclass
class _Restoring:
    """Restores each network of a line towards what its two ends have, each by its share; `done` says how."""

    ends: Sequence[ir.Model]
    feeds: Arrays
    done: list[str] = field(default_factory=list)

    def __call__(self, model: ir.Model, t: float) -> ir.Model:
        try:
            restored = restore(model, self.ends, self.feeds, shares=[1 - t, t])
        except InvalidModel as error:
            raise InvalidModel(f"{error}; or measure the weights as they are, with --no-restore") from error
        self.done.append(restored.done)
        return restored.model


def _walk(options: argparse.Namespace, notify: Notify) -> list[_Walked]:
    data = read_labelled(options.data)
    feeds = data.feeds if options.calibration is None else read_arrays(options.calibration)
    repository = None if options.repository is None else Repository(options.repository)
    first = _open(options.a, repository)
    others = [_open(text, repository) for text in (options.b, *options.aligned)]
    return [
        _walk_to(first, other, data, feeds if options.restore else None, options.points, notify) for other in others
    ]


def _walk_to(
    first: _Network, other: _Network, data: Labelled, feeds: Arrays | None, points: int, notify: Notify
) -> _Walked:
    """One curve; without `feeds`, nothing is restored."""
    task = first.classification
    if other.classification.classes != task.classes:
        raise InvalidModel(f"'{first.name}' and '{other.name}' name other classes; expected one list in one order")
    restoring = None if feeds is None else _Restoring([first.model, other.model], feeds)
    curve = barrier(
        first.model,
        other.model,
        points,
        score=lambda model: data.score(model, task),
        prepare=restoring or as_it_is,
        notify=lambda _, done, total: notify(f"{first.name} → {other.name}", done, total),
    )
    return _Walked(first.name, other.name, curve, list(dict.fromkeys(restoring.done if restoring else ())))


def _open(text: str, repository: Repository | None) -> _Network:
    """An .onnx file, or a model of the repository. Raises InvalidModel, InvalidSpec, NotFound."""
    if text.endswith(".onnx"):
        model = load(text)
        return _Network(text, model, infer_task(model))
    if repository is None:
        raise InvalidSpec(f"'{text}' is no .onnx file; expected one, or --repository with the folder of that model")
    name, number = parse_reference(text)
    version = repository.version(name, number)
    version.verify()
    model = load(version.model_path)
    stated = repository.spec(name).task or (version.manifest.task if version.manifest else None)
    return _Network(version.label, model, settle_task(stated, model))


def _show(walked: Sequence[_Walked]) -> None:
    console = Console()
    for each in walked:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("t", "loss", "accuracy"):
            table.add_column(heading, justify="right")
        for point in each.curve.points:
            table.add_row(f"{point.t:.2f}", f"{point.loss:.4f}", f"{point.accuracy:.1%}")
        console.print(f"[bold]{escape(each.name)}[/bold]", table, sep="\n")
        heights = f"barrier: loss {each.curve.loss_barrier:.4f}, error {each.curve.error_barrier * 100:.1f} points"
        restored = [f"restored at every point: {done}" for done in each.restored]
        console.print(heights, *restored, "", sep="\n", markup=False)


def _refuse_picture(parser: argparse.ArgumentParser, path: Path) -> None:
    """Exits with status 2 for a picture that could not be written when the work is done."""
    if path.suffix not in PICTURES:
        parser.error(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}")
    if not path.absolute().parent.is_dir():
        parser.error(f"--plot {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed; run: pip install 'ensemerge[showing]'")


def _draw(walked: Sequence[_Walked], path: Path) -> None:
    """Loss and accuracy along each line, with the straight lines above which barriers are measured."""
    # Here, because only this needs matplotlib.
    from matplotlib import pyplot

    from ensemerge.report.plots import COLOURS, STYLE

    with pyplot.rc_context(STYLE):
        figure, (losses, accuracies) = pyplot.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained")
        for each, colour in zip(walked, cycle(COLOURS), strict=False):
            curve, end = each.curve, f"to {Path(each.end).name}"
            losses_label = f"{end}: barrier {curve.loss_barrier:.2f}"
            _draw_line(losses, curve.points, [point.loss for point in curve.points], colour, losses_label)
            accuracies_label = f"{end}: barrier {curve.error_barrier * 100:.1f} points"
            _draw_line(accuracies, curve.points, [point.accuracy for point in curve.points], colour, accuracies_label)
        _finish(losses, "log-loss, nats")
        _finish(accuracies, "accuracy")
        losses.set_ylim(bottom=0)
        figure.suptitle(f"The straight line from {Path(walked[0].start).name}", fontsize=10)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_line(axes: Axes, points: Sequence[Point], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot([point.t for point in points], values, marker="o", markersize=3, color=colour, label=label)
    axes.plot([0, 1], [values[0], values[-1]], color=colour, linewidth=1, linestyle="--", alpha=0.5)


def _finish(axes: Axes, label: str) -> None:
    axes.grid(color="#eeeeee")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("t, the share of the second network")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ensemerge barrier", description=main.__doc__, epilog=EXAMPLE)
    parser.add_argument("a", metavar="A", help="an .onnx file, or name[:version] of a model in --repository")
    parser.add_argument("b", metavar="B", help="another network of the same architecture")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE.npz", help="an array for each input, and `labels`"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.npz",
        help="rows to restore statistics with (default: those of --data)",
    )
    parser.add_argument("--repository", type=Path, metavar="FOLDER", help="where models that are no files lie")
    parser.add_argument("--points", type=int, default=11, help="networks to score, both ends included (default 11)")
    parser.add_argument(
        "--restore",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="re-estimate BatchNorm statistics, or REPAIR networks without them, at every point (default: yes)",
    )
    parser.add_argument(
        "--aligned", action="append", default=[], metavar="ALIGNED_B", help="B in A's order: one more curve; may repeat"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.add_argument("--json", action="store_true", help="the curves as JSON")
    return parser
