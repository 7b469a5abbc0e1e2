"""Training in many processes: the same weights as in one, whatever their number or their end."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from guided_diffusion.checkpoints.loading import load_state_dict
from guided_diffusion.config import UserError, load_training_config
from guided_diffusion.machine.ranks import Team, World
from guided_diffusion.training import data
from guided_diffusion.training.build import build_trainer
from guided_diffusion.training.data import TrainingImages, endless_batches, step_batches
from guided_diffusion.training.loop import Trainer, train
from guided_diffusion.training.ranks import Processes, share_of
from tests.support.small_runs import one_thread
from tests.support.training import (
    EVERYTHING,
    ROOT,
    assert_same_checkpoint,
    leaves,
    one_thread_environment,
    write_config,
    write_images,
)
from tests.support.training_ranks import Ended, Ranks, run_ranks

# What changes the sum over a batch, or has a state that all ranks must agree on.
UNEVEN = {
    "batch_size": 7,
    "microbatch": 2,
    "ema_rate": "0.9,0.5",
    "schedule_sampler": "loss-second-moment",
    "grad_clip": 0.5,
    "weight_decay": 0.1,
    "warmup_steps": 3,
    "lr": 0.05,
    "save_interval": 100,
}


@pytest.fixture(autouse=True)
def quick():
    with one_thread():
        yield


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_images(tmp_path / "images", *(f"{i % 2}/{i}.png" for i in range(10)))


def train_in(processes: int, data_dir: Path, log_dir: str, *, descend=True, **changes: Any) -> Path:
    """Run train.py; returns its log_dir."""
    config = write_config(data_dir, log_dir, **changes)
    run_ranks(data_dir.parent, processes, f"--conf_path={config}", plain_descent=descend)
    return data_dir.parent / log_dir


def assert_close_checkpoints(expected: Path, found: Path, step: int) -> None:
    """The same files, the same keys, and numbers up to the rounding of sums."""
    names = [
        sorted(path.name for path in folder.glob(f"*{step:06d}.pt")) for folder in (expected, found)
    ]
    assert names[0] == names[1]
    assert len(names[0]) >= 3
    for name in names[0]:
        wanted, got = (leaves(load_state_dict(f"{folder / name}")) for folder in (expected, found))
        assert list(wanted) == list(got)
        for key, value in wanted.items():
            torch.testing.assert_close(
                got[key],
                value,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, at=(name, key): f"{at}: {text}",
            )


# ---- Shares ----


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [7, 8, 20])
def test_shares_are_even_and_make_up_the_whole(size, count):
    things = list(range(count))
    shares = [things[share_of(World(rank, size), count)] for rank in range(size)]
    assert sum(shares, []) == things
    lengths = {len(share) for share in shares}
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


def test_each_rank_reads_its_share_of_the_files_only(data_dir, monkeypatch):
    images = TrainingImages(str(data_dir), 16)
    whole = list(islice(endless_batches(images, 5, seed=1, first_step=2), 4))
    load, read = data.load_prepared, []
    monkeypatch.setattr(
        data, "load_prepared", lambda path, size: read.append(path) or load(path, size)
    )
    ranks = []
    for rank in range(3):
        read.clear()
        batches = endless_batches(images, 5, 1, 2, World(rank, 3))
        ranks.append(list(islice(batches, 4)))
        batches.close()  # what is read ahead is read by then
        share = share_of(World(rank, 3), 5)
        order = [i for step in islice(step_batches(10, 5, 1, 2), 20) for i in step[share]]
        assert sorted(read) == sorted(images.paths[i] for i in order[: len(read)])
    for step, (pictures, classes) in enumerate(whole):
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), pictures)
        assert torch.equal(torch.cat([batches[step][1] for batches in ranks]), classes)


class Separate(Processes):
    """One rank of several, whose others are not there."""

    def __init__(self, world: World):
        self.world, self.device = world, torch.device("cpu")
        self.team = Team(world, HashStore())

    def replicate(self, network: torch.nn.Module) -> torch.nn.Module:
        return network

    def no_sync(self, replica: torch.nn.Module) -> AbstractContextManager:
        return nullcontext()

    def gather(self, values: torch.Tensor, count: int) -> torch.Tensor:
        return torch.ones(count)


def separate_trainer(data_dir: Path, world: World, **changes: Any) -> Trainer:
    whole, _ = build_trainer(load_training_config(f"{write_config(data_dir, **changes)}"))
    return Trainer(
        whole.network, whole.objective, whole.params, seed=whole.seed, processes=Separate(world)
    )


def test_ranks_draw_for_the_batch_but_drop_out_each_on_its_own(data_dir, monkeypatch):
    seen = []

    def record(self: Trainer, *share: torch.Tensor) -> torch.Tensor:
        seen.append((*share, torch.rand(1)))
        return torch.ones(len(share[0]))

    monkeypatch.setattr(Trainer, "_backward", record)
    pictures, classes = torch.randn(7, 3, 16, 16), torch.arange(7)
    for world in (World(), *(World(rank, 3) for rank in range(3))):
        share = share_of(world, 7)
        trainer = separate_trainer(data_dir, world, batch_size=7)
        trainer.step = 4
        trainer.train_step(pictures[share], classes[share])
    whole, *ranks = (drawn[:-1] for drawn in seen)
    for expected, *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat(shares), expected)
    assert not torch.equal(whole[0], pictures)  # some are flipped
    assert len({drawn[-1].item() for drawn in seen}) == 3  # rank 0 draws what one process draws


# ---- The same weights ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"lr": 0.05, "total_steps": 5, "save_interval": 100}),
        (3, UNEVEN | {"total_steps": 10}),
        (
            2,
            {"lr": 0.01, "total_steps": 3, "batch_size": 3, "microbatch": 1, "class_cond": True}
            | {"use_checkpoint": True, "use_kl": True, "grad_clip": 0.1},
        ),
    ],
    ids=["plain", "uneven", "other network"],
)
def test_many_processes_learn_what_one_does(data_dir, processes, changes):
    one = train_in(1, data_dir, "one", **changes)
    many = train_in(processes, data_dir, "many", **changes)
    assert_close_checkpoints(one, many, changes["total_steps"])


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(data_dir):
    whole = train_in(1, data_dir, "whole", total_steps=12, **UNEVEN)
    for processes, total_steps in ((1, 3), (2, 6), (3, 10), (1, 12)):
        parts = train_in(processes, data_dir, "parts", total_steps=total_steps, **UNEVEN)
    assert_close_checkpoints(whole, parts, 12)
    losses = load_state_dict(f"{parts / 'opt000012.pt'}")["timesteps"]
    assert (losses["seen"] >= 10).all()  # past the uniform start


@pytest.mark.slow
def test_rank_0_alone_speaks_draws_and_writes(data_dir):
    config = write_config(data_dir, total_steps=2, sample_interval=2, show_progress=True)
    first, second = Ranks(data_dir.parent, [[f"--conf_path={config}"]] * 2).wait()
    assert "batch size 4 in 2 processes" in first.text
    assert "2/2" in first.text
    assert first.text.endswith("log/ema_0.9_000002.pt\n")
    assert second == Ended(0, "")
    files = sorted(path.name for path in (data_dir.parent / "log").iterdir())
    assert files == ["ema_0.9_000002.pt", "model000002.pt", "opt000002.pt", "samples000002.png"]


# ---- Processes that stop ----

WORKER = """
import os, runpy, sys
folder, *sys.argv = sys.argv[1:]
with open(f"{folder}/rank{os.environ['RANK']}.pid", "w") as file:
    file.write(str(os.getpid()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(data_dir: Path, config: Path, *options: str) -> subprocess.Popen:
    """Two workers, each of which leaves its process id beside the images."""
    worker = data_dir.parent / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*options, worker, data_dir.parent, "train.py", f"--conf_path={config}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=one_thread_environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} does not appear"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_worker_is_started_again_and_nothing_is_lost(data_dir):
    """With dropout, which no other number of processes repeats: so bit for bit."""
    changes = EVERYTHING | {"total_steps": 30, "save_interval": 3}
    whole = train_in(2, data_dir, "whole", descend=False, **changes)
    log_dir = data_dir.parent / "log"
    with torchrun(data_dir, write_config(data_dir, **changes), "--max-restarts=1") as agent:
        wait_for(log_dir / f"opt{random.choice([3, 9, 15]):06d}.pt")
        victim = data_dir.parent / f"rank{random.randrange(2)}.pid"
        os.kill(int(victim.read_text()), signal.SIGKILL)
        output, errors = agent.communicate(timeout=90)
    assert agent.returncode == 0, errors
    assert "starting afresh" in output
    assert "resuming from step" in output
    assert "Traceback" not in errors
    names = [f"{kind}000030.pt" for kind in ("model", "ema_0.9_", "ema_0.5_", "opt")]
    assert_same_checkpoint(whole, log_dir, names)


@pytest.mark.slow
def test_error_of_a_worker_ends_all(data_dir):
    bad_path = spoil_image_of_rank_1(data_dir)
    with torchrun(data_dir, write_config(data_dir)) as agent:
        _, errors = agent.communicate(timeout=60)
    assert agent.returncode == 1
    assert f"[rank 1] error: cannot read image {bad_path}" in errors
    assert errors.count("Traceback") == 1  # torchrun's own


def spoil_image_of_rank_1(data_dir: Path) -> str:
    """The path of an image of the second half of the first batch."""
    path = TrainingImages(str(data_dir), 16).paths[next(step_batches(10, 4, 5, 0))[2]]
    Path(path).write_bytes(b"no picture")
    return path


def ended_badly(data_dir: Path, *arguments: list[str]) -> list[str]:
    """The one line of error of each rank of a group that has to fail."""
    ended = Ranks(data_dir.parent, arguments).wait()
    lines = [[line for line in rank.text.splitlines() if "error: " in line] for rank in ended]
    for rank, errors in enumerate(lines):
        assert ended[rank].status == 2, ended
        assert len(errors) == 1
        assert errors[0].startswith(f"[rank {rank}] error: ")
        assert "Traceback" not in ended[rank].text
    return [errors[0].partition("error: ")[2] for errors in lines]


@pytest.mark.slow
def test_image_that_one_rank_cannot_read(data_dir):
    bad_path = spoil_image_of_rank_1(data_dir)
    arguments = [f"--conf_path={write_config(data_dir)}"]
    first, second = ended_badly(data_dir, arguments, arguments)
    assert first.startswith("another process has stopped")
    assert f"cannot read image {bad_path}" in second


@pytest.mark.slow
def test_training_that_diverges(data_dir):
    arguments = [f"--conf_path={write_config(data_dir, lr=1e30, total_steps=50)}"]
    for error in ended_badly(data_dir, arguments, arguments, arguments):
        assert "training has diverged" in error


@pytest.mark.slow
def test_checkpoint_that_rank_0_cannot_write(data_dir):
    (data_dir.parent / "log" / "model000002.pt").mkdir(parents=True)
    arguments = [f"--conf_path={write_config(data_dir)}"]
    first, second, third = ended_badly(data_dir, arguments, arguments, arguments)
    assert "cannot write" in first
    assert second.startswith("another process has stopped")
    assert third.startswith("another process has stopped")


@pytest.mark.slow
def test_log_dir_that_rank_0_cannot_write(data_dir):
    (data_dir.parent / "file").touch()
    arguments = [f"--conf_path={write_config(data_dir, 'file/log')}"]
    first, second = ended_badly(data_dir, arguments, arguments)
    assert "log_dir: cannot write in" in first
    # The second where rank 0, which is also the store here, is gone before the first is read.
    assert second == f"rank 0 has stopped: {first}" or second.startswith("lost contact")


@pytest.mark.slow
def test_fewer_images_in_a_batch_than_processes(data_dir):
    arguments = [f"--conf_path={write_config(data_dir, batch_size=2)}"]
    for error in ended_badly(data_dir, arguments, arguments, arguments):
        assert error.startswith("batch_size: found 2, which is of all processes together")
        assert "accepted: 3 or more" in error
    assert not (data_dir.parent / "log").exists()


@pytest.mark.slow
def test_processes_of_different_configs(data_dir):
    arguments = [f"--conf_path={write_config(data_dir)}"]
    _, second = ended_badly(data_dir, arguments, [*arguments, "--set=lr=0.5"])
    assert second.startswith("config: not the same as for rank 0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "status", "message"),
    [
        (signal.SIGINT, 130, "[rank 0] stopped; run the same command again to resume"),
        (signal.SIGKILL, 2, "[rank 0] error: another process has stopped"),
    ],
)
def test_stopped_processes_end_quietly(data_dir, stop, status, message):
    """Ctrl-C, of which torchrun tells all; a kill of rank 1, of which nobody tells."""
    config = write_config(data_dir, total_steps=100_000)
    ranks = Ranks(data_dir.parent, [[f"--conf_path={config}"]] * 2)
    wait_for(data_dir.parent / "log" / "opt000002.pt")
    for process in ranks.processes if stop == signal.SIGINT else ranks.processes[1:]:
        os.kill(process.pid, stop)
    first, second = ranks.wait()
    assert second.status == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert first.status == status
    assert message in first.text
    assert "Traceback" not in first.text + second.text


def test_other_ranks_keep_no_averages_and_write_nothing(data_dir, monkeypatch):
    trainer = separate_trainer(data_dir, World(1, 2), total_steps=2, sample_interval=1)
    monkeypatch.setattr(Processes, "part", lambda self: None)
    trainer.processes.team.store.set("log_dir", '{"made": null}')
    images, log_dir = TrainingImages(str(data_dir), 16), data_dir.parent / "log"
    train(trainer, images, str(log_dir), write_samples=pytest.fail, show_progress=False)
    assert trainer.step == 2
    assert trainer.emas == []
    assert not log_dir.exists()


def test_log_dir_of_rank_0_that_another_machine_does_not_see(data_dir):
    trainer = separate_trainer(data_dir, World(1, 2))
    trainer.processes.team.store.set("step", '{"made": 2}')
    with pytest.raises(UserError, match=r"goes on from step 2, but model000002.pt is not here"):
        trainer.resume(str(data_dir.parent / "log"))


def test_device_that_trains_in_one_process_only():
    with pytest.raises(UserError, match="mps trains in one process only"):
        Processes(World(0, 2), "mps")
