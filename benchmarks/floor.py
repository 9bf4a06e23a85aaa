"""The floor: a bare grpcio server that answers every ModelInfer with the same bytes, and computes nothing.

    python benchmarks/floor.py reply.bin

What a request costs here is grpcio's own; a server on top of grpcio cannot cost less. It runs as `ensemerge serve`
does: grpcio's synchronous server, as many threads, messages left as bytes. It counts its answers where the server
counts its own, so that the benchmark checks both alike; that is less than a microsecond each.
"""

from __future__ import annotations

import json
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc
from prometheus_client import Counter, start_http_server

from ensemerge_client.calls import MODEL_INFER
from ensemerge_server.settings import Settings


def serve(reply: bytes) -> None:
    """Announce the addresses as one line of JSON, as `ensemerge serve --json` does, and answer until killed."""
    answered = Counter("ensemerge_requests", "Answers given.", ["code"]).labels("OK")

    def answer(message: bytes, context: grpc.ServicerContext) -> bytes:  # noqa: ARG001
        answered.inc()
        return reply

    _, service, method = MODEL_INFER.split("/")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.server(futures.ThreadPoolExecutor(Settings().in_flight))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    ports = {"grpc": server.add_insecure_port("127.0.0.1:0"), "metrics": _serve_metrics()}
    server.start()
    print(json.dumps({name: f"127.0.0.1:{port}" for name, port in ports.items()}), flush=True)
    threading.Event().wait()


def _serve_metrics() -> int:
    http, _ = start_http_server(0, "127.0.0.1")
    return int(http.server_port)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).read_bytes())
