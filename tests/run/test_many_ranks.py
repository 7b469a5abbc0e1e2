"""Several processes under torchrun: the same files as one process writes, whoever dies."""

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from guided_diffusion import factory
from guided_diffusion.config import UserError
from guided_diffusion.machine import ranks
from guided_diffusion.machine.ranks import World
from tests.support.case import Case, Result
from tests.support.small_runs import (
    Running,
    assert_equal,
    assert_part_of,
    assert_refused,
    evaluations,
    evaluations_before,
    one_thread,
    outputs,
    recorded,
    small_case,
    states,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

IMAGES = 6
STEPS = 4
EVALUATIONS = 2 * STEPS - 1  # of each


def new_case(folder: Path, images: int = IMAGES, **keys: object) -> Case:
    """About half a second an image."""
    return small_case(folder, images, side=64, steps=STEPS, **keys)


@pytest.fixture(autouse=True, scope="module")
def as_in_processes() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """What one process writes."""
    case = new_case(tmp_path_factory.mktemp("whole"))
    case.finish()
    return outputs(case)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(case: Case, processes: int, *options: str) -> Running:
    if not any("rdzv" in option or "master" in option for option in options):
        options = (*options, f"--master-port={free_port()}")
    module = [sys.executable, "-m", "torch.distributed.run"]
    return Running(case, [*module, f"--nproc-per-node={processes}", *options])


def pid_of(run: Running, rank: int) -> int:
    (pid,) = [pid for pid, its_rank in run.processes().items() if its_rank == rank]
    return pid


def assert_ended(run: Running) -> Result:
    """The command ended with an error, and nothing that it started is left."""
    result = run.end()
    assert result.status != 0
    assert not run.processes()
    return result


def assert_completed(case: Case, whole: dict[str, bytes]) -> None:
    """One process completes what several have begun, and repeats nothing that was finished."""
    assert_part_of(whole, case)
    case.finish()
    assert_equal(whole, case)
    assert len(recorded(case)) == len(set(recorded(case))) == IMAGES


# ---- On one machine ---------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_write_what_one_writes(whole, tmp_path):
    case = new_case(tmp_path, show_progress=True)
    with torchrun(case, 4) as run:
        result = run.end()
    assert result.status == 0, result.err
    assert_equal(whole, case)
    assert len(list((case.out / "inpainted.run").glob("images-*.jsonl"))) == 4
    assert case.record()["finished"] and len(case.record()["seconds_per_image"]) == IMAGES
    lines = result.out.splitlines()
    assert lines and all(line.startswith("[rank 0] ") for line in lines)
    total = IMAGES * EVALUATIONS
    assert f" 0/{total} " in result.err and run.shown == total
    assert "Traceback" not in result.err and "rror" not in result.err


@pytest.mark.slow
def test_a_killed_worker_under_max_restarts(whole, tmp_path):
    case = new_case(tmp_path)
    with torchrun(case, 4, "--max-restarts=3") as run:
        run.wait_until(lambda: recorded(case))
        os.kill(pid_of(run, rank=2), signal.SIGKILL)
        result = run.end()
    assert result.status == 0, result.err
    assert_completed(case, whole)


@pytest.mark.slow
def test_a_killed_worker_without_restarts(whole, tmp_path):
    case = new_case(tmp_path)
    with torchrun(case, 4) as run:
        run.wait_until(lambda: recorded(case))
        os.kill(pid_of(run, rank=0), signal.SIGKILL)  # the one that has the lock
        assert_ended(run)
    assert_completed(case, whole)


@pytest.mark.slow
def test_torchrun_itself_is_killed(whole, tmp_path):
    case = new_case(tmp_path)
    with torchrun(case, 2) as run:
        run.wait_until(lambda: recorded(case))
        run.send(signal.SIGKILL)
        run.wait_until_gone()
        assert "error: lost contact with the other processes" in run.err
    assert_completed(case, whole)


@pytest.mark.slow
def test_a_stopped_team_saves_all_its_states(whole, tmp_path):
    case = new_case(tmp_path)
    with torchrun(case, 2) as run:
        run.wait_until(lambda: recorded(case))
        run.send(signal.SIGTERM)
        result = assert_ended(run)
    for rank in (0, 1):
        assert f"[rank {rank}] stopped; to go on, run the same command again\n" in result.err
    saved = [evaluations_before(case, state) for state in states(case)]
    done = len(recorded(case)) * EVALUATIONS + sum(saved)
    with evaluations() as sizes:
        assert_completed(case, whole)
    assert len(sizes) == IMAGES * EVALUATIONS - done


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(whole, tmp_path):
    case = new_case(tmp_path, show_progress=True)
    with torchrun(case, 2) as run:
        run.wait_until(lambda: run.shown)
        last = tmp_path / "gts" / f"{IMAGES - 1:06}.png"
        original = last.read_bytes()
        last.write_bytes(b"rubbish")
        result = assert_ended(run)
    errors = re.findall(r"^\[rank \d\] error: .*", result.err, re.MULTILINE)
    assert any(str(last) in error for error in errors), result.err
    last.write_bytes(original)
    assert_completed(case, whole)


# ---- On several machines ----------------------------------------------------------------------


@contextmanager
def two_machines(case: Case, backend: str, *options: str) -> Iterator[list[Running]]:
    """Two agents of torchrun with a process each, which would be on two machines."""
    port = free_port()
    meeting = {
        "c10d": ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"],
        "static": ["--master-addr=127.0.0.1", f"--master-port={port}"],
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                torchrun(case, 1, "--nnodes=2", f"--node-rank={node}", *meeting[backend], *options)
            )
            for node in (0, 1)
        ]


