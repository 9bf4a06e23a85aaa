"""The gRPC transport on grpcio's synchronous server: the only door to grpc on this side.

Each call holds a thread until its answer is there. That costs less processor time than grpcio's asyncio server.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import NoReturn

import grpc

from ensemerge.errors import EnsemergeError, Unavailable
from ensemerge_server.rpc import Call, Finish, Method, expected, status_of
from ensemerge_server.settings import Settings

# A byte beyond ASCII takes three in the trailers, of which clients accept 8 KiB.
DETAILS_BYTES = 2048
GRACE_SECONDS = 1.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# How grpcio writes a peer on this machine; the brackets of IPv6 come escaped or not, by its version.
_LOCAL = (
    "ipv4:127.",
    "ipv6:[::1]",
    "ipv6:%5B::1%5D",
    "ipv6:[::ffff:127.",
    "ipv6:%5B::ffff:127.",
    "unix:",
)


class GrpcServer:
    """Serves `methods` on one port. Raises Unavailable when the port cannot be bound."""

    def __init__(self, methods: Mapping[str, Method], settings: Settings) -> None:
        workers = futures.ThreadPoolExecutor(settings.in_flight, thread_name_prefix="grpc")
        self._server = grpc.server(
            workers,
            handlers=[_Methods(methods)],
            # As many as there are threads: a call in excess is refused at once and never waits unseen.
            maximum_concurrent_rpcs=settings.in_flight,
            options=[
                ("grpc.max_receive_message_length", settings.message_bytes),
                ("grpc.max_send_message_length", -1),
                # Otherwise a second server binds the same port without a word and takes half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        address = settings.address(settings.grpc_port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(
                f"gRPC cannot listen on {address}; expected a free port: stop who uses it, or choose --grpc-port"
            ) from error

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        """Close the port. Calls that are still on their way have a moment to leave."""
        self._server.stop(GRACE_SECONDS).wait()


class _Methods(grpc.GenericRpcHandler):
    def __init__(self, methods: Mapping[str, Method]) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(_behaviour(method)) for name, method in methods.items()
        }

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._handlers.get(call.method)


def _behaviour(method: Method) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """A method as grpcio wants it: bytes in, bytes out, errors as the context's status."""

    def behave(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return _answer(method, message, _call(context))
        except Exception as error:  # a mistake of ours must not reach the client as a stack trace
            _abort(context, expected(error))

    return behave


def _answer(method: Method, message: bytes, call: Call) -> bytes:
    """Call the method, sleep until it delivers, and make the answer on this thread."""
    delivered = threading.Lock()
    delivered.acquire()
    finishes: list[Finish] = []

    def deliver(finish: Finish) -> None:
        finishes.append(finish)
        delivered.release()

    method(message, call, deliver)
    delivered.acquire()
    return finishes[0]()


def _call(context: grpc.ServicerContext) -> Call:
    remaining = context.time_remaining()
    deadline = math.inf if remaining is None else time.monotonic() + remaining
    return Call(context.peer().startswith(_LOCAL), deadline, lambda: not context.is_active())


def _abort(context: grpc.ServicerContext, error: EnsemergeError) -> NoReturn:
    context.abort(_CODES[status_of(error)], _shortened(str(error)))


def _shortened(text: str) -> str:
    encoded = text.encode()
    return text if len(encoded) <= DETAILS_BYTES else encoded[:DETAILS_BYTES].decode(errors="ignore") + "…"
