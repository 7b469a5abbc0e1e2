"""`python benchmark.py --scaling`: what torchrun starts, and what is made of its answers."""

import json
import os
import signal
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from benchmark_command import command, load, write
from torch.distributed import HashStore

from guided_diffusion import factory, scaling
from guided_diffusion.accel import Speed
from guided_diffusion.config import UserError
from guided_diffusion.dist_util import Team, World
from guided_diffusion.scaling import Scaling, Task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TASK = Task("tiny.yml", [], "random.pt", "cpu", batch=1, seconds=0.1)
RATES = {1: [10.0, 30.0, 20.0], 2: [26.0, 25.0, 5.0], 3: [48.0, 60.0, 54.0]}


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, in which nothing may stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))  # for those that are started
    yield folder
    # Torch may make a folder of its own, for what it compiles.
    assert [*folder.glob("benchmark-*"), *folder.glob("torchelastic*")] == []


def known(folder: Path, **changes: object) -> Scaling:
    figures = Scaling(
        config=load(folder),
        speed=Speed("bf16", reason="fast: a reason"),
        device=CPU,
        machine="a machine",
        cores=3,
        batch=2,
        rates=RATES,
    )
    return replace(figures, **changes)


# ---- A run as a user sees it ----


def test_a_run(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    with (
        patch.object(scaling, "SECONDS", 0.3),
        patch.object(scaling, "ROUNDS", 1),
        patch.object(scaling, "usable_cores", lambda: 2),
    ):
        result = command("--conf_path", "tiny.yml", "--scaling", "--batch", "2", "--json")
    assert result.status == 0
    figures = json.loads(result.out)
    assert (figures["name"], figures["batch"], figures["device"]) == ("tiny", 2, "cpu")
    one, two = figures["scaling"]
    assert (one["processes"], one["threads_each"]) == (1, 2)
    assert (two["processes"], two["threads_each"]) == (2, 1)
    assert one["relative_to_one_process"] == 1 and one["evaluations_per_second"] > 0
    ratio = two["evaluations_per_second"] / one["evaluations_per_second"]
    assert two["efficiency"] == two["relative_to_one_process"] == pytest.approx(ratio)
    assert "round 1 of 1: 2 processes at once ..." in result.err


def test_help_shows_the_command():
    assert "--conf_path confs/demo.yml --scaling\n" in command("--help").out


# ---- Bad input ----


def test_it_is_not_for_torchrun(tmp_path, monkeypatch):
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in (address | ranks).items():
        monkeypatch.setenv(name, value)
    result = command("--conf_path", write(tmp_path), "--scaling")
    (line,) = result.err.splitlines()
    assert result.status == 2 and line.startswith("error: --scaling starts torchrun itself")


def test_it_is_not_for_devices_that_processes_cannot_share_out(tmp_path):
    with patch.object(factory, "pick_device", lambda name: torch.device("mps")):
        result = command("--conf_path", write(tmp_path), "--scaling")
    (line,) = result.err.splitlines()
    assert result.status == 2
    assert line == "error: device: found mps; accepted with --scaling: cpu or cuda"


# ---- How many, and in which order ----


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_counts_are_powers_of_two_and_the_most(most, counts):
    assert scaling.process_counts(most) == counts


def test_cores_are_shared_out():
    assert [scaling.threads_each(6, n) for n in (1, 2, 4, 6, 8)] == [6, 3, 1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can forbid cores")
def test_cores_that_are_forbidden_do_not_count():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert scaling.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert scaling.usable_cores() == len(allowed)


def test_counts_take_turns(capsys):
    calls = []

    def total_rate(task: Task, count: int, threads: int) -> float:
        assert task is TASK
        calls.append((count, threads))
        return float(len(calls))

    with patch.object(scaling, "total_rate", total_rate):
        rates = scaling.measure_in_turns(TASK, [1, 2, 4], cores=4)
    assert calls == [(1, 4), (2, 2), (4, 1)] * 3
    assert rates == {1: [1, 4, 7], 2: [2, 5, 8], 4: [3, 6, 9]}
    notes = capsys.readouterr().err.splitlines()
    assert notes[:2] == ["round 1 of 3: 1 process ...", "round 1 of 3: 2 processes at once ..."]


@pytest.mark.parametrize(
    ("device", "counts"), [(CPU, [1, 2, 3]), (torch.device("cuda", 1), [1, 2, 4, 5])], ids=str
)
def test_what_is_asked_for_is_measured(tmp_path, monkeypatch, device, counts):
    def measure_in_turns(task: Task, asked: list[int], cores: int) -> dict[int, list[float]]:
        assert (asked, cores) == (counts, 3)
        assert task.conf_path == str(tmp_path / "tiny.yml")
        assert (task.settings, task.batch, task.device) == (["seed=5"], 4, device.type)
        assert set(torch.load(task.model_path)) >= {"out.2.weight"}
        return RATES

    monkeypatch.chdir(tmp_path)
    guided = {"classifier_scale": 1.0, "classifier_path": "none.pt", "classifier_use_fp16": True}
    load(tmp_path, image_size=64, attention_resolutions="32", **guided)
    with (
        patch.object(factory, "pick_device", lambda name: device),
        patch.object(factory.accel, "offered_precisions", lambda device: ["fp32"]),
        patch.object(torch.cuda, "device_count", lambda: 5),
        patch.object(torch.cuda, "get_device_name", lambda device: f"name of {device}"),
        patch.object(scaling, "usable_cores", lambda: 3),
        patch.object(scaling, "measure_in_turns", measure_in_turns),
    ):
        result = command(
            *("--conf_path", "tiny.yml", "--scaling", "--batch", "4", "--set", "seed=5")
        )
    assert result.status == 0
    _, machine, speed, *_ = result.out.splitlines()
    assert f"3 of {os.cpu_count()} cores" in machine and machine.endswith(f"device {device.type}")
    assert speed == "measured: fp32"
    assert "The classifier that guides this config's sampling is not counted." in result.out


def test_of_a_latent_config_the_denoiser_is_measured(tmp_path):
    def measure_in_turns(task: Task, asked: list[int], cores: int) -> dict[int, list[float]]:
        config = replace(load(tmp_path, **keys), model_path=task.model_path)
        scaling.prepare(config, 2, CPU)()
        return RATES

    keys = {"method": "latent", "image_size": 32}
    with patch.object(scaling, "measure_in_turns", measure_in_turns):
        result = command("--conf_path", write(tmp_path, **keys), "--scaling")
    assert (result.status, "warning" in result.err) == (0, False)
    assert "tiny: network for 32×32 images, batch 1" in result.out


# ---- torchrun ----


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A function that puts some lines of Python in the place of what torchrun starts."""

    def replace_by(code: str) -> None:
        lines = """
            import json, os, sys, time
            from pathlib import Path
            here, folder, rank = Path(__file__).parent, sys.argv[2], int(os.environ["RANK"])
        """
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(lines) + textwrap.dedent(code))
        monkeypatch.setattr(scaling, "WORKER", (str(script),))

    return replace_by


def test_what_processes_do_is_added_up(worker):
    worker("""
        assert json.loads(sys.argv[1])["model_path"] == "random.pt"
        assert (os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]) == ("3", "7")
        assert os.getsid(os.getppid()) == os.getppid()  # Ctrl-C does not reach torchrun
        Path(folder, f"answer-{rank}.json").write_text(json.dumps({"rate": 10.0**rank}))
    """)
    assert scaling.total_rate(TASK, count=3, threads=7) == 111


def test_a_process_that_the_system_ends(worker, capsys):
    worker("""
        if rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(60)
    """)
    with pytest.raises(UserError, match="--scaling, 2 processes at once: one .* lack of memory"):
        scaling.total_rate(TASK, count=2, threads=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "status", "text"),
    [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "stopped; nothing is left behind")],
)
def test_processes_end_with_the_one_that_started_them(
    tmp_path, temporary, worker, number, status, text
):
    worker("""
        (here / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    """)
    pids = []

    def stop() -> None:
        files = [tmp_path / "pid-0", tmp_path / "pid-1"]
        end = time.monotonic() + 60
        while time.monotonic() < end and not all(f.exists() and f.read_text() for f in files):
            time.sleep(0.02)
        pids.extend(int(file.read_text()) for file in files)
        assert len(list(temporary.glob("benchmark-*"))) == 2  # the weights; torchrun's
        os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with patch.object(scaling, "process_counts", lambda most: [2]):
        result = command("--conf_path", write(tmp_path), "--scaling")
    stopper.join()
    assert result.status == status and result.err.splitlines()[-1].startswith(text)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("answers", "report", "status", "message", "shown"),
    [
        ([{"rate": 5}, {"error": "no room"}], "x", 1, "2 processes at once: no room", ""),
        ([{"rate": 5}], "a traceback", 1, "torchrun ended with status 1", "a traceback\n"),
        ([], "Sending closing signal SIGTERM", -signal.SIGKILL, "lack of memory", ""),
        ([], "one (SIGTERM) received", -signal.SIGTERM, "ended with status -15", "one (SIG"),
    ],
)
def test_what_is_said_of_a_failure(capsys, answers, report, status, message, shown):
    def run(command: list[str], path: Path, threads: int) -> int:
        path.write_text(report)
        for rank, answer in enumerate(answers):
            (path.parent / f"answer-{rank}.json").write_text(json.dumps(answer))
        return status

    with patch.object(scaling, "_run", run), pytest.raises(UserError, match=message) as error:
        scaling.total_rate(TASK, count=2, threads=1)
    assert str(error.value).startswith("--scaling, 2 processes at once: ")
    assert capsys.readouterr().err.startswith(shown) and len(str(error.value).splitlines()) == 1


# ---- In each process ----


def test_the_answer_of_a_process(tmp_path):
    arguments = ["scaling.py", json.dumps(vars(TASK)), str(tmp_path)]
    answer = tmp_path / "answer-0.json"
    with patch("sys.argv", arguments), patch.object(scaling, "work") as work:
        work.return_value = 2.5
        assert scaling.main() == 0
        assert json.loads(answer.read_text()) == {"rate": 2.5}
        task, team = work.call_args.args
        assert task == TASK and team.world == World()
        work.side_effect = UserError("no room")
        assert scaling.main() == 2
    assert json.loads(answer.read_text()) == {"error": "no room"}


def test_a_gpu_that_is_too_small(tmp_path):
    task = replace(TASK, conf_path=write(tmp_path), batch=7)
    failure = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with (
        patch.object(scaling, "prepare", side_effect=failure),
        pytest.raises(UserError, match="not enough memory for --batch 7"),
    ):
        scaling.work(task, Team(World(), HashStore()))


def test_each_process_has_a_gpu_of_its_own():
    assert scaling.own_device("cuda", World(5, 8, 1, 4)) == torch.device("cuda", 1)
    assert scaling.own_device("cpu", World(5, 8, 1, 4)) == CPU


def test_the_network_evaluated_is_that_of_the_config(tmp_path):
    config = load(tmp_path, class_cond=True)
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> None:
        assert x.shape == (3, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
        assert len(t) == len(y) == 3
        seen.append(x)

    def build_network(asked: object, device: torch.device, speed: Speed) -> object:
        assert (asked, device, speed) == (config, CPU, Speed("fp32"))
        return network

    with patch.object(factory, "build_network", build_network):
        evaluate = scaling.prepare(config, 3, CPU)
    assert seen == []
    evaluate()
    evaluate()
    assert len(seen) == 2


def test_the_latents_evaluated_are_those_of_the_pictures(tmp_path):
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor) -> None:
        assert x.is_contiguous(memory_format=torch.channels_last)
        seen.append((tuple(x.shape), len(t)))

    with patch.object(factory, "build_network", lambda *_: network):
        scaling.prepare(load(tmp_path, method="latent", image_size=100), 3, CPU)()
    assert seen == [((3, 7, 28, 28), 3)]


@pytest.mark.parametrize(
    ("seconds", "calls"), [(2.0, 3), (2.25, 3), (2.26, 4), (0.0, scaling.LEAST_EVALUATIONS)]
)
def test_whole_evaluations_are_counted(seconds, calls):
    now, step = [100.0], 0.75

    def evaluate() -> None:
        now[0] += step

    with patch.object(scaling.time, "perf_counter", lambda: now[0]):
        assert scaling.evaluations_per_second(evaluate, seconds) == pytest.approx(1 / step)
    assert now[0] == 100 + calls * step


def test_processes_wait_for_one_another_and_stay_busy_until_all_are_through(tmp_path):
    """Two of a team, as threads: rank 1 is ready later, and through later."""
    task, store = replace(TASK, conf_path=write(tmp_path)), HashStore()
    me, log = threading.local(), []

    def prepare(config: object, batch: int, device: torch.device) -> object:
        time.sleep(me.delay)
        return lambda: (time.sleep(0.001), log.append((me.rank, "evaluates")))

    def evaluations_per_second(evaluate: object, seconds: float) -> float:
        log.append((me.rank, "begins"))
        time.sleep(me.delay)
        log.append((me.rank, "ends"))
        return seconds

    def member(rank: int, delay: float) -> None:
        me.rank, me.delay = rank, delay
        log.append((rank, scaling.work(task, Team(World(rank, 2, rank, 2), store))))

    with (
        patch.object(scaling, "prepare", prepare),
        patch.object(scaling, "evaluations_per_second", evaluations_per_second),
    ):
        members = [threading.Thread(target=member, args=(i, 0.2 * i)) for i in (0, 1)]
        for thread in members:
            thread.start()
        for thread in members:
            thread.join()
    assert log[: log.index((0, "begins"))].count((1, "evaluates")) == scaling.WARM_UPS
    between = log[log.index((0, "ends")) : log.index((1, "ends"))]
    assert between.count((0, "evaluates")) > 10
    assert (0, TASK.seconds) in log[log.index((1, "ends")) :]


# ---- Figures ----


def test_figures_are_those_counted_by_hand(tmp_path):
    figures = known(tmp_path)
    assert [figures.rate(n) for n in RATES] == [20, 25, 54]
    assert [figures.relative(n) for n in RATES] == [1, 1.25, 2.7]
    assert [figures.efficiency(n) for n in RATES] == [1, 1.25, 2.7]
    assert figures.spread == 1  # 10 to 30, about 20
    on_gpus = known(tmp_path, device=CUDA)
    assert [on_gpus.efficiency(n) for n in RATES] == pytest.approx([1, 0.625, 0.9])
    assert [on_gpus.relative(n) for n in RATES] == [1, 1.25, 2.7]


def test_the_table_of_a_cpu(tmp_path):
    assert known(tmp_path).describe().splitlines() == [
        "tiny: network for 16×16 images, batch 2",
        "machine: a machine; device cpu",
        "measured: bf16 (fast: a reason)",
        "",
        "processes  threads each  evaluations per second  relative to one process",
        "1                     3                    20.0                     1.00",
        "2                     1                    25.0                     1.25",
        "3                     1                    54.0                     2.70",
        "",
        "evaluations per second: of all processes together, while all of them run; starting and",
        "    loading are not counted. Each is the median of 3 rounds, taken in turns; rounds",
        "    differ by up to 100%.",
        "relative to one process: one process alone keeps all cores busy, and several share them.",
        "    So 1.00 is what to expect; more is a gain, less a loss.",
        "These figures are unsteady: most likely, other programs are keeping the machine busy.",
        "    Measure again while it is idle.",
    ]


@pytest.mark.parametrize(("highest", "unsteady"), [(119, False), (120, True)])
def test_unsteady_figures_are_said_to_be_so(tmp_path, highest, unsteady):
    rates = {1: [100.0, 100.0, 101.0], 2: [100.0, 100.0, float(highest)]}
    assert ("unsteady" in known(tmp_path, rates=rates).describe()) == unsteady


def test_the_table_of_gpus(tmp_path):
    lines = known(tmp_path, device=CUDA).describe().splitlines()
    assert [line.split()[-1] for line in lines[4:8]] == ["efficiency", "100%", "62%", "90%"]
    assert any(line.startswith("efficiency: relative to one process, divided") for line in lines)
    assert not any(line.startswith("relative") for line in lines)


def test_json(tmp_path):
    figures = json.loads(json.dumps(known(tmp_path, device=CUDA).to_json()))
    *_, three = figures.pop("scaling")
    assert figures == {
        "name": "tiny",
        "machine": "a machine",
        "device": "cuda",
        "precision": "bf16",
        "speed": "bf16 (fast: a reason)",
        "batch": 2,
        "cores": 3,
    }
    assert three == {
        "processes": 3,
        "threads_each": 1,
        "evaluations_per_second": 54,
        "evaluations_per_second_of_rounds": [48, 60, 54],
        "relative_to_one_process": 2.7,
        "efficiency": pytest.approx(0.9),
    }