@pytest.mark.slow
def test_two_machines_write_what_one_writes(whole, tmp_path):
    case = new_case(tmp_path)
    with two_machines(case, "static") as agents:
        results = [agent.end() for agent in agents]
    assert [result.status for result in results] == [0, 0], results
    assert_equal(whole, case)
    assert len(list((case.out / "inpainted.run").glob("images-*.jsonl"))) == 2


@pytest.mark.slow
def test_a_killed_worker_on_another_machine_under_max_restarts(whole, tmp_path):
    case = new_case(tmp_path)
    with two_machines(case, "c10d", "--max-restarts=3") as agents:
        agents[0].wait_until(lambda: recorded(case))
        os.kill(pid_of(agents[0], rank=1), signal.SIGKILL)
        results = [agent.end() for agent in agents]
    assert [result.status for result in results] == [0, 0], results
    assert_completed(case, whole)


# ---- Alone, or too many -----------------------------------------------------------------------


@pytest.fixture
def torchruns_environment(monkeypatch) -> dict[str, str]:
    """What torchrun tells the second of two processes; nobody is at the address."""
    variables = {
        **{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "JOINING", timedelta(seconds=0.5))
    return variables


def test_a_world_size_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = assert_refused(small_case(tmp_path).run())
    assert "RANK: found nothing" in line and "WORLD_SIZE is 4" in line and "torchrun" in line


@pytest.mark.parametrize("rank", ("0", "1"))
def test_nobody_answers(rank, torchruns_environment, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    case = small_case(tmp_path)
    result = case.run()
    address = "127.0.0.1:" + torchruns_environment["MASTER_PORT"]
    assert result.status == 2
    before = "\n" if rank == "1" else ""  # where rank 0 may have drawn a progress bar
    (line,) = result.err.removeprefix(before).splitlines()
    assert line.startswith(f"[rank {rank}] error: cannot reach the other processes at {address} ")
    assert not case.out.exists()


def test_more_processes_than_gpus():
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "device_count", lambda: 2),
    ):
        with pytest.raises(UserError, match="4 processes on this machine, but torch finds 2 CUDA"):
            factory.pick_device(None, World(rank=3, size=4, local_rank=3, local_size=4))
        assert factory.pick_device(
            None, World(rank=3, size=4, local_rank=1, local_size=2)
        ) == torch.device("cuda", 1)
