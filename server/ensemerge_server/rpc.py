"""The seam between RPCs and transports: bytes in, bytes out, and a status for every error.

A transport looks a method up by its full name, calls it, and gets told how to make the answer:

    methods["/inference.GRPCInferenceService/ModelInfer"](message, call, deliver)

`deliver` is called exactly once, on any thread, with a function that returns the answer's bytes or raises an error of
ours. The transport calls that function on whichever of its threads it likes best, and maps an error with `status_of`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from ensemerge.errors import (
    Cancelled,
    DeadlineExceeded,
    EnsemergeError,
    ExecutionFailed,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from ensemerge_server.servable import never

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

Finish = Callable[[], bytes]
Deliver = Callable[[Finish], None]


class Code(IntEnum):
    """gRPC's status codes, by their numbers on the wire; a transport translates them to its own."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


# The one table from errors to codes. The first class that fits counts.
STATUS: Sequence[tuple[type[EnsemergeError], Code]] = (
    (InvalidRequest, Code.INVALID_ARGUMENT),
    (NotFound, Code.NOT_FOUND),
    (DeadlineExceeded, Code.DEADLINE_EXCEEDED),
    (Cancelled, Code.CANCELLED),
    (PermissionDenied, Code.PERMISSION_DENIED),
    (Unsupported, Code.UNIMPLEMENTED),
    (Unavailable, Code.UNAVAILABLE),
)


def status_of(error: Exception) -> Code:
    """The status code that tells a client about `error`."""
    return next((code for kind, code in STATUS if isinstance(error, kind)), Code.INTERNAL)


@dataclass(frozen=True, slots=True)
class Call:
    """What a transport knows about one call. `local` callers sit on this machine; `deadline` is monotonic time."""

    local: bool = False
    deadline: float = math.inf
    cancelled: Callable[[], bool] = never


class Method(Protocol):
    """One RPC."""

    def __call__(self, message: bytes, call: Call, deliver: Deliver, /) -> None: ...


def at_once(kind: type[M], answer: Callable[[M], Message]) -> Method:
    """An RPC that is answered on the spot."""

    def method(message: bytes, call: Call, deliver: Deliver) -> None:  # noqa: ARG001
        deliver(lambda: answer(parse(kind, message)).SerializeToString())

    return method


def parse(kind: type[M], message: bytes) -> M:
    """A message from its bytes. Raises InvalidRequest."""
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no {kind.DESCRIPTOR.full_name}: {error}") from error


def expected(error: Exception) -> EnsemergeError:
    """An error of ours as it is; one that nobody foresaw goes to the log and not to the client."""
    if isinstance(error, EnsemergeError):
        return error
    log.error("unexpected failure", exc_info=error)
    return ExecutionFailed(f"the server failed on this request ({type(error).__name__}); its log says more")


def failing(error: EnsemergeError) -> Finish:
    """What is delivered instead of an answer."""

    def finish() -> bytes:
        raise error

    return finish
