"""MuDSC's own protocol (Xu et al. 2024, arXiv:2403.01753) on CIFAR-10: two networks, five classes each, one merge.

    python benchmarks/cifar_split.py --data cifar10.tar.xz --width 1 --epochs 5 --images 4000 --learning-rate 0.003
    python benchmarks/cifar_split.py --data cifar10.tar.xz --width 8 --epochs 200 --device cuda    # the authors' scale

Each network learns its five classes by answering near the embedding of an image's class: logits are 100 times the
cosine. The authors take the embeddings from CLIP's text encoder; here they are fixed random orthonormal vectors, so
that nothing is downloaded and no class is nearer to one than to another. The networks are exported, and merged from a
model.yaml, as a user would; what is merged is asked for all ten classes (joint) and for the five of each task.

Each run appends its results to `--out`, one JSON object a line, and leaves out what is there already. The table is of
all lines with the same conditions.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import plain_network, residual_network
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import nn
from torch.nn import functional

from ensemerge.build import build
from ensemerge.errors import InvalidData
from ensemerge.export import InputSpec, Provenance, publish_module
from ensemerge.graph.run import Runner
from ensemerge.measures.intervals import Interval
from ensemerge.repository import Repository, Version

CLASSES = 10
SIDE = 32
# Of CLIP's text embeddings.
EMBEDDING = 512
LOGIT_SCALE = 100.0
CALIBRATION_FILE = "calibration.npz"


@dataclass(frozen=True)
class Architecture:
    """A network by width and outputs, the learning rate with which it trains, and whether a zip of it can be built.

    Without batch normalisation a zip would need its parents' moments, and it has no parents in one order.
    """

    build: Callable[[int, int], nn.Module]
    learning_rate: float
    zips: bool


# The first rate is the authors'; without normalisation it diverges.
ARCHITECTURES: Mapping[str, Architecture] = {
    "resnet20": Architecture(residual_network, 0.4, zips=True),
    "vgg": Architecture(plain_network, 0.002, zips=False),
}


@dataclass(frozen=True)
class Conditions:
    """What has to be alike for results to be compared. `images` are those of training, of both tasks."""

    network: str
    width: int
    epochs: int
    images: int
    test_images: int
    calibration_rows: int
    batch_rows: int
    learning_rate: float


# --- Images


@dataclass(frozen=True)
class Images:
    """Normalised pixels `(images, 3, 32, 32) float32`, and the number of each one's class, `(images,) int64`."""

    pixels: np.ndarray
    classes: np.ndarray

    def __getitem__(self, wanted: np.ndarray) -> Images:
        return Images(self.pixels[wanted], self.classes[wanted])


def read_images(data: Path, counts: Mapping[str, int]) -> dict[str, Images]:
    """The first images of each class, for each part (`train`, `test`) as many in all as `counts` says, shuffled.

    `data` is a folder or a tar archive of `part/class/name.jpg`. Raises InvalidData.
    """
    files: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
    for name, content in _files(data):
        part, kind, file = name.split("/")[-3:]
        files[part, kind].append((file, content))
    return {part: _part(part, files, count) for part, count in counts.items()}


def _files(data: Path) -> Iterator[tuple[str, bytes]]:
    if data.is_dir():
        yield from ((path.relative_to(data).as_posix(), path.read_bytes()) for path in data.glob("*/*/*.jpg"))
        return
    with tarfile.open(data) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".jpg") else None
            if content is not None:
                yield f"//{member.name}", content.read()


def _part(part: str, files: Mapping[tuple[str, str], list[tuple[str, bytes]]], count: int) -> Images:
    kinds = sorted(kind for one, kind in files if one == part)
    each = count // CLASSES
    if len(kinds) != CLASSES or not each or any(len(files[part, kind]) < each for kind in kinds):
        held = {kind: len(files[part, kind]) for kind in kinds}
        raise InvalidData(
            f"'{part}': expected {max(each, 1)} or more .jpg in {CLASSES} folders, one a class; got {held}"
        )
    chosen = [content for kind in kinds for _, content in sorted(files[part, kind])[:each]]
    order = np.random.default_rng(0).permutation(len(chosen))
    return Images(np.stack([_pixels(content) for content in chosen]), np.repeat(np.arange(CLASSES), each))[order]


