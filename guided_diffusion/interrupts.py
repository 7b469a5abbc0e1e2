"""SIGTERM and Ctrl-C: noted, and obeyed where nothing is lost."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop, and it has."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """SIGTERM and SIGINT are noted, until the run can stop; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if there was one."""
        if self.received is not None:
            raise Interrupted(self.received)
