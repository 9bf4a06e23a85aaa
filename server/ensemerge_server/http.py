"""The HTTP ports: health for probes, metrics for Prometheus."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from ensemerge.errors import Unavailable
from ensemerge_server.metrics import CONTENT_TYPE, Metrics
from ensemerge_server.service import InferenceService

log = logging.getLogger(__name__)

# A connection that sends nothing for this long is closed: it holds a thread.
IDLE_SECONDS = 10.0


@dataclass(frozen=True)
class Page:
    """An answer to a GET."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Route = Callable[[], Page]


def health_routes(inference: InferenceService) -> Mapping[str, Route]:
    """`/healthz`: the process runs. `/readyz`: every model can answer. The protocol's own paths mean the same."""

    def alive() -> Page:
        return Page(200, b"ok\n")

    def ready() -> Page:
        return Page(200, b"ready\n") if inference.ready else Page(503, b"not ready\n")

    return {"/healthz": alive, "/readyz": ready, "/v2/health/live": alive, "/v2/health/ready": ready}


def metrics_routes(metrics: Metrics) -> Mapping[str, Route]:
    """`/metrics` in Prometheus' text format."""
    return {"/metrics": lambda: Page(200, metrics.page(), CONTENT_TYPE)}


class _Listener(ThreadingHTTPServer):
    """The standard library's server without its look-up of our own name, and quiet about clients that hang up."""

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a connection from %s broke", client_address, exc_info=True)


class _Listener6(_Listener):
    address_family = socket.AF_INET6


def _listener(host: str) -> type[_Listener]:
    return _Listener6 if ":" in host else _Listener


class HttpServer:
    """Answers GET for a table of routes, on a thread of its own. Raises Unavailable when the port cannot be bound."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], option: str) -> None:
        try:
            self._server = _listener(host)((host, port), _handler(routes))
        except OSError as error:
            raise Unavailable(
                f"HTTP cannot listen on {host}:{port} ({error.strerror}); expected a free port: "
                f"stop who uses it, or choose {option}"
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name=f"http-{self.port}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(routes: Mapping[str, Route]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS

        def do_GET(self) -> None:
            route = routes.get(self.path.partition("?")[0])
            page = route() if route else Page(404, f"expected one of: {', '.join(routes)}\n".encode())
            self.send_response(page.status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page.body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            log.debug("%s %s", self.address_string(), format % args)

    return Handler
