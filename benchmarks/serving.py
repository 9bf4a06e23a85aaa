"""How fast the server answers and what an answer costs, next to what ONNX Runtime and grpcio do on their own.

    python benchmarks/serving.py
    python benchmarks/serving.py --models tiny --rounds 5 --out benchmarks/results/tiny.json

The server has one core to itself, the load generator another one. ONNX Runtime in process and a bare grpcio server
take turns with it on its core, round by round: what else the machine does slows all of them alike, so that their
ratios hold where the figures do not.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from in_process import THREADS, InProcess
from load import GENERATORS, Generate, Question, best_generator
from measure import Cell, Contest, measure
from networks import NETWORKS, example, publish
from processes import Running, pinned, running
from results import FLOOR, FLOOR_IN_FLIGHT, IN_FLIGHT, SERVER, Results, show
from rich.console import Console

from ensemerge.errors import CheckFailed, EnsemergeError, Unavailable
from ensemerge.progress import Notify
from ensemerge.report.progress import bars
from ensemerge.repository import Repository
from ensemerge_client import Client, ClientError
from ensemerge_client.calls import MODEL_INFER

NO_H2LOAD = (
    "[yellow]h2load is not installed[/yellow] (Debian: nghttp2-client), so our AsyncClient made the load. It costs "
    "about as much as the server: requests/s and latencies may be the client's; CPU per request is the server's."
)
# What the tables need; a pipe has no width of its own.
PIPE_COLUMNS = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure requests per second and CPU per request of the server, next to ONNX Runtime in process."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    generator = best_generator()
    try:
        with bars(console) as notify:
            results = run(options.models, options.rounds, options.seconds, generator, notify)
    except (EnsemergeError, ClientError) as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    show(results, console)
    if generator == "AsyncClient":
        console.print(NO_H2LOAD)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(results.to_json())
    return 0


def run(models: Sequence[str], rounds: int, seconds: float, generator: str, notify: Notify) -> Results:
    """Build the models, serve them, and measure. Raises EnsemergeError, ClientError."""
    facts = _facts(generator)
    server_core, client_core = _cores()
    with tempfile.TemporaryDirectory(prefix="ensemerge-benchmark-") as name:
        folder = Path(name)
        repository = _published(folder / "repository", models, notify)
        # Everything that is not measured stays off the server's core, this process and the load generator included.
        with pinned(client_core), _contests(repository, models, GENERATORS[generator], server_core, folder) as contests:
            samples, limits = measure(contests, rounds, seconds, server_core, notify)
    return Results(facts, samples, limits)


def _cores() -> tuple[int, int]:
    """One core for the server, and one for the load."""
    if sys.platform != "linux":
        raise Unavailable(f"the benchmark pins processes and reads /proc: expected Linux, got {sys.platform}")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise Unavailable(f"expected 2 cores, one for the server and one for the load; this process may use {usable}")
    return usable[0], usable[1]


def _published(root: Path, models: Sequence[str], notify: Notify) -> Repository:
    repository = Repository(root, create=True)
    for position, model in enumerate(models):
        publish(repository, model)
        notify("export", position + 1, len(models))
    return repository


@contextmanager
def _contests(
    repository: Repository, models: Sequence[str], generate: Generate, core: int, folder: Path
) -> Iterator[list[Contest]]:
    """The servers, asleep, and everything that there is to be measured."""
    questions = [Question(model, example(model)) for model in models]
    with _server(repository, core, folder) as server, _floor(_reply(server, questions[0]), core, folder) as floor:
        contests = []
        for question in questions:
            cells = [Cell(SERVER, server, question, in_flight, generate) for in_flight in IN_FLIGHT]
            cells.append(Cell(FLOOR, floor, question, FLOOR_IN_FLIGHT, generate))
            in_process = InProcess(repository.version(question.model).model_path)
            _check_answer(server, question, in_process)
            contests.append(Contest(question, in_process, cells))
        yield contests


@contextmanager
def _server(repository: Repository, core: int, folder: Path) -> Iterator[Running]:
    """Our server with its settings by default, but for those that a fair comparison asks for."""
    command = [
        sys.executable,
        "-m",
        "ensemerge_server",
        str(repository.root),
        "--json",
        "--state",
        str(folder / "state"),
    ]
    command += [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command += ["--device=cpu", f"--threads={THREADS}"]
    with running(command, core, folder / "server.log") as process:
        yield process


@contextmanager
def _floor(reply: bytes, core: int, folder: Path) -> Iterator[Running]:
    """A grpcio server that always answers `reply`."""
    canned = folder / "reply.bin"
    canned.write_bytes(reply)
    command = [sys.executable, str(Path(__file__).with_name("floor.py")), str(canned)]
    with running(command, core, folder / "floor.log") as process:
        yield process


def _reply(server: Running, question: Question) -> bytes:
    """An answer as it comes from the wire. Those to all models have the same shape, so one stands for them all."""
    with grpc.insecure_channel(server.addresses["grpc"]) as channel:
        infer = channel.unary_unary(MODEL_INFER, request_serializer=bytes, response_deserializer=bytes)
        return infer(question.message)


def _check_answer(server: Running, question: Question, in_process: InProcess) -> None:
    """The answer is the same to the bit: the same runtime, file, threads and batch of one. Raises CheckFailed."""
    with Client(server.addresses["grpc"]) as client:
        got = client.infer(question.model, question.inputs)
    for name, expected in in_process.run(question.inputs).items():
        if not np.array_equal(got[name], expected):
            difference = float(np.abs(got[name] - expected).max())
            message = (
                f"'{name}' of '{question.model}' differs from ONNX Runtime in process by {difference:.1e}; expected 0"
            )
            raise CheckFailed(message, difference=difference, bound=0)


def _facts(generator: str) -> dict[str, str]:
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "system": platform.system(),
        "Python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "grpcio": grpc.__version__,
        "load from": generator,
    }


def _processor() -> str:
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns that everything takes (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell and turn (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write every sample as JSON, such as benchmarks/results/serving.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
