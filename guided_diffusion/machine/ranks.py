"""One rank or many, each a process of the operating system: who this one is, and what all share.

Processes are started by torchrun, which tells each its rank by environment variables. What they
share lies in torch.distributed's own key-value store; a rank on its own has a store to itself,
so that there is one code path.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from guided_diffusion.config import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

JOINING = timedelta(minutes=5)  # for the slowest rank to start
WAITING = timedelta(hours=12)  # for rank 0, which may have many files to look through
LEAVING = 60  # seconds for the others to read what they still need
TALLYING = 0.5  # seconds between two looks at a sum


@dataclass(frozen=True)
class World:
    """This rank among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine
    local_size: int = 1

    def label(self, text: str) -> str:
        """The text with this rank's number before each line, if there are several ranks."""
        if self.size == 1:
            return text
        return "\n".join(f"[rank {self.rank}] {line}" for line in text.split("\n"))

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print a text so labelled, at once. file: None is stdout.

        When nobody listens any more, as after `| head`, the run goes on in silence.
        """
        # In the terminal's last line, rank 0 may be drawing its progress bar.
        before = "\n" if self.rank and file is sys.stderr else ""
        try:
            print(before + self.label(text), file=file, flush=True)
        except BrokenPipeError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, (file or sys.stdout).fileno())


ALONE = World()


def read_world() -> World:
    """What torchrun says of this rank. Raises UserError if a part of it is missing."""
    if not os.environ.get("WORLD_SIZE"):
        return ALONE
    size = _variable("WORLD_SIZE", least=1)
    if size == 1:
        return ALONE
    rank = _variable("RANK", least=0, below=size)
    local_size = _variable("LOCAL_WORLD_SIZE", least=1, below=size + 1)
    local_rank = _variable("LOCAL_RANK", least=0, below=local_size)
    _variable("MASTER_PORT", least=1, below=2**16)
    if not os.environ.get("MASTER_ADDR"):
        raise _incomplete("MASTER_ADDR", "nothing", "the address of the machine of rank 0")
    return World(rank, size, local_rank, local_size)


def restarted() -> bool:
    """Whether torchrun has started this rank again, after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _variable(name: str, least: int, below: int | None = None) -> int:
    text = os.environ.get(name, "")
    accepted = f"a whole number >= {least}" + (f" and < {below}" if below else "")
    if not text.isdecimal() or int(text) < least or (below and int(text) >= below):
        raise _incomplete(name, text or "nothing", accepted)
    return int(text)


def _incomplete(name: str, found: str, accepted: str) -> UserError:
    return UserError(
        f"environment variable {name}: found {found}; accepted: {accepted}. WORLD_SIZE is "
        f"{os.environ['WORLD_SIZE']}, which means one process of several: start them with "
        "torchrun --nproc_per_node=N, which sets all that they need, or unset WORLD_SIZE"
    )


