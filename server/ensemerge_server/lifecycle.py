"""Whether the server takes requests, and whether those that it took are answered."""

from __future__ import annotations

import threading
import time

# Calls that a transport had received but not handed over when the server stopped still come, and are refused with a
# word; when none came for this long, the transport may close. A transport that closes on them cuts them off.
QUIET_SECONDS = 0.1
SETTLE_SECONDS = 1.0


class Lifecycle:
    """Counts the inference requests in flight, and says when the last one has left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_flight = 0
        self._last_entered = time.monotonic()
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """From the moment that the server was told to stop, requests are refused."""
        return self._stopping

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def enter(self) -> None:
        """A request came."""
        with self._changed:
            self._in_flight += 1
            self._last_entered = time.monotonic()

    def leave(self) -> None:
        """Its answer, or its error, is made."""
        with self._changed:
            self._in_flight -= 1
            if self._stopping and not self._in_flight:
                self._changed.notify_all()

    def stop(self, drain_seconds: float) -> None:
        """Refuse what comes from now on; wait until what is in flight is answered and nothing more arrives."""
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: not self._in_flight, drain_seconds)
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < min(until, self._last_entered + QUIET_SECONDS):
            time.sleep(QUIET_SECONDS / 5)
