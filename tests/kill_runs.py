"""Kill runs of small images at random moments, and look whether anything was lost.

Prints a row for the table in docs/reliability.md, after a minute or two:

    python tests/kill_runs.py
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.case import Case
from tests.support.small_runs import (
    assert_equal,
    assert_part_of,
    outputs,
    recorded,
    small_case,
    start,
    states,
)

IMAGES = 6
KILLS = 50


@dataclass
class Losses:
    """What kills did. What must not be at all is an AssertionError instead."""

    runs: int = 0  # that were killed and started again until they were complete
    finished: list[int] = field(default_factory=list)  # results recorded at each kill
    states: int = 0  # kills that left a sampler state to go on from
    hidden: int = 0  # files that kills left without a final name
    unrecorded: int = 0  # results that were there, but not yet recorded, so that they are redone
    again: int = 0  # results that were recorded before a kill, and made again after it

    @property
    def kills(self) -> int:
        return len(self.finished)


def kill_repeatedly(folder: Path, kills: int, seed: int) -> Losses:
    """Kill runs of the same images at so many moments, and compare what they end with.

    Raises AssertionError if a picture is missing, cannot be read, or is not, byte for byte, what
    an uninterrupted run writes.
    """
    rng, losses = random.Random(seed), Losses()
    whole = small_case(folder / "whole", IMAGES)
    begun = time.monotonic()
    with start(whole) as run:
        run.wait_until(lambda: recorded(whole))
        seconds = time.monotonic() - begun
        assert run.end().status == 0, run.err
    while losses.kills < kills:
        # Every second run writes states all the time.
        every = 0 if losses.runs % 2 else 300
        case = small_case(folder / str(losses.runs), IMAGES, checkpoint_every=every)
        while losses.kills < kills and len(recorded(case)) < IMAGES:
            kill_once(case, seconds, rng, losses)
            assert_part_of(outputs(whole), case)
        with start(case) as run:
            assert run.end().status == 0, run.err
        assert_equal(outputs(whole), case)
        names = recorded(case)
        losses.again += len(names) - len(set(names))
        losses.hidden += len(list(case.out.rglob(".*")))
        losses.runs += 1
    return losses


def kill_once(case: Case, seconds: float, rng: random.Random, losses: Losses) -> None:
    """Start a run and kill it, if it does not end before.

    seconds: that a run takes until its first result is recorded.
    """
    files = rng.choice((0, 0, *range(1, 9)))  # of four a picture, that appear before
    delay = rng.uniform(0, seconds) if files == 0 else rng.choice((0, rng.uniform(0, 0.1)))
    files += count_files(case)
    with start(case) as run:
        run.wait_until(lambda: run.popen.poll() is not None or count_files(case) >= files)
        with suppress(subprocess.TimeoutExpired):
            run.popen.wait(delay)
        run.send(signal.SIGKILL)
        if run.end().status != -signal.SIGKILL:
            return
    results_there = {name for name in outputs(case) if name.startswith("inpainted/")}
    losses.finished.append(len(recorded(case)))
    losses.states += bool(states(case))
    losses.unrecorded += len(results_there) - len(recorded(case))


def count_files(case: Case) -> int:
    """How many pictures have final names."""
    return sum(1 for _ in case.out.glob("*/[!.]*.png"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = kill_repeatedly(Path(folder), KILLS, seed=0)
    finished = ", ".join(f"{n}: {losses.finished.count(n)}" for n in range(IMAGES + 1))
    print(
        f"| `kill -9` at a random moment | {losses.kills} times, in {losses.runs} runs of {IMAGES} "
        f"images (finished by then: times; {finished}) | finished pictures: {losses.again}; "
        f"pictures written, but not yet recorded, and made again: {losses.unrecorded}. Left: "
        f"{losses.states} times a state to go on from, {losses.hidden} hidden files |"
    )


if __name__ == "__main__":
    main()
