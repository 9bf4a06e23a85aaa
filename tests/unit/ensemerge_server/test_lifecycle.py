import threading

from ensemerge_server.lifecycle import Lifecycle

SECONDS = 10


def test_stopping_waits_for_what_is_in_flight() -> None:
    lifecycle = Lifecycle()
    lifecycle.enter()
    stopping = threading.Thread(target=lifecycle.stop, args=(SECONDS,))
    stopping.start()
    while not lifecycle.stopping:
        pass
    assert stopping.is_alive()
    lifecycle.leave()
    stopping.join(SECONDS)
    assert not stopping.is_alive()
    assert lifecycle.in_flight == 0


def test_stopping_does_not_wait_for_ever() -> None:
    lifecycle = Lifecycle()
    lifecycle.enter()
    lifecycle.stop(drain_seconds=0.01)
    assert (lifecycle.stopping, lifecycle.in_flight) == (True, 1)
