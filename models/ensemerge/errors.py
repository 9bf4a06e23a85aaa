"""Everything that can go wrong, as one tree.

    EnsemergeError
    ├── InvalidRequest        a request that no model could answer as it stands
    ├── NotFound              no such model or version
    ├── Unavailable           known, but cannot answer now
    │   ├── QueueFull         more requests wait than the model's queue holds
    │   └── ShuttingDown      the server is stopping
    ├── DeadlineExceeded      the caller's deadline passed before there was an answer
    ├── Cancelled             the caller went away before there was an answer
    ├── PermissionDenied      the caller may not do this
    ├── Unsupported           the protocol knows it, this server does not do it
    ├── ExecutionFailed       the model itself failed while it ran
    ├── InvalidModel          a model file that cannot be used
    │   └── StructureMismatch two graphs that were expected to be alike are not
    ├── InvalidSpec           a model.yaml (or a version folder) that cannot be understood
    ├── InvalidData           arrays or files handed to the workshop that do not fit
    └── CheckFailed           a step did not keep what it promised; `difference` and `bound` say by how much

A message says what was expected, what came, and what to do. No error knows a transport: `ensemerge_server.rpc`
holds the one table from these classes to status codes.
"""

from __future__ import annotations

from collections.abc import Mapping


class EnsemergeError(Exception):
    """Any error that ensemerge raises on purpose. `parameters` say what a reply would: the experiment, its arm."""

    parameters: Mapping[str, bool | int | float | str] = {}  # replaced, never changed


class InvalidRequest(EnsemergeError):
    pass


class NotFound(EnsemergeError):
    pass


class Unavailable(EnsemergeError):
    pass


class QueueFull(Unavailable):
    pass


class ShuttingDown(Unavailable):
    pass


class DeadlineExceeded(EnsemergeError):
    pass


class Cancelled(EnsemergeError):
    pass


class PermissionDenied(EnsemergeError):
    pass


class Unsupported(EnsemergeError):
    pass


class ExecutionFailed(EnsemergeError):
    pass


class InvalidModel(EnsemergeError):
    pass


class StructureMismatch(InvalidModel):
    pass


class InvalidSpec(EnsemergeError):
    pass


class InvalidData(EnsemergeError):
    pass


class CheckFailed(EnsemergeError):
    """A promise was broken: what was measured lies above the bound.

    `difference` and `bound` are in the unit that the message names.
    """

    def __init__(self, message: str, *, difference: float, bound: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.bound = bound