def _pixels(content: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32)
    if image.shape != (SIDE, SIDE, 3):
        raise InvalidData(f"an image is {image.shape[:2]}; expected {(SIDE, SIDE)}")
    # Means and deviations of the channels over CIFAR-10.
    mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    normalised: np.ndarray = ((image / 255 - mean) / deviation).transpose(2, 0, 1).astype(np.float32)
    return normalised


# --- Training


def class_embeddings() -> np.ndarray:
    """Orthonormal vectors, the same every time, `(10, 512) float32`."""
    drawn = np.random.default_rng(0).standard_normal((EMBEDDING, CLASSES))
    return np.linalg.qr(drawn)[0].T.astype(np.float32)


def split(pair: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes of both tasks, five each: another division for every pair."""
    order = np.random.default_rng(pair).permutation(CLASSES)
    return np.sort(order[: CLASSES // 2]), np.sort(order[CLASSES // 2 :])


def train(conditions: Conditions, images: Images, classes: np.ndarray, seed: int, device: str) -> nn.Module:
    """A network that answers near the embedding of an image's class, shown those of `classes`; on the CPU when done.

    Its loss counts all ten classes. With its own five alone, as the authors have it, nothing but the weight decay of a
    long training keeps answers away from the embeddings of the others: after a few epochs most lie nearest to one.

    SGD with momentum 0.9 and weight decay 5e-4. The learning rate rises over the first 5 epochs, or a fifth of all, and
    falls to 0, both in a straight line.
    """
    torch.manual_seed(seed)
    network = ARCHITECTURES[conditions.network].build(conditions.width, EMBEDDING).to(device)
    own = images[np.isin(images.classes, classes)]
    pixels, numbers = torch.from_numpy(own.pixels).to(device), torch.from_numpy(own.classes).to(device)
    targets = torch.from_numpy(class_embeddings()).to(device)
    steps = conditions.epochs * -(-len(pixels) // conditions.batch_rows)
    warm_up = steps / max(5.0, conditions.epochs / 5)
    optimiser = torch.optim.SGD(network.parameters(), conditions.learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1))
    )
    network.train()
    for _ in range(conditions.epochs):
        for batch in torch.split(torch.randperm(len(pixels), device=device), conditions.batch_rows):
            optimiser.zero_grad()
            answers = functional.normalize(network(distorted(pixels[batch])))
            loss = functional.cross_entropy(LOGIT_SCALE * answers @ targets.T, numbers[batch])
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return network.cpu().eval()


def distorted(pixels: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to four places, and mirrored every other time: `(batch, 3, 32, 32)`, as before."""
    padded = functional.pad(pixels, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    places = torch.arange(SIDE, device=pixels.device) + torch.randint(9, (2, len(pixels), 1), device=pixels.device)
    mirrored = torch.rand(len(pixels), 1, device=pixels.device) < 0.5
    columns = torch.where(mirrored, places[1].flip(-1), places[1])
    rows = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[rows, places[0][:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # channels last in memory


# --- Methods

FIRST, SECOND, ENSEMBLE = "first network", "second network", "ensemble"
AVERAGE, BY_WEIGHTS, BY_ACTIVATIONS = "average", "weight matching", "activation matching"
ZIPIT, WEIGHT_ZIP, MUDSC_ALIGN, MUDSC_ZIP = "ZipIt", "weight zip", "MuDSC-align", "MuDSC-zip"
# What each form of MuDSC is made of: it has a reason to be where it does better than both.
HALVES = {MUDSC_ALIGN: (BY_WEIGHTS, BY_ACTIVATIONS), MUDSC_ZIP: (WEIGHT_ZIP, ZIPIT)}


@dataclass(frozen=True)
class Method:
    """A merge by its name and its part of the recipe; `alpha` is the share of weights in MuDSC's similarity."""

    name: str
    recipe: Mapping[str, Any]
    alpha: float | None = None


def methods(alphas: Sequence[float], *, zips: bool) -> list[Method]:
    """All merges that are compared. A zip by weights begins, as all do, with one by activations."""
    aligned = [
        Method(AVERAGE, {"merge_method": "linear"}),
        Method(BY_WEIGHTS, {"merge_method": "weight_matching"}),
        Method(BY_ACTIVATIONS, {"merge_method": "activation_matching"}),
        *(Method(MUDSC_ALIGN, _mudsc(alpha, "align"), alpha) for alpha in alphas),
    ]
    zipped = [
        Method(ZIPIT, {"merge_method": "zipit"}),
        Method(WEIGHT_ZIP, _mudsc(1.0, "zip")),
        *(Method(MUDSC_ZIP, _mudsc(alpha, "zip"), alpha) for alpha in alphas),
    ]
    return [*aligned, *zipped] if zips else aligned


def _mudsc(alpha: float, matching: str) -> dict[str, Any]:
    return {"merge_method": "mudsc", "parameters": {"alpha": alpha, "matching": matching}}


# --- Results


@dataclass(frozen=True)
class Scores:
    """Shares of images that are named rightly: among all ten classes, and among the five of their own task."""

    joint: float
    first: float
    second: float

    @property
    def average(self) -> float:
        return (self.first + self.second) / 2


@dataclass(frozen=True)
class Result:
    """One method on one pair of networks. `training_joint` is of the calibration images, by which alpha is chosen."""

    conditions: Conditions
    pair: int
    seed: int
    method: str
    alpha: float | None
    scores: Scores
    training_joint: float
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        return self.conditions, self.pair, self.seed, self.method, self.alpha

    @property
    def run(self) -> tuple[int, int]:
        return self.pair, self.seed


def read_results(path: Path) -> list[Result]:
    """All results of a file, none where there is no file yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [_result(json.loads(line)) for line in lines]


def _result(entry: dict[str, Any]) -> Result:
    return Result(**{**entry, "conditions": Conditions(**entry["conditions"]), "scores": Scores(**entry["scores"])})


# --- One pair


@dataclass(frozen=True)
class Answers:
    """How alike each image's answer is to each class, `(images, 10) float32`, larger for more alike."""

    test: np.ndarray
    calibration: np.ndarray


class PairRun:
    """Two networks of one pair in a model repository of their own, and all that is made of them."""

    def __init__(
        self, root: Path, conditions: Conditions, images: Mapping[str, Images], pair: int, seed: int, device: str
    ) -> None:
        self._repository = Repository(root, create=True)
        self._conditions = conditions
        self._test = images["test"]
        self._calibration = images["train"][np.arange(conditions.calibration_rows)]
        self._tasks = split(pair)
        self._pair, self._seed = pair, seed
        np.savez(root / CALIBRATION_FILE, image=self._calibration.pixels)
        for number, (name, classes) in enumerate(zip(("first", "second"), self._tasks, strict=True)):
            drawn = 2 * (1000 * pair + seed) + number
            network = train(conditions, images["train"], classes, drawn, device)
            inputs = [InputSpec("image", (3, SIDE, SIDE))]
            publish_module(
                self._repository, name, network, inputs, outputs=("embedding",), provenance=Provenance(seed=drawn)
            )

    def baselines(self) -> Iterator[Result]:
        """The networks alone, and their ensemble."""
        first, second = (self._answers(self._repository.version(name)) for name in ("first", "second"))
        yield self._result(Method(FIRST, {}), first, 0.0)
        yield self._result(Method(SECOND, {}), second, 0.0)
        together = Answers(
            self._ensembled(first.test, second.test), self._ensembled(first.calibration, second.calibration)
        )
        yield self._result(Method(ENSEMBLE, {}), together, 0.0)

    def merge(self, method: Method) -> Result:
        """Build the merge from its model.yaml and ask it."""
        name = f"{method.name}-{method.alpha}".replace(" ", "-").lower()
        recipe = {
            "kind": "merge",
            "models": [{"model": "first"}, {"model": "second"}],
            "calibration": {"data": f"../{CALIBRATION_FILE}", "restore": "auto"},
            **method.recipe,
        }
        self._repository.write_spec(name, recipe)
        began = time.perf_counter()
        version = build(self._repository, name)
        return self._result(method, self._answers(version), time.perf_counter() - began)

    def _answers(self, version: Version) -> Answers:
        runner = Runner(version.model_path)
        return Answers(*(_cosines(runner, images) for images in (self._test, self._calibration)))

    def _ensembled(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Of each network the probabilities of the classes that it knows: the surest answer counts."""
        together = np.empty_like(first)
        for cosines, classes in zip((first, second), self._tasks, strict=True):
            scaled = torch.from_numpy(LOGIT_SCALE * cosines[:, classes])
            together[:, classes] = torch.log_softmax(scaled, 1).numpy()
        return together

    def _result(self, method: Method, answers: Answers, seconds: float) -> Result:
        scores = self._scores(answers.test, self._test)
        training = self._scores(answers.calibration, self._calibration)
        return Result(
            self._conditions, self._pair, self._seed, method.name, method.alpha, scores, training.joint, seconds
        )

    def _scores(self, answers: np.ndarray, images: Images) -> Scores:
        joint = float((answers.argmax(1) == images.classes).mean())
        tasks = []
        for classes in self._tasks:
            own = np.isin(images.classes, classes)
            named = classes[answers[own][:, classes].argmax(1)]
            tasks.append(float((named == images.classes[own]).mean()))
        return Scores(joint, *tasks)


def _cosines(runner: Runner, images: Images) -> np.ndarray:
    embedding = runner.run({"image": images.pixels})["embedding"]
    lengths = np.linalg.norm(embedding, axis=1, keepdims=True)
    cosines: np.ndarray = embedding @ class_embeddings().T / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cosines


# --- What comes out


class Summary:
    """Results under one set of conditions, over pairs and seeds."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    @cached_property
    def rows(self) -> dict[str, dict[tuple[int, int], Result]]:
        """Results by name and run: MuDSC with each alpha, and with the one that training images chose."""
        found: dict[str, dict[tuple[int, int], Result]] = defaultdict(dict)
        chosen: dict[str, dict[tuple[int, int], Result]] = defaultdict(dict)
        for result in self._results:
            name = result.method if result.alpha is None else f"{result.method} {result.alpha:g}"
            found[name][result.run] = result
            if result.alpha is not None:
                best = chosen[result.method].get(result.run, result)
                chosen[result.method][result.run] = max(best, result, key=lambda one: one.training_joint)
        return {**found, **{f"{name}, alpha chosen": runs for name, runs in chosen.items()}}

    def table(self) -> Table:
        columns = ("joint", "per-task average", "first task", "second task", "seconds")
        table = Table("method", "runs", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right")
        for name, runs in self.rows.items():
            scores = [result.scores for result in runs.values()]
            accuracies = ([one.joint for one in scores], [one.average for one in scores])
            tasks = (np.mean([one.first for one in scores]), np.mean([one.second for one in scores]))
            seconds = np.mean([result.seconds for result in runs.values()])
            cells = [*(_percent(interval(values)) for values in accuracies), *(f"{100 * task:.1f}" for task in tasks)]
            table.add_row(name, str(len(runs)), *cells, f"{seconds:.0f}")
        return table

    def verdicts(self) -> Iterator[str]:
        """How MuDSC, with the alpha that training images chose, stands next to its halves, run by run."""
        for name, halves in HALVES.items():
            ours = self.rows.get(f"{name}, alpha chosen", {})
            known = [half for half in halves if ours.keys() & self.rows.get(half, {}).keys()]
            gains = {half: self._gain(ours, self.rows[half]) for half in known}
            for half, gain in gains.items():
                yield f"{name} against {half}: {_points(gain)} points of joint accuracy"
            if gains:
                ahead = [half for half, gain in gains.items() if gain.low > 0]
                won = "both" if len(ahead) == 2 else f"{ahead[0]} alone" if ahead else "neither"
                yield f"{name}: shown to be better than {won} of its halves"

    @staticmethod
    def _gain(ours: Mapping[tuple[int, int], Result], theirs: Mapping[tuple[int, int], Result]) -> Interval:
        runs = sorted(ours.keys() & theirs.keys())
        return interval([ours[run].scores.joint - theirs[run].scores.joint for run in runs])


def interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval by Student's t; of one value nothing more is known than itself."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _percent(share: Interval) -> str:
    if math.isinf(share.low):
        return f"{100 * share.estimate:.1f}"
    return f"{100 * share.estimate:.1f} ± {100 * (share.high - share.estimate):.1f}"


def _points(gain: Interval) -> str:
    if math.isinf(gain.low):
        return f"{100 * gain.estimate:+.1f} (one run, no interval)"
    return f"{100 * gain.estimate:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not in the file yet, then show all that is."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    architecture = ARCHITECTURES[options.network]
    conditions = Conditions(
        options.network,
        options.width,
        options.epochs,
        options.images,
        options.test_images,
        options.calibration_rows,
        options.batch_rows,
        options.learning_rate or architecture.learning_rate,
    )
    wanted = methods(options.alphas, zips=architecture.zips)
    if not architecture.zips:
        console.print(f"{options.network}: no zips, which need batch normalisation to restore")
    images = read_images(options.data, {"train": options.images, "test": options.test_images})
    for pair in options.pairs:
        for seed in options.seeds:
            _run(conditions, images, pair, seed, wanted, options, console)
    summary = Summary([result for result in read_results(options.out) if result.conditions == conditions])
    console.print(summary.table())
    for verdict in summary.verdicts():
        console.print(verdict)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(conditions).items()))
    return 0


def _run(
    conditions: Conditions,
    images: Mapping[str, Images],
    pair: int,
    seed: int,
    wanted: Sequence[Method],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """One pair of networks and all that is wanted of it, line by line into the file."""
    known = {result.key for result in read_results(options.out)}
    missing = [method for method in wanted if (conditions, pair, seed, method.name, method.alpha) not in known]
    if not missing:
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run = PairRun(Path(scratch), conditions, images, pair, seed, options.device)
        console.print(f"pair {pair}, seed {seed}: trained in {time.perf_counter() - began:.0f} s")
        for result in run.baselines():
            if result.key not in known:
                _keep(result, options.out, console)
        for method in missing:
            _keep(run.merge(method), options.out, console)


def _keep(result: Result, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    alpha = "" if result.alpha is None else f" {result.alpha:g}"
    scores = result.scores
    console.print(f"  {result.method}{alpha}: joint {scores.joint:.3f}, per-task average {scores.average:.3f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/cifar_split.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or tar of {train,test}/class/name.jpg")
    parser.add_argument("--network", choices=sorted(ARCHITECTURES), default="resnet20")
    parser.add_argument("--width", type=int, default=2, help="times 16 channels; the authors' ResNet-20 has 8")
    parser.add_argument("--epochs", type=int, default=8, help="the authors train for 200")
    parser.add_argument("--images", type=int, default=50_000, help="of training, both tasks together")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--calibration-rows", type=int, default=1000, help="training images, used without labels")
    parser.add_argument("--batch-rows", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, help="default: 0.4 for resnet20, 0.002 for vgg")
    parser.add_argument("--pairs", type=int, nargs="+", default=[0], help="numbers, each another division of classes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--device", default="cpu", help="of training: cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar_split.jsonl"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
