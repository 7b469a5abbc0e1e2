"""How much faster several processes on this machine are than one.

`measure` is the whole of it. What torchrun starts, as often as there are to be processes, is this
module as a script; see `main`.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import factory
from guided_diffusion.accel import Speed
from guided_diffusion.checkpoint import LATENT_UNET
from guided_diffusion.config import Config, UserError, load_config
from guided_diffusion.dist_util import Team, World, join, read_world
from guided_diffusion.measuring import (
    describe_machine,
    digits,
    example,
    note,
    page,
    picture_side,
    random_checkpoint,
    room_on_gpu,
)
from guided_diffusion.unet import UNet

ROUNDS = 3  # in each, every number of processes has its turn
SECONDS = 8.0  # that processes evaluate at the same time, in each turn
LEAST_EVALUATIONS = 2  # of a process in that time, however long they take
UNSTEADY = 0.2  # spread of rounds from which on the ratios mean little
WARM_UPS = 2  # evaluations that are not counted

ROOT = Path(__file__).parents[1]
WORKER = ("-m", "guided_diffusion.scaling")  # as torchrun takes it


@dataclass(frozen=True)
class Scaling:
    """What was measured; an evaluation is of one batch."""

    config: Config
    speed: Speed
    device: torch.device
    machine: str
    cores: int  # that all processes share
    batch: int
    rates: Mapping[int, Sequence[float]]  # processes -> evaluations a second, of each round

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    def rate(self, processes: int) -> float:
        """Evaluations a second of all these processes together."""
        return statistics.median(self.rates[processes])

    def relative(self, processes: int) -> float:
        return self.rate(processes) / self.rate(1)

    def efficiency(self, processes: int) -> float:
        """Throughput, as a share of what is ideal.

        On GPUs that is n times what one process does, for each brings a GPU of its own; on a CPU
        it is what one process does, for that one keeps all cores busy already.
        """
        return self.relative(processes) / (processes if self.on_gpus else 1)

    @property
    def spread(self) -> float:
        """The largest difference between rounds, as a share of the median."""
        return max((max(r) - min(r)) / statistics.median(r) for r in self.rates.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "machine": self.machine,
            "device": self.device.type,
            "precision": self.speed.precision,
            "speed": self.speed.describe(),
            "batch": self.batch,
            "cores": self.cores,
            "scaling": [
                {
                    "processes": n,
                    "threads_each": threads_each(self.cores, n),
                    "evaluations_per_second": self.rate(n),
                    "evaluations_per_second_of_rounds": list(rates),
                    "relative_to_one_process": self.relative(n),
                    "efficiency": self.efficiency(n),
                }
                for n, rates in self.rates.items()
            ],
        }

    def describe(self) -> str:
        """A table for people."""
        return page(self._head(), self._rows(), self._foot())

    def _head(self) -> list[str]:
        size = picture_side(self.config)
        return [
            f"{self.config.name}: network for {size}×{size} images, batch {self.batch}",
            f"machine: {self.machine}; device {self.device.type}",
            f"measured: {self.speed.describe()}",
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        head = ["processes", "threads each", "evaluations per second", "relative to one process"]
        rows = [(*head, "efficiency") if self.on_gpus else tuple(head)]
        for n in self.rates:
            numbers = [str(n), str(threads_each(self.cores, n)), digits(self.rate(n))]
            shares = [f"{self.relative(n):.2f}"]
            shares += [f"{self.efficiency(n):.0%}"] if self.on_gpus else []
            rows.append((*numbers, *shares))
        return rows

    def _foot(self) -> list[str]:
        rounds = len(self.rates[1])
        if self.on_gpus:
            meaning = (
                "efficiency: relative to one process, divided by the number of processes, each of "
                "which has a GPU of its own. 100 % is the ideal."
            )
        else:
            meaning = (
                "relative to one process: one process alone keeps all cores busy, and several "
                "share them. So 1.00 is what to expect; more is a gain, less a loss."
            )
        notes = [
            "evaluations per second: of all processes together, while all of them run; starting "
            f"and loading are not counted. Each is the median of {rounds} rounds, taken in turns; "
            f"rounds differ by up to {self.spread:.0%}.",
            meaning,
        ]
        if self.spread >= UNSTEADY:
            notes.append(
                "These figures are unsteady: most likely, other programs are keeping the machine "
                "busy. Measure again while it is idle."
            )
        if self.config.classifier:
            notes.append("The classifier that guides this config's sampling is not counted.")
        return notes


def measure(config: Config, settings: Sequence[str], batch: int) -> Scaling:
    """Measure a config's denoising network in 1, 2, 4, … processes at once, with random weights.

    On a CPU there are up to as many as it has cores; on GPUs up to as many as torch sees, one
    each. settings: the KEY=VALUE pairs that the config was loaded with. Notes of progress go to
    stderr. Raises UserError for what the machine cannot do, or has no room for.
    """
    if read_world().size > 1:
        raise UserError("--scaling starts torchrun itself; start it as: python benchmark.py ...")
    device = factory.pick_device(config.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: found {device}; accepted with --scaling: cpu or cuda")
    speed = factory.choose_speed(replace(config, classifier=None), device)
    part = LATENT_UNET if config.latent else None
    with torch.device("meta"):
        network = UNet(factory.network_params(config))
    cores = usable_cores()
    most = torch.cuda.device_count() if device.type == "cuda" else cores
    with random_checkpoint({part: network}) as path:
        conf_path = os.path.abspath(config.source)
        task = Task(conf_path, list(settings), path, device.type, batch, SECONDS)
        rates = measure_in_turns(task, process_counts(most), cores)
    machine = describe_machine(device, cores)
    return Scaling(config, speed, device, machine, cores, batch, rates)


def usable_cores() -> int:
    """Those of the machine's that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_counts(most: int) -> list[int]:
    """1, 2, 4, … below `most`, and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def threads_each(cores: int, processes: int) -> int:
    """Threads of each process, so that all of them together have about one a core."""
    return max(cores // processes, 1)


# ---- Starting processes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a process is asked to do."""

    conf_path: str
    settings: list[str]  # KEY=VALUE each
    model_path: str
    device: str  # "cpu" or "cuda"
    batch: int
    seconds: float  # to evaluate for


