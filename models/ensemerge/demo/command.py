"""`ensemerge demo`: train, ensemble, merge, serve, measure, on real handwritten digits."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ensemerge.demo import digits
from ensemerge.demo.check import check_counters
from ensemerge.demo.make import ALIGNED, COLLAPSED, ENSEMBLE, EXPERIMENT, MEMBERS, MERGED, STRANGERS, make_models
from ensemerge.demo.measure import IN_FLIGHT, Measurement, measure, send_labels
from ensemerge.demo.serving import running_server
from ensemerge.errors import EnsemergeError
from ensemerge.measures.intervals import Interval, paired_difference
from ensemerge.measures.scores import accuracy, agreement, correct
from ensemerge.progress import Notify
from ensemerge.report.page import write_page
from ensemerge.report.progress import bars
from ensemerge.report.scorecard import Answers, Comparison, Report, score
from ensemerge.report.terminal import show
from ensemerge.repository import Repository
from ensemerge_client import ClientError

STREAM_SEED = 41
USERS_SEED = 43
REPORT_FILE = "report.html"
WHAT = {
    "digits-base": "the start of the fine-tunes",
    "digits-a": "fine-tune on shifted digits",
    "digits-b": "fine-tune on rotated digits",
    "digits-c": "fine-tune on noisy digits",
    "digits-x": "trained on its own, three times as wide",
    "digits-y": "trained on its own, three times as wide",
    ENSEMBLE: "mean probability of a, b, c, one graph",
    MERGED: "weights of a, b, c averaged",
    COLLAPSED: "weights of x, y averaged",
    ALIGNED: "weights of x, y aligned, then averaged",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, ensemble, merge, serve and measure small networks on real handwritten digits."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        report = run(Repository(options.repository, create=True), options.report, options.requests, console)
    except (EnsemergeError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(report, console)
    console.print(f"\nThe report with plots: {options.report}")
    console.print(f"Serve these models for good: {_command()} serve {options.repository}", markup=False, soft_wrap=True)
    return 0


def run(repository: Repository, page: Path, requests: int, console: Console) -> Report:
    """Do the whole job once and write the page. Raises EnsemergeError, ClientError."""
    train_images, held_out = digits.load()
    stream = digits.traffic(held_out, requests, STREAM_SEED)
    with bars(console) as notify:
        make_models(repository, train_images, held_out, notify)
        measurements = asyncio.run(_serve_and_measure(repository, stream, notify))
    report = _report(measurements, stream)
    page.parent.mkdir(parents=True, exist_ok=True)
    shown = [card for card in report.models if card.name in (ENSEMBLE, MERGED, COLLAPSED, ALIGNED)]
    write_page(report, shown, page)
    return report


async def _serve_and_measure(repository: Repository, stream: digits.Images, notify: Notify) -> list[Measurement]:
    with running_server(repository.root) as addresses:
        # The experiment is between the ensemble and the merged fine-tunes; for the rest a part of the stream will do.
        plan = {"digits-base": max(1, len(stream) // 10)}
        plan |= dict.fromkeys((*STRANGERS, COLLAPSED, ALIGNED), max(1, len(stream) // 4))
        plan |= dict.fromkeys((*MEMBERS, ENSEMBLE, MERGED, EXPERIMENT), len(stream))
        measurements = await measure(addresses["grpc"], plan, stream, USERS_SEED, notify)
        await send_labels(addresses["grpc"], measurements, stream, notify)
        check_counters(addresses["metrics"], measurements, stream)
    return measurements


def _report(measurements: Sequence[Measurement], stream: digits.Images) -> Report:
    answers = {measurement.model: _answers(measurement, stream) for measurement in measurements}
    member_cost = float(np.mean([answers[name].cost for name in MEMBERS]))
    experiment = next(measurement for measurement in measurements if measurement.model == EXPERIMENT)
    models = [score(answers[name], member_cost) for name in WHAT]
    arms = [score(arm, member_cost) for arm in _arms(experiment, answers)]
    return Report(
        title="Handwritten digits: an ensemble, a merge, and a merge of strangers",
        models=tuple(models),
        arms=tuple(arms),
        comparisons=tuple(_comparisons(answers)),
        facts=tuple(_facts(answers, stream)),
    )


def _answers(measurement: Measurement, stream: digits.Images) -> Answers:
    log = measurement.log
    return Answers(
        name=measurement.model,
        what=WHAT.get(measurement.model, ""),
        probabilities=np.stack(log.probabilities),
        labels=stream.digits.numpy()[: measurement.rows],
        latencies=np.array(log.latencies),
        seconds=log.seconds,
        cost=float(np.median(log.compute_seconds)),
    )


def _arms(experiment: Measurement, answers: dict[str, Answers]) -> list[Answers]:
    """The experiment's answers, one group for each arm; an arm costs what its model costs."""
    whole = answers[EXPERIMENT]
    arms = np.array(experiment.log.arms)
    models = {"ensemble": ENSEMBLE, "merged": MERGED}
    return [
        Answers(
            name=f"arm {arm}",
            what=f"users whose hash leads to {model}",
            probabilities=whole.probabilities[arms == arm],
            labels=whole.labels[arms == arm],
            latencies=whole.latencies[arms == arm],
            # The arms ran at the same time: each has the experiment's rate.
            seconds=whole.seconds * float((arms == arm).mean()),
            cost=answers[model].cost,
        )
        for arm, model in models.items()
    ]


