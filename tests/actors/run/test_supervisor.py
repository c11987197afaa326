"""Signals to a run, in this process."""

import os
import signal
import threading

import pytest

from actors.run.supervisor import Signals
from rlproxi.errors import RunStopped


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_between_two_waits_a_signal_ends_the_run_with_the_way_on(number):
    with Signals(10) as signals, pytest.raises(RunStopped, match=f"asked to end by {number.name}; go on with --resume"):
        send(number)
    assert signals.name == number.name


def test_while_a_stage_is_watched_the_first_asks_and_the_second_ends(capsys):
    with Signals(7) as signals:
        signals.watched = True
        send(signal.SIGTERM)
        assert signals.name == "SIGTERM" and "for at most 7 s (faults.grace_s)" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Signals(1):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_there_is_nothing_to_handle():
    told = []
    thread = threading.Thread(target=lambda: told.append(Signals(1).__enter__().replaced))
    thread.start()
    thread.join()
    assert told == [{}]
