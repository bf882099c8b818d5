"""Signals: asked once, they are noted; what was there before comes back; a thread changes nothing."""

import os
import signal
import threading

from warploom.train.guard import StopSignals


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_first_signal_is_noted_and_disarms_both():
    before = handlers()
    with StopSignals() as signals:
        assert signals.received is None and handlers() == [signals._receive] * 2
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is signal.SIGINT and handlers() == [signal.SIG_DFL] * 2
    assert handlers() == before


def test_handlers_come_back_after_an_error():
    before = handlers()
    try:
        with StopSignals():
            raise RuntimeError
    except RuntimeError:
        assert handlers() == before


def test_a_thread_leaves_the_handlers_alone():
    before, seen = handlers(), []

    def work():
        with StopSignals() as signals:
            seen.append((handlers(), signals.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)] and handlers() == before