def _comparisons(answers: dict[str, Answers]) -> list[Comparison]:
    rights = {name: accuracy(answers[name].probabilities, answers[name].labels) for name in answers}
    best = max(MEMBERS, key=lambda name: rights[name])
    worse = min(STRANGERS, key=lambda name: rights[name])
    sentences = (
        (f"The ensemble against its best member, {best}", ENSEMBLE, best),
        ("The merged fine-tunes against the ensemble", MERGED, ENSEMBLE),
        (f"Two independent networks averaged as they are, against the worse of them, {worse}", COLLAPSED, worse),
        (f"The same two, their units aligned first, against {worse}", ALIGNED, worse),
    )
    return [Comparison(sentence, _compared(answers[first], answers[second])) for sentence, first, second in sentences]


def _compared(first: Answers, second: Answers) -> Interval:
    """On the requests that both were sent: all streams begin alike."""
    rows = min(len(first.labels), len(second.labels))
    return paired_difference(_hits(first)[:rows], _hits(second)[:rows])


def _hits(answers: Answers) -> np.ndarray:
    return np.asarray(correct(answers.probabilities, answers.labels))


def _facts(answers: dict[str, Answers], stream: digits.Images) -> list[tuple[str, str]]:
    disagree = 1 - agreement(answers[ENSEMBLE].probabilities, answers[MERGED].probabilities)
    setting = digits.TRAFFIC
    return [
        ("Stream", f"{len(stream):,} requests of one image, drawn from {digits.TEST_IMAGES} held-out digits"),
        ("Distortion", f"shift {setting.shift} px, rotation {setting.rotation}°, noise {setting.noise} (deviations)"),
        ("Intervals", f"for this stream of {digits.TEST_IMAGES} drawings; for drawings of other people they are wider"),
        ("Seeds", f"stream {STREAM_SEED}, users {USERS_SEED}"),
        ("In flight", f"{IN_FLIGHT} requests from one client; cost measured with one in flight"),
        ("Ensemble and merge disagree", f"on {disagree:.1%} of the requests"),
    ]


def _command() -> str:
    """This command as it was typed: in a virtual environment that is not active, its path is part of it."""
    script = Path(sys.argv[0])
    return str(script) if script.name == "ensemerge" else "ensemerge"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; expected at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemerge demo", description=main.__doc__, epilog="example: ensemerge demo --report report.html"
    )
    parser.add_argument("--repository", type=Path, default=Path("models/repository"), help="where the models go")
    parser.add_argument("--report", type=Path, default=Path(REPORT_FILE), help="where the page goes")
    parser.add_argument("--requests", type=_positive, default=20_000, help="length of the stream (default 20000)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