def measure_in_turns(task: Task, counts: Sequence[int], cores: int) -> dict[int, list[float]]:
    """Number of processes -> evaluations a second of all of them, of each round.

    The counts take turns, so that a machine that gets slower meanwhile favours none.
    """
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for i in range(ROUNDS):
        for count in counts:
            processes = "1 process" if count == 1 else f"{count} processes at once"
            note(f"round {i + 1} of {ROUNDS}: {processes}")
            rates[count].append(total_rate(task, count, threads_each(cores, count)))
    return rates


def total_rate(task: Task, count: int, threads: int) -> float:
    """Evaluations a second of all `count` processes of `threads` threads each.

    Raises UserError if one of them fails.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={count}", f"--log_dir={folder}"),
            *(*WORKER, json.dumps(asdict(task)), folder),
        ]
        report = Path(folder, "report.txt")
        status = _run(command, report, threads)
        answers = [json.loads(path.read_text()) for path in Path(folder).glob("answer-*.json")]
        if status != 0:
            raise _failure(count, answers, status, report.read_text(errors="replace"))
        return sum(answer["rate"] for answer in answers)


def _run(command: Sequence[str], report: Path, threads: int) -> int:
    """The exit status of a command, which ends with this process; report: gets what it prints."""
    with report.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,  # where Python finds this package
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A second signal would keep torchrun from ending its workers; so on Ctrl-C, it gets
            # the one below, but not the terminal's.
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def _failure(
    count: int, answers: Sequence[Mapping[str, Any]], status: int, report: str
) -> UserError:
    """What to tell the user where torchrun failed; its report is printed if it may be needed."""
    where = f"--scaling, {count} process{'es at once' if count > 1 else ''}"
    for answer in answers:
        if "error" in answer:
            return UserError(f"{where}: {answer['error']}")
    if status == -signal.SIGKILL or "(SIGKILL) received" in report:
        return UserError(
            f"{where}: one was ended by the system, most likely for lack of memory, for each "
            "holds the network; lower --batch, or give the command fewer cores, as by taskset"
        )
    print(report, file=sys.stderr)
    return UserError(f"{where}: torchrun ended with status {status}; what it says is above")


# ---- In each process -------------------------------------------------------------------------


def main() -> int:
    """Do the task that the command line holds, as one of torchrun's processes."""
    task, folder = Task(**json.loads(sys.argv[1])), sys.argv[2]
    world = read_world()
    try:
        answer, status = {"rate": work(task, join(world))}, 0
    except UserError as error:
        answer, status = {"error": str(error)}, 2
    Path(folder, f"answer-{world.rank}.json").write_text(json.dumps(answer))
    return status


@torch.no_grad()
def work(task: Task, team: Team) -> float:
    """Evaluations a second of this process, while all of the team evaluate. Raises UserError."""
    config = load_config(task.conf_path, task.settings, require_data=False)
    config = replace(config, model_path=task.model_path, classifier=None)
    with room_on_gpu(task.batch):
        evaluate = prepare(config, task.batch, own_device(task.device, team.world))
        for _ in range(WARM_UPS):
            evaluate()
        _wait_for_all(team)
        rate = evaluations_per_second(evaluate, task.seconds)
        # On a machine that is less busy, those who are not yet through would be too fast.
        team.add("through", 1)
        while team.add("through", 0) < team.world.size:
            evaluate()
    return rate


def own_device(kind: str, world: World) -> torch.device:
    """The device of this process: of GPUs, each has one."""
    return torch.device(kind, world.local_rank) if kind == "cuda" else torch.device(kind)


def prepare(config: Config, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that evaluates a config's denoising network once, to the end."""
    network = factory.build_network(config, device, factory.choose_speed(config, device))
    x, *others = example(factory.network_params(config), batch, device)
    inputs = [x.contiguous(memory_format=torch.channels_last), *others]

    def evaluate() -> None:
        network(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return evaluate


def evaluations_per_second(evaluate: Callable[[], None], seconds: float) -> float:
    """Of a function that is called again and again for about so many seconds."""
    begun = time.perf_counter()
    count, elapsed = 0, 0.0
    while count < LEAST_EVALUATIONS or elapsed < seconds:
        evaluate()
        count, elapsed = count + 1, time.perf_counter() - begun
    return count / elapsed


def _wait_for_all(team: Team) -> None:
    if team.add("ready", 1) == team.world.size:
        team.store.set("all are ready", "")
    team.store.wait(["all are ready"])


if __name__ == "__main__":
    sys.exit(main())
