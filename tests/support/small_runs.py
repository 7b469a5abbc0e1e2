"""Small runs of `test.py` in processes of their own, to be stopped, killed and looked at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

from guided_diffusion import factory
from guided_diffusion.config import load_config
from guided_diffusion.networks.unet import UNet
from guided_diffusion.run.records import load_state
from tests.support.case import OUTPUTS, ROOT, SIZE, Case, Result

DEADLINE = 120  # seconds for whatever is waited for: far more than a busy machine needs


def small_case(
    folder: Path, images: int = 4, *, side: int = 32, steps: int = 3, **keys: object
) -> Case:
    """A case whose evaluations take as long as its side is large.

    On one core about 15 ms for a picture of side 32, 55 ms for 64, 450 ms for 128. steps: of the
    schedule; each takes two evaluations, but the first one.
    """
    case = Case(folder, images=4)
    for number in range(4, images):
        for kind in ("gts", "masks"):
            path = folder / kind
            shutil.copy(path / f"{number % 4:06}.png", path / f"{number:06}.png")
    if side != SIZE:
        for path in [*(folder / "gts").iterdir(), *(folder / "masks").iterdir()]:
            Image.open(path).resize((side, side), Image.Resampling.NEAREST).save(path)
    case.dataset |= {"max_len": images, "image_size": side}
    case.config |= {"image_size": side, "attention_resolutions": str(side // 2)}
    case.config |= {"timestep_respacing": str(steps)}
    case.config["schedule_jump_params"]["t_T"] = steps
    for key, value in keys.items():
        (case.dataset if key in ("batch_size", "max_len") else case.config)[key] = value
    return case


# ---- What a run has written -------------------------------------------------------------------


def outputs(case: Case) -> dict[str, bytes]:
    """`inpainted/x.png` and so on -> bytes: all files under final names, each a whole picture."""
    paths = [
        path
        for kind in OUTPUTS.values()
        for path in (case.out / kind).rglob("*")
        if path.is_file() and not path.name.startswith(".")  # as what is being written is named
    ]
    for path in paths:
        assert path.suffix == ".png", path
        with Image.open(path) as picture:
            picture.load()
    return {path.relative_to(case.out).as_posix(): path.read_bytes() for path in paths}


def assert_part_of(reference: dict[str, bytes], case: Case) -> None:
    """What a stopped run has written is what an uninterrupted one writes."""
    for name, content in outputs(case).items():
        assert content == reference[name], name


def assert_equal(reference: dict[str, bytes], case: Case) -> None:
    """A run has written what an uninterrupted one writes, and nothing is left half done."""
    assert outputs(case).keys() == reference.keys()
    assert_part_of(reference, case)
    assert not states(case)


def states(case: Case) -> list[Path]:
    """The files of states of unfinished batches."""
    return sorted((case.out / "inpainted.run" / "unfinished").glob("[!.]*"))


def evaluations_saved(case: Case) -> int:
    """How many evaluations lie before the only saved state."""
    (path,) = states(case)
    return evaluations_before(case, path)


def evaluations_before(case: Case, state: Path) -> int:
    position = load_state(str(state))["position"]
    return sum(u < t for t, u in pairwise(_times(case.folder / "conf.yml")[: position + 1]))


@cache
def _times(conf_path: Path) -> list[int]:
    return factory.build_times(load_config(str(conf_path)))


def recorded(case: Case) -> list[str]:
    """Names of the results that processes have recorded; a name again for each time."""
    names = []
    for path in sorted((case.out / "inpainted.run").glob("images-*.jsonl")):
        for text in path.read_bytes().splitlines():
            with suppress(ValueError):  # half a line
                line = json.loads(text)
                names += [line["name"]] if "bytes" in line else []
    return names


# ---- Runs in this process ---------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the processes that are started: with more, sums differ in their last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def evaluations(at: int = 0, do: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The batch sizes of the network's evaluations in this process; during one, do something."""
    sizes: list[int] = []
    forward = UNet.forward

    def counted(network, x, *arguments):
        sizes.append(len(x))
        if len(sizes) == at:
            do()
        return forward(network, x, *arguments)

    with patch.object(UNet, "forward", counted):
        yield sizes


def assert_refused(result: Result) -> str:
    """It ended with one line of error, and is that."""
    assert result.status == 2, result.err
    (line,) = result.lines("error")
    assert "Traceback" not in result.err
    return line


# ---- Processes --------------------------------------------------------------------------------


class Running:
    """A command that is running, with all processes that it starts."""

    def __init__(self, case: Case, command: Sequence[str], **options: object):
        self.case = case
        self.conf_path = case.conf_path()
        self.streams = [case.folder / f"{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        with open(self.streams[0], "wb") as out, open(self.streams[1], "wb") as err:
            self.popen = subprocess.Popen(
                [*command, str(ROOT / "test.py"), "--conf_path", self.conf_path],
                stdout=out,
                stderr=err,
                # One thread: so small a network gains nothing from more.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                **options,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def err(self) -> str:
        return self.streams[1].read_text()

    @property
    def shown(self) -> int:
        """The evaluations that the progress bar shows."""
        return int(([0, *re.findall(r"(\d+)/\d+ \[", self.err)])[-1])

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so, which must be while the command is running."""
        end = time.monotonic() + DEADLINE
        while True:
            ended = self.popen.poll() is not None  # asked first: it may end meanwhile
            if condition():
                return
            assert not ended, f"it ended, {self.popen.returncode}: {self.err}"
            assert time.monotonic() < end, f"waited in vain: {self.err}"
            time.sleep(0.002)

    def wait_until_gone(self) -> None:
        """Wait until nothing is left of what a command started that was killed itself."""
        end = time.monotonic() + DEADLINE
        while self.processes():
            assert time.monotonic() < end, f"waited in vain: {self.err}"
            time.sleep(0.01)

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def freeze(self) -> None:
        """Stop the clock of the process, until `thaw`."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def freeze_when(self, condition: Callable[[], object]) -> None:
        """Freeze the process at a moment at which something is so."""

        def is_frozen_then() -> bool:
            self.freeze()
            if condition():
                return True
            self.thaw()
            return False

        self.wait_until(is_frozen_then)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def end(self) -> Result:
        """Wait for the command to end by itself."""
        end = time.monotonic() + DEADLINE
        while self.popen.poll() is None:
            assert time.monotonic() < end, f"{self.processes()} do not end: {self.err}"
            time.sleep(0.01)
        return Result(self.popen.returncode, *(stream.read_text() for stream in self.streams))

    def processes(self) -> dict[int, int]:
        """The living processes of this case, and their ranks; -1: of none, such as torchrun."""
        living = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                if self.conf_path.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                    living[int(folder.name)] = int(rank[1]) if rank else -1
        return living


def start(case: Case, *launcher: str, file_size: int | None = None) -> Running:
    """Start `python test.py`; launcher: options of python; file_size: the largest in bytes."""

    def prepare() -> None:
        # A test run in the background of a shell would pass on that it ignores the signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if file_size is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return Running(case, [sys.executable, *launcher], preexec_fn=prepare)
