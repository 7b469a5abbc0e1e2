"""Runs train.py in several processes, as torchrun would, but from one that has imported torch."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "guided_diffusion.factory", "train"])  # slow ones
LONGEST = 60  # seconds that a rank may take


@dataclass(frozen=True)
class Ended:
    """A process that came to its end: exit status, and stdout and stderr together."""

    status: int
    text: str


class Ranks:
    """Running processes of one group."""

    def __init__(
        self, folder: Path, arguments: Sequence[Sequence[str]], *, plain_descent: bool = False
    ):
        """arguments: those of train.py, for each rank. folder: for their output.

        plain_descent: weights move by their gradients and a momentum; Adam divides even the noise
        of gradients that are zero by its own size.
        """
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(len(arguments))]
        environments = rank_environments(len(arguments))
        self.processes: list[BaseProcess] = []
        for own, environment, output in zip(arguments, environments, self.outputs, strict=True):
            process = FORKS.Process(
                target=_run_rank, args=(list(own), environment, output, plain_descent)
            )
            process.start()
            self.processes.append(process)

    def wait(self) -> list[Ended]:
        """How all ended. None may hang."""
        for process in self.processes:
            process.join(LONGEST)
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.processes[rank].kill()
        assert not hanging, f"ranks {hanging} do not end"
        return [
            Ended(process.exitcode, output.read_text())
            for process, output in zip(self.processes, self.outputs, strict=True)
        ]


def run_ranks(folder: Path, size: int, *arguments: str, plain_descent: bool = False) -> None:
    """Run train.py in so many processes, which have to end well."""
    ended = Ranks(folder, [arguments] * size, plain_descent=plain_descent).wait()
    assert [rank.status for rank in ended] == [0] * size, ended


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun tells each process; nothing, if there is only one."""
    if size == 1:
        return [{}]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    group = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return [
        {"MASTER_ADDR": "127.0.0.1"}
        | {name: str(number) for name, number in (group | {"RANK": i, "LOCAL_RANK": i}).items()}
        for i in range(size)
    ]


def _run_rank(
    arguments: list[str], environment: dict[str, str], output: Path, plain_descent: bool
) -> None:
    import train

    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if plain_descent:
        torch.optim.AdamW = _descent
    sys.argv = ["train.py", *arguments]
    status = train.main()
    sys.stdout.flush()
    sys.exit(status)


def _descent(parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
