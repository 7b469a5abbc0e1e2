"""Signals: what is noted, what is obeyed, what is left as it was."""

import os
import signal

import pytest

from guided_diffusion.machine.signals import Interrupted, StopSignals


def label(line: str) -> str:
    return f"[rank 3] {line}"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_until_it_can_be_obeyed(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals(label) as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=name) as interrupted:
            stop.check()
        assert interrupted.value.number == number
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the next one ends at once
    assert signal.getsignal(number) == before


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopSignals(label) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_is_answered_at_once(capfd):
    with StopSignals(label):
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
    with StopSignals(label):
        os.kill(os.getpid(), signal.SIGINT)
        line = "[rank 3] stopping after this evaluation; Ctrl-C again stops at once"
        assert capfd.readouterr().err == f"\n{line}\n"