class Team:
    """The ranks of a run, through the store that they share."""

    def __init__(self, world: World, store: Store):
        self.world = world
        self.store = store

    @property
    def is_first(self) -> bool:
        return self.world.rank == 0

    def share(
        self,
        name: str,
        make: Callable[[], T],
        encode: Callable[[T], Any] = lambda made: made,
        decode: Callable[[Any], T] = lambda content: content,
    ) -> T:
        """What rank 0 makes, in every rank.

        name: of a kind of its own for each call. encode, decode: to what JSON can hold, and back.
        Raises the UserError that `make` raises on rank 0, in every rank.
        """
        if self.is_first:
            try:
                made = make()
            except UserError as error:
                self._set(name, json.dumps({"error": str(error)}))
                raise
            if self.world.size > 1:
                self._set(name, json.dumps({"made": encode(made)}))
            return made
        with _contact():
            shared = json.loads(self.store.get(name))
        if "error" in shared:
            raise UserError(f"rank 0 has stopped: {shared['error']}")
        return decode(shared["made"])

    def add(self, name: str, number: int) -> int:
        """Add to a sum that all ranks share; its value afterwards."""
        with _contact():
            return self.store.add(name, number)

    def tally(self, name: str) -> Tally:
        """The same, for what is added often."""
        return Tally(self, name, TALLYING if self.world.size > 1 else 0)

    def leave(self) -> None:
        """Rank 0, in which the store may live, waits until the others need it no more."""
        left = self.add("left", 1)
        end = time.monotonic() + LEAVING
        while self.is_first and left < self.world.size and time.monotonic() < end:
            time.sleep(0.05)
            left = self.add("left", 0)

    def stop(self, reason: str) -> None:
        """Have all others end too, at their next `check`; of several reasons the first counts."""
        with _contact():
            self.store.compare_set("stopped", "", self.world.label(reason))

    def check(self) -> None:
        """Raises UserError if another rank has called `stop`."""
        with _contact():
            if self.world.size > 1 and self.store.check(["stopped"]):
                raise UserError(f"stopped, because of {self.store.get('stopped').decode()}")

    def _set(self, name: str, value: str) -> None:
        with _contact():
            self.store.set(name, value)


@contextmanager
def _contact() -> Iterator[None]:
    """What the store raises when its rank is gone, as a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "lost contact with the other processes; run the same command again to go on "
            f"({str(error).splitlines()[0]})"
        ) from error


class Tally:
    """A sum that all ranks share; the store is asked only every so many seconds."""

    def __init__(self, team: Team, name: str, interval: float):
        self.team, self.name, self.interval = team, name, interval
        self.untold = 0  # what the others do not know of
        self.total = 0
        self.next_time = 0.0

    def add(self, number: int) -> int:
        """The sum, without what the others have not told yet. Raises UserError, see `check`."""
        self.untold += number
        if time.monotonic() >= self.next_time:
            self.tell()
        return self.total

    def tell(self) -> int:
        """Let the others know; the sum. Raises UserError, see `check`."""
        self.team.check()
        self.total = self.team.add(self.name, self.untold)
        self.untold = 0
        self.next_time = time.monotonic() + self.interval
        return self.total


def join(world: World) -> Team:
    """Meet the other ranks. Raises UserError if they cannot be reached in time."""
    # Torch takes a second to import; who this rank is can be asked without.
    from torch.distributed import HashStore, PrefixStore, rendezvous

    if world.size == 1:
        return Team(world, HashStore())
    try:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=JOINING))
        name = _meet(world, store)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"cannot reach the other processes at {address} (MASTER_ADDR and MASTER_PORT): "
            f"{str(error).splitlines()[0]}; start all of them with torchrun, see the README"
        ) from error
    store.set_timeout(WAITING)
    return Team(world, PrefixStore(name, store))


def _meet(world: World, store: Store) -> str:
    """A name for what these ranks share: torchrun may keep its store over restarts.

    TORCHELASTIC_RESTART_COUNT would not do: each agent counts for itself.
    """
    if world.rank > 0:
        greeting = uuid.uuid4().hex
        store.set(f"repaint/greeting/{world.rank}", greeting)
        name = store.get(f"repaint/answer/{greeting}").decode()
        store.set(f"{name}/here/{world.rank}", "")
        return name
    name, absent = f"repaint/{uuid.uuid4().hex}", set(range(1, world.size))
    end = time.monotonic() + JOINING.total_seconds()
    while absent and time.monotonic() < end:
        for rank in tuple(absent):
            # A greeting may be that of a rank that has died: who lives says that it is here.
            if store.check([f"repaint/greeting/{rank}"]):
                greeting = store.get(f"repaint/greeting/{rank}").decode()
                store.set(f"repaint/answer/{greeting}", name)
            if store.check([f"{name}/here/{rank}"]):
                absent.remove(rank)
        time.sleep(0.05)
    if absent:
        raise RuntimeError(f"no sign of rank {min(absent)} for {JOINING}")
    return name
