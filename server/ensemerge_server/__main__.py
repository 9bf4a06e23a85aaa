"""The composition root: the one file of the server that knows everybody. `ensemerge serve`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from ensemerge.errors import EnsemergeError
from ensemerge.repository import Repository
from ensemerge_server.catalogue import Catalogue
from ensemerge_server.experiments.spec import ExperimentSpec, parse_experiment
from ensemerge_server.feedback import FeedbackService
from ensemerge_server.http import HttpServer, health_routes, metrics_routes
from ensemerge_server.kinds import builders
from ensemerge_server.lifecycle import Lifecycle
from ensemerge_server.metrics import Metrics
from ensemerge_server.recording import PredictionIds, Recorder
from ensemerge_server.service import HealthService, InferenceService, Limits
from ensemerge_server.session import check_installation
from ensemerge_server.settings import Settings
from ensemerge_server.store.sqlite import SqliteStore
from ensemerge_server.store.writer import StoreWriter
from ensemerge_server.transport.grpcio import GrpcServer

log = logging.getLogger("ensemerge_server")

STORE_FILE = "store.sqlite"
_HELP = {
    "host": "address to listen on; anything but loopback is open to the network",
    "grpc_port": "port of the Open Inference Protocol",
    "http_port": "port of /healthz and /readyz",
    "metrics_port": "port of /metrics",
    "name": "what the server calls itself in its metadata",
    "device": "auto, cpu or cuda",
    "threads": "threads for one run of a model; 0 takes every usable core, and one where more would not pay",
    "batch_rows": "rows of a batch, at most",
    "queue_requests": "requests that may wait for one model",
    "in_flight": "calls answered at the same time",
    "message_bytes": "size of a message, at most",
    "id_bytes": "size of a request's id, at most",
    "state": "folder of the store of predictions and labels",
    "drain_seconds": "time for requests in flight to finish after SIGTERM",
}


class Server:
    """Everything that runs, started and stopped in order. Raises errors of ours when something cannot start."""

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self._settings = settings
        self._lifecycle = Lifecycle()
        metrics = Metrics()
        self.catalogue = Catalogue(repository, builders(repository, settings))
        self._store = SqliteStore(settings.state_folder(repository.root, os.environ) / STORE_FILE)
        self._writer = StoreWriter(self._store, metrics)
        self.catalogue.load_all()
        metrics.watch(self.catalogue, self._lifecycle)
        limits = Limits(settings.name, settings.id_bytes)
        recorder = Recorder(metrics, self._writer, PredictionIds())
        inference = InferenceService(self.catalogue, recorder, self._lifecycle, limits)
        health = HealthService(inference, self.catalogue)
        own = FeedbackService(self._writer, self._store, _experiments(repository, self.catalogue), limits)
        self.grpc = GrpcServer({**inference.methods(), **health.methods(), **own.methods()}, settings)
        self.http = HttpServer(settings.host, settings.http_port, health_routes(inference), "--http-port")
        self.metrics = HttpServer(settings.host, settings.metrics_port, metrics_routes(metrics), "--metrics-port")

    def start(self) -> None:
        self.http.start()
        self.metrics.start()
        self.grpc.start()

    def stop(self) -> None:
        """Say that we are not ready, finish what is in flight, bring predictions and labels to disk, then go."""
        self._lifecycle.stop(self._settings.drain_seconds)
        self.grpc.stop()
        self.catalogue.close()
        self._writer.close()
        self.metrics.stop()
        self.http.stop()

    def addresses(self) -> dict[str, str]:
        ports = {"grpc": self.grpc.port, "http": self.http.port, "metrics": self.metrics.port}
        return {name: self._settings.address(port) for name, port in ports.items()}


def _experiments(repository: Repository, catalogue: Catalogue) -> dict[str, ExperimentSpec]:
    loaded = [deployed.name for deployed in catalogue.deployed if deployed.kind == "experiment"]
    return {name: parse_experiment(repository.spec(name)) for name in loaded}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a model repository over the Open Inference Protocol (gRPC)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = _stop_signal()
    try:
        check_installation()
        settings = Settings.read(os.environ, vars(options))
        server = Server(Repository(options.repository), settings)
    except EnsemergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    server.start()
    _announce(server, as_json=options.json)
    stop()
    log.info("stopping: requests in flight have %g s to finish", settings.drain_seconds)
    server.stop()
    return 0


def _stop_signal() -> Callable[[], object]:
    """Take SIGTERM and SIGINT from now on; the function returned waits for one.

    Python runs signal handlers on the main thread alone, which may sleep while another thread gets the signal. The
    byte in the pipe is written by whichever thread that is, and wakes the main one.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return lambda: os.read(reader, 1)


def _announce(server: Server, *, as_json: bool) -> None:
    states = {entry.name: entry.state for entry in server.catalogue.index()}
    addresses = server.addresses()
    if as_json:
        print(json.dumps({**addresses, "models": states}), flush=True)
        return
    ready = sum(state == "READY" for state in states.values())
    where = ", ".join(f"{name} {address}" for name, address in addresses.items())
    print(f"ensemerge serves {ready} of {len(states)} models: {where}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemerge serve",
        description=main.__doc__,
        epilog="example: ensemerge serve models/repository --grpc-port 8001",
    )
    parser.add_argument("repository", type=Path, help="folder of <name>/<version>/model.onnx")
    parser.add_argument("--json", action="store_true", help="announce addresses and models as one line of JSON")
    for setting in fields(Settings):
        kind = type(setting.default)
        default = setting.default if setting.default != "" else "the user's state folder"
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=kind,
            metavar=kind.__name__.upper(),
            help=f"{_HELP[setting.name]} (default {default})",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
