"""What a call can end in, as one tree.

ClientError
├── InvalidArgument     the request does not fit the model; the message says what was expected
├── NotFound            no such model, version or experiment
├── PermissionDenied    the server does not take this call from here
├── Unavailable         nobody listens, the queue is full, or the server is stopping: try again later
├── DeadlineExceeded    no answer within the timeout
├── ServerError         the model or the server failed
├── InvalidReply        the answer cannot be read as the protocol says
└── ClientClosed        the client was closed before
"""

from __future__ import annotations

import grpc


class ClientError(Exception):
    """Any error of a call. `code` is the name of its gRPC status, empty where there was none."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class InvalidArgument(ClientError):
    pass


class NotFound(ClientError):
    pass


class PermissionDenied(ClientError):
    pass


class Unavailable(ClientError):
    pass


class DeadlineExceeded(ClientError):
    pass


class ServerError(ClientError):
    pass


class InvalidReply(ClientError):
    pass


class ClientClosed(ClientError):
    pass


_ERRORS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def from_rpc(error: grpc.RpcError, target: str) -> ClientError:
    """grpc's error as one of ours."""
    code, details = error.code(), error.details() or ""
    kind = _ERRORS.get(code, ServerError)
    # The same status tells of a server that is busy and of a message that it will never take.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        kind = InvalidArgument
    where = f" (calling {target})" if kind in (Unavailable, DeadlineExceeded) else ""
    return kind(f"{details or code.name}{where}", code.name)
