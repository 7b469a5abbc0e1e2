"""SIGTERM, SIGHUP and Ctrl-C: noted, and obeyed where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop, and it has."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Signals are noted, until the run can stop; a second Ctrl-C ends it at once."""

    def __init__(self, label: Callable[[str], str]):
        """label: makes a line of what is said to a first Ctrl-C."""
        self.label = label
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGTERM, signal.SIGINT]
        hangup = getattr(signal, "SIGHUP", None)  # of a closed terminal; not on Windows
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # as under nohup
            numbers.append(hangup)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            line = self.label("stopping after this evaluation; Ctrl-C again stops at once")
            # Not by print, in the middle of which the signal may have come.
            os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if there was one."""
        if self.received is not None:
            raise Interrupted(self.received)
