"""Batches: how many images are worked on at once, and what happens when they are too many.

The networks are fakes on the CPU that run out of memory as a GPU does. A fake paints each image in
the grey of its seed, so that a written picture tells which random stream it got.
"""

import contextlib
import io
import json
import re
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.distributed import HashStore

from guided_diffusion.config import UserError, load_config
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.machine import memory, ranks, storage
from guided_diffusion.machine.ranks import Team, World, join
from guided_diffusion.machine.signals import Interrupted
from guided_diffusion.run import progress, runner, worker
from guided_diffusion.run.plan import Job, make_job
from guided_diffusion.run.progress import ProgressReport
from guided_diffusion.run.recipe import Recipe
from guided_diffusion.run.records import Records, load_state
from guided_diffusion.scheduler import plain_times
from guided_diffusion.speed.choice import Speed
from guided_diffusion.streams import Evaluation, SamplerState, Streams

SIZE = 32
EVALUATIONS = 10
SEED = 100
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN, ALONE = Speed(), World()


def always(room: int) -> Callable[[int], int]:
    return lambda attempt: room


@dataclass(frozen=True)
class FakeInpainter:
    """What the runner knows of an inpainter. `room`: attempt -> images that memory holds."""

    room: Callable[[int], int] = always(10**9)
    fails_after: int = 3  # evaluations
    image_size: int = SIZE
    times: Sequence[int] = tuple(plain_times(EVALUATIONS))
    paste_known: bool = False
    device: torch.device = CPU
    seeds: list[list[int]] = field(default_factory=list)  # of each attempt
    resumes: list[SamplerState | None] = field(default_factory=list)

    @property
    def diffusion(self) -> SimpleNamespace:
        return SimpleNamespace(device=self.device)

    @property
    def sizes(self) -> list[int]:
        return [len(seeds) for seeds in self.seeds]

    def evaluations_before(self, state: SamplerState) -> int:
        return state.position

    def doubts(self, gt, keep_mask) -> None:
        """It is used as it was trained."""

    def first_step(self) -> "FakeInpainter":
        return replace(self, times=(self.times[0], self.times[-1]))

    def sample(self, gt, keep_mask, seeds, *, start_picture=None, resume=None, after_evaluation):
        assert gt.shape == keep_mask.shape == (len(seeds), 3, SIZE, SIZE)
        self.seeds.append(list(seeds))
        self.resumes.append(resume)
        room = self.room(len(self.seeds) - 1)
        for done in range(resume.position if resume else 0, EVALUATIONS):
            if len(seeds) > room and done == self.fails_after:
                self.fail()
            after_evaluation(Evaluation(done + 1, gt, gt, Streams(seeds)))
        return torch.stack([torch.full((3, SIZE, SIZE), s / 127.5 - 1) for s in seeds])

    def fail(self) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def carry_out(job: Job, inpainter: FakeInpainter) -> None:
    runner.run(job, lambda config: inpainter)


def told(job: Job, out: str) -> str:
    """What a run printed between its plan and the place of its results."""
    before, after = f"{job.describe()}\n", f"{job.plan.describe_results()}\n"
    assert out.startswith(before) and out.endswith(after)
    return out[len(before) : -len(after)]


@dataclass(frozen=True)
class Folder:
    """Some images, and the results of runs over them."""

    path: Path

    def plan(self, images: int, device=CPU, speed=PLAIN, **keys: object) -> Job:
        (self.path / "gts").mkdir()
        for i in range(images):
            Image.new("RGB", (SIZE, SIZE), "red").save(self.path / "gts" / f"{i}.png")
        mask = Image.new("L", (SIZE, SIZE), 255)
        mask.paste(0, (0, 0, SIZE // 2, SIZE))
        mask.save(self.path / "mask.png")
        (self.path / "weights.pt").write_bytes(b"weights")
        return self.plan_again(device, speed, **keys)

    def plan_again(self, device=CPU, speed=PLAIN, **keys: object) -> Job:
        """As a run finds the folder after others."""
        config = self.config(**keys)
        recipe, times = Recipe(config, device, speed), plain_times(EVALUATIONS)
        return make_job(config, times, recipe, join(ALONE))

    def config(self, **keys: object):
        """keys: of the dataset, or of the whole run."""
        outputs = {"srs": "results", "lrs": "gt_masked", "gt_keep_masks": "masks_used"}
        config = {
            "image_size": SIZE,
            "channel_mult": "1,2",
            "timestep_respacing": str(EVALUATIONS),
            "model_path": str(self.path / "weights.pt"),
            "seed": SEED,
            "show_progress": False,
        }
        whole_run = (*config, "checkpoint_every")
        config |= {key: keys.pop(key) for key in whole_run if key in keys}
        dataset = keys | {
            "gt_path": str(self.path / "gts"),
            "mask_path": str(self.path / "mask.png"),
            "paths": {key: str(self.path / "out" / name) for key, name in outputs.items()},
        }
        config["data"] = {"eval": {"some": dataset}}
        (self.path / "conf.yml").write_text(yaml.safe_dump(config))
        return load_config(self.path / "conf.yml")

    def streams(self) -> dict[str, int]:
        """Name -> seed, of the results that are written."""
        paths = sorted((self.path / "out" / "results").glob("*.png"))
        pictures = {path.name: Image.open(path).getextrema() for path in paths}
        assert all(len(set(sum(extrema, ()))) == 1 for extrema in pictures.values())
        return {name: extrema[0][0] for name, extrema in pictures.items()}

    def states(self) -> list[Path]:
        """Files of samplers that were stopped."""
        return list((self.path / "out" / "results.run" / "unfinished").glob("*"))

    def record(self) -> dict:
        return json.loads((self.path / "out" / "run.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Folder]:
    """Each run ends the one before, which as a process of its own would not hold its lock."""
    held, lock = contextlib.ExitStack(), storage.lock

    def lock_after_others(path: str):
        held.close()
        return held.enter_context(lock(path))

    monkeypatch.setattr(storage, "lock", lock_after_others)
    with held:
        yield Folder(tmp_path)


def expected_streams(images: int) -> dict[str, int]:
    return {f"{i}.png": SEED + i for i in range(images)}


@contextlib.contextmanager
def told_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """What the user is warned of meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # as Python does for a user
        yield caught


def run(job: Job, inpainter: FakeInpainter) -> list[str]:
    """Run to the end; the warnings."""
    with told_warnings() as caught:
        carry_out(job, inpainter)
    return [str(warning.message) for warning in caught]


# ---- Batches that fit ----


@pytest.mark.parametrize(
    ("images", "keys", "sizes"),
    [
        (3, {}, [1, 1, 1]),
        (7, {"batch_size": 3}, [3, 3, 1]),
        (6, {"batch_size": 3, "drop_last": True}, [3, 3]),
        (7, {"batch_size": 3, "drop_last": True}, [3, 3]),
        (2, {"batch_size": 5}, [2]),
    ],
)
def test_each_image_has_the_stream_of_its_place(folder, images, keys, sizes):
    job, inpainter = folder.plan(images, **keys), FakeInpainter()
    assert run(job, inpainter) == []
    assert inpainter.sizes == sizes
    assert folder.streams() == expected_streams(sum(sizes)) and job.plan.images == sum(sizes)
    assert job.plan.total_evaluations == EVALUATIONS * sum(sizes)
    assert folder.record()["batch_size"] == keys.get("batch_size", 1)


def test_a_shuffled_order_shuffles_the_streams_with_the_images(folder):
    inpainter = FakeInpainter(room=always(2))
    run(folder.plan(8, batch_size=5, deterministic=False), inpainter)
    assert folder.streams() == expected_streams(8)
    worked = sum(inpainter.seeds[1:], [])
    assert worked != sorted(worked) == list(expected_streams(8).values())


def test_no_whole_batch_is_left(folder):
    with pytest.raises(UserError, match="drop_last leaves no batch: there are 2 image"):
        folder.plan(2, batch_size=3, drop_last=True)


# ---- Memory runs out ----


@pytest.mark.parametrize(
    ("images", "batch_size", "room", "sizes"),
    [
        (5, 4, 4, [4, 1]),
        (7, 4, 2, [4, 2, 2, 2, 1]),
        (7, 4, 3, [4, 2, 2, 2, 1]),
        (6, 5, 1, [5, 2, 1, 1, 1, 1, 1, 1]),
        (3, 100, 1, [3, 1, 1, 1]),  # half of what was tried
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    folder, images, batch_size, room, sizes
):
    inpainter = FakeInpainter(always(room))
    messages = run(folder.plan(images, batch_size=batch_size), inpainter)
    assert inpainter.sizes == sizes
    assert folder.streams() == expected_streams(images)
    tried = [size for size in sizes if size > room]
    halves = [size // 2 for size in tried]
    assert messages == [
        f"not enough memory for {size} images at a time; going on with {half}"
        for size, half in zip(tried, halves, strict=True)
    ]
    record = folder.record()
    assert record["finished"] and record["batch_size"] == (halves or [batch_size])[-1]
    assert list(record["seconds_per_image"]) == list(expected_streams(images))


def test_images_that_are_written_are_not_done_again(folder):
    inpainter = FakeInpainter(lambda attempt: 3 if attempt == 0 else 1)
    messages = run(folder.plan(7, batch_size=3), inpainter)
    first, second, *others = inpainter.seeds
    assert first == [100, 101, 102] and second == [103, 104, 105]
    assert others == [[103], [104], [105], [106]]
    assert len(messages) == 1
    assert folder.streams() == expected_streams(7)


def test_a_smaller_last_batch_is_halved_by_its_own_size(folder):
    inpainter = FakeInpainter(lambda attempt: 8 if attempt == 0 else 1)
    run(folder.plan(10, batch_size=8), inpainter)
    assert inpainter.sizes == [8, 2, 1, 1]


def test_what_a_failed_batch_held_is_free_before_the_next(folder):
    held, free, released = [], [], []

    class Holding(FakeInpainter):
        def sample(self, gt, *arguments, **keys):
            free.append([reference() is None for reference in held])
            held.append(weakref.ref(gt))
            return super().sample(gt, *arguments, **keys)

        def fail(self):
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            try:
                super().fail()
            except torch.cuda.OutOfMemoryError as error:
                held_by_frame = error  # whose traceback holds the frame in turn
                raise held_by_frame from None

    def empty_cache():
        released.append(all(reference() is None for reference in held))

    with patch.object(torch.cuda, "empty_cache", empty_cache):
        run(folder.plan(2, batch_size=2), Holding(always(1)))
    assert free[:2] == [[], [True, True]]
    assert released == [True]


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_a_batch_that_does_not_fit_in_a_cpus_memory_is_halved_too(folder, allocate):
    class Large(FakeInpainter):
        def fail(self):
            allocate(2**58)

    inpainter = Large(always(1))
    run(folder.plan(2, batch_size=2), inpainter)
    assert inpainter.sizes == [2, 1, 1]
    assert folder.streams() == expected_streams(2)


def test_an_error_that_has_nothing_to_do_with_memory_is_not_taken_for_one(folder):
    class Broken(FakeInpainter):
        def fail(self):
            torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="must match the size"):
        carry_out(folder.plan(2, batch_size=2), Broken(always(1)))


@pytest.mark.parametrize(
    ("device", "precision", "remedies"),
    [
        (CPU, "fp32", "set precision: bf16 (half the memory)"),
        (CUDA, "tf32", "set precision: bf16 (half the memory), or device: cpu"),
        (CUDA, "bf16", "set device: cpu"),
        (torch.device("mps"), "bf16", "set device: cpu"),
        (CPU, "bf16", "close other programs"),
    ],
)
def test_a_single_image_that_does_not_fit_ends_the_run(folder, device, precision, remedies):
    inpainter = FakeInpainter(lambda attempt: 2 if attempt == 0 else 0, device=device)
    offered = ["fp32", "bf16"]
    with (
        patch.object(worker, "offered_precisions", lambda device: offered),
        told_warnings() as caught,
        pytest.raises(UserError) as error,
    ):
        carry_out(folder.plan(4, speed=Speed(precision), batch_size=2), inpainter)
    assert str(error.value) == f"{device} has not enough memory for one image; {remedies}"
    assert len(caught) == 1 and inpainter.sizes == [2, 2, 1]
    assert folder.streams() == expected_streams(2)
    assert folder.record()["finished"] is False


# ---- What the bar and the estimate say ----


def test_what_a_failed_batch_did_is_taken_back_from_the_bar(folder, capsys):
    job = folder.plan(3, batch_size=3, show_progress=True)
    assert len(run(job, FakeInpainter(always(1), fails_after=7))) == 1
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.match(r"image 3 of 3: 100%\|.*\| 30/30 \[", last), last


@contextlib.contextmanager
def quiet_report(images: int, evaluations: int) -> Iterator[ProgressReport]:
    report = ProgressReport(images, images * evaluations, True, join(ALONE))
    with contextlib.redirect_stderr(io.StringIO()), report:
        yield report


def test_the_bar_counts_every_image_of_a_batch_once():
    x = torch.zeros(1, 3, 1, 1)
    with quiet_report(4, 5) as report:
        report.start_batch(0, 3)
        for _ in range(2):
            report.evaluation_done(x)
        assert report.bar.n == report.done == 6 and report.bar.desc == "image 1-3 of 4: "
        with pytest.warns(UserWarning, match="too many"):
            report.take_back_batch("too many")
        assert report.bar.n == report.done == 0
        report.start_batch(0, 1)
        report.evaluation_done(x)
        assert report.bar.n == report.done == 1 and report.bar.desc == "image 1 of 4: "
        assert report.bar.total == 20


def test_a_batch_that_fails_at_once_takes_nothing_back():
    x = torch.zeros(1, 3, 1, 1)
    with quiet_report(4, 1) as report:
        report.start_batch(0, 2)
        report.evaluation_done(x)
        report.start_batch(2, 2)
        with pytest.warns(UserWarning, match="too many"):
            report.take_back_batch("too many")
        assert report.bar.n == report.done == 2


def test_the_warning_has_a_line_of_its_own():
    """A line on the terminal is what follows the last carriage return in it."""
    err = io.StringIO()
    with (
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        ProgressReport(4, 20, True, join(ALONE)) as report,
    ):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(message, file=err)
        report.start_batch(0, 4)
        report.take_back_batch("too many")
    assert "too many" in [line.split("\r")[-1] for line in err.getvalue().split("\n")]


def test_the_estimate_is_made_anew_after_a_failed_batch(folder, capsys):
    clock = [0.0]

    class Timed(FakeInpainter):
        """A second for an evaluation of one image; in a batch, half of it for each."""

        def sample(
            self, gt, keep_mask, seeds, *, start_picture=None, resume=None, after_evaluation
        ):
            def tick(evaluation):
                clock[0] += 1 if len(seeds) == 1 else len(seeds) / 2
                after_evaluation(evaluation)

            return super().sample(gt, keep_mask, seeds, after_evaluation=tick)

    job = folder.plan(2, batch_size=2)
    with patch.object(progress.time, "monotonic", lambda: clock[0]):
        run(job, Timed(always(1), fails_after=6))
    # Five calls of two images out of 20 evaluations leave 10; then five of one image leave 15.
    assert told(job, capsys.readouterr().out).splitlines() == [
        "about 5 s left (0.5 s per evaluation)",
        "about 15 s left (1 s per evaluation)",
    ]


def test_the_estimate_does_not_mix_batches_that_failed_with_others(folder, capsys):
    clock = [0.0]

    class Timed(FakeInpainter):
        def sample(
            self, gt, keep_mask, seeds, *, start_picture=None, resume=None, after_evaluation
        ):
            def tick(evaluation):
                clock[0] += 100 if len(seeds) > 1 else 1
                after_evaluation(evaluation)

            return super().sample(gt, keep_mask, seeds, after_evaluation=tick)

    job = folder.plan(2, batch_size=2)
    with patch.object(progress.time, "monotonic", lambda: clock[0]):
        run(job, Timed(always(1), fails_after=3))
    assert told(job, capsys.readouterr().out) == "about 15 s left (1 s per evaluation)\n"


# ---- batch_size: auto ----

MIB = 2**20


@pytest.mark.parametrize(
    ("one", "two", "available", "most", "largest"),
    [
        (1100, 1200, 10_000, 1000, 80),  # 90 % of the memory: 1000 and 80 times 100
        (1100, 1200, 9_999, 1000, 79),
        (1100, 1200, 10_000, 64, 64),
        (1100, 1200, 1_000, 64, 1),  # not even one
        (1100, 1100, 10_000, 64, 64),  # too small to be seen
        (1100, 1000, 10_000, 64, 64),
    ],
)
def test_the_largest_batch_from_two_measurements(one, two, available, most, largest):
    found = memory.largest_batch(one * MIB, two * MIB, available * MIB, most)
    assert found == largest


@dataclass
class FakeGpu:
    """Memory as torch.cuda tells of it: that of weights, and what each image of a batch takes."""

    total: int
    weights: int = 1000
    per_image: int = 100
    others: int = 0  # what other programs take
    peak: int = 0

    def evaluate(self, images: int) -> None:
        needed = self.weights + images * self.per_image
        if needed > self.total - self.others:
            raise torch.cuda.OutOfMemoryError
        self.peak = max(self.peak, needed)

    def reset_peak_memory_stats(self, device):
        self.peak = self.weights

    def max_memory_allocated(self, device):
        return self.peak

    def memory_reserved(self, device):
        return self.weights

    def mem_get_info(self, device):
        return self.total - self.others - self.weights, self.total

    @contextlib.contextmanager
    def in_place(self):
        names = ("reset_peak_memory_stats", "max_memory_allocated", "memory_reserved")
        with contextlib.ExitStack() as stack:
            for name in (*names, "mem_get_info"):
                stack.enter_context(patch.object(torch.cuda, name, getattr(self, name)))
            yield self


@pytest.mark.parametrize(
    ("gpu", "most", "largest"),
    [
        (FakeGpu(10_000), 1000, 80),
        (FakeGpu(10_000), 5, 5),
        (FakeGpu(10_000, others=5_000), 1000, 35),
        (FakeGpu(10_000, weights=3_000, per_image=10), 1000, 600),
        (FakeGpu(1_150), 9, 1),  # two do not fit
        (FakeGpu(1_050), 9, 1),  # nor does one: the run will say so
    ],
)
def test_the_largest_batch_is_measured(gpu, most, largest):
    with gpu.in_place():
        assert memory.measure_largest_batch(gpu.evaluate, CUDA, most) == largest
    if largest > 1:
        assert gpu.weights + largest * gpu.per_image <= 0.9 * (gpu.total - gpu.others)


def test_what_is_set_up_once_makes_no_batch_too_large():
    with FakeGpu(10_000).in_place() as gpu:
        plain = memory.measure_largest_batch(gpu.evaluate, CUDA, 1000)
        once = [50]

        def evaluate(images: int) -> None:
            gpu.evaluate(images)
            gpu.peak += once.pop() if once else 0

        assert memory.measure_largest_batch(evaluate, CUDA, 1000) < plain


def test_one_image_needs_no_measurement():
    assert memory.measure_largest_batch(pytest.fail, CUDA, 1) == 1


def test_auto_means_one_without_cuda(folder):
    job, inpainter = folder.plan(3, batch_size="auto"), FakeInpainter()
    assert job.plan.batch_size == 1
    assert "batch size 1 (auto)\n" in job.describe()
    run(job, inpainter)
    assert inpainter.seeds == [[SEED], [SEED + 1], [SEED + 2]]  # nothing was measured


@pytest.mark.parametrize(("images", "size", "sizes"), [(9, 4, [4, 4, 1]), (3, 3, [3])])
def test_auto_is_measured_on_cuda_with_the_first_step_of_the_run(
    folder, capsys, images, size, sizes
):
    job = folder.plan(images, CUDA, batch_size="auto")
    assert job.plan.batch_size == "auto"
    assert "batch size auto\n" in job.describe()
    measured = []

    class Measured(FakeInpainter):
        def sample(self, gt, keep_mask, seeds, **keys):
            if keys:
                return super().sample(gt, keep_mask, seeds, **keys)
            assert gt.shape == keep_mask.shape == (len(seeds), 3, SIZE, SIZE)
            measured.append((len(seeds), self.times))
            gpu.evaluate(len(seeds))
            raise NonFiniteError([0], self.times[0])  # memory is what counts here

    inpainter = Measured(device=CUDA)
    with FakeGpu(1_600).in_place() as gpu:
        assert run(job, inpainter) == []
    assert measured == [(2, (EVALUATIONS - 1, -1)), (1, (EVALUATIONS - 1, -1))]
    assert f"batch size {size} (auto)\n" in capsys.readouterr().out
    assert inpainter.sizes == sizes and folder.streams() == expected_streams(images)
    record = folder.record()
    assert record["batch_size"] == size
    assert record["config"]["data"]["eval"]["some"]["batch_size"] == "auto"


def test_a_number_is_not_measured(folder, capsys):
    job, inpainter = folder.plan(3, CUDA, batch_size=2), FakeInpainter(device=CUDA)
    assert job.plan.batch_size == 2
    run(job, inpainter)
    assert inpainter.seeds == [[SEED, SEED + 1], [SEED + 2]]
    assert "batch size 2\n" in capsys.readouterr().out


# ---- What was chosen, and why ----


def test_speed_and_batch_size_are_told_and_recorded(folder, capsys):
    speed = Speed("bf16", compile=True, cuda_graph=False, reason="fast: it is")
    job = folder.plan(3, speed=speed, batch_size=2)
    assert job.describe().endswith("\ndevice cpu, bf16, compiled (fast: it is)")
    run(job, FakeInpainter())
    assert "\ndevice cpu, bf16, compiled (fast: it is)\n" in capsys.readouterr().out
    record = folder.record()
    assert record["speed"] == {
        "precision": "bf16",
        "compile": True,
        "cuda_graph": False,
        "reason": "fast: it is",
    }
    assert record["batch_size"] == 2


# ---- Numbers that are not finite ----


@pytest.mark.parametrize(
    ("images", "speed", "named", "remedy"),
    [
        ([1], Speed("fp16"), "3.png: ", ": set precision: fp32 or bf16"),
        ([0, 1], Speed("fp16"), "2.png and 1 more: ", ": set precision: fp32 or bf16"),
        ([0], Speed("bf16"), "2.png: ", "weights.pt again"),
        ([0], Speed(), "2.png: ", "weights.pt again"),
    ],
)
def test_an_output_that_is_not_finite_ends_the_run(folder, images, speed, named, remedy):
    class Overflowing(FakeInpainter):
        def fail(self):
            raise NonFiniteError(images, 6)

    inpainter = Overflowing(lambda attempt: 2 if attempt == 0 else 0, fails_after=4)
    with (
        patch.object(worker, "offered_precisions", lambda device: ["fp32", "bf16", "fp16"]),
        pytest.raises(UserError) as error,
    ):
        carry_out(folder.plan(4, speed=speed, batch_size=2), inpainter)
    message = str(error.value)
    assert message.startswith(named) and "not finite" in message and message.endswith(remedy)
    assert "at step 6, after 4 of 10 evaluations" in message
    assert inpainter.sizes == [2, 2]
    assert folder.streams() == expected_streams(2)
    assert folder.record()["finished"] is False


# ---- Going on after a stop ----


def written_by(job: Job, inpainter: FakeInpainter) -> list[str]:
    """What a run writes into its folders of pictures, in order."""
    paths, write = [], storage.write_atomically

    def note(path: str, data: bytes) -> None:
        paths.append("/".join(Path(path).parts[-2:]))
        write(path, data)

    with patch.object(storage, "write_atomically", note):
        assert run(job, inpainter) == []
    return [path for path in paths if path.endswith(".png")]


def test_of_a_batch_that_is_partly_done_only_what_is_missing_is_written(folder):
    job = folder.plan(7, batch_size=3)
    assert len(written_by(job, FakeInpainter())) == 3 * 7
    before = folder.record()["seconds_per_image"]
    for name in ("1.png", "5.png"):
        (folder.path / "out" / "results" / name).unlink()
    inpainter = FakeInpainter()
    written = written_by(folder.plan_again(batch_size=3), inpainter)
    assert inpainter.seeds == [[100, 101, 102], [103, 104, 105]]
    assert [path for path in written if path.startswith("results/")] == [
        "results/1.png",
        "results/5.png",
    ]
    assert {Path(path).name for path in written} == {"1.png", "5.png"}
    assert folder.streams() == expected_streams(7)
    record = folder.record()
    after = record["seconds_per_image"]
    assert record["finished"] and list(after) == list(expected_streams(7))
    kept = [f"{i}.png" for i in (0, 2, 3, 4, 6)]
    assert [after[name] for name in kept] == [before[name] for name in kept]


def test_a_finished_run_loads_nothing_and_says_so(folder, capsys):
    run(folder.plan(3), FakeInpainter())
    times = folder.record()["seconds_per_image"]
    capsys.readouterr()
    job = folder.plan_again()
    assert job.plan.batches == []
    with patch.object(storage, "move", pytest.fail):
        runner.run(job, pytest.fail)
    assert capsys.readouterr().out == (
        "all were finished before (--overwrite makes them again); results: "
        f"{folder.path}/out/results (settings and times: {folder.path}/out/run.json)\n"
        f"to look at: {folder.path}/out/report.html\n"
    )
    assert folder.record()["finished"] and folder.record()["seconds_per_image"] == times


def test_pictures_without_the_network_are_made_anew_of_a_finished_run(folder):
    run(folder.plan(3), FakeInpainter())
    masked = folder.path / "out" / "gt_masked" / "1.png"
    before = masked.read_bytes()
    masked.unlink()
    assert set(written_by(folder.plan_again(), FakeInpainter())) == {
        "gt_masked/1.png",
        "masks_used/1.png",
    }
    assert masked.read_bytes() == before


@dataclass(frozen=True)
class Eventful(FakeInpainter):
    """Something happens in an attempt, right after an evaluation."""

    event: Callable[[], object] = lambda: None
    attempt: int = 0
    position: int = 4  # after so many evaluations

    def sample(self, gt, keep_mask, seeds, *, start_picture=None, resume=None, after_evaluation):
        def happen(evaluation: Evaluation) -> None:
            if (len(self.seeds) - 1, evaluation.position) == (self.attempt, self.position):
                self.event()
            after_evaluation(evaluation)

        return super().sample(gt, keep_mask, seeds, resume=resume, after_evaluation=happen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_evaluation_and_the_next_run_goes_on(folder, capsys, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    inpainter = Eventful(event=lambda: signal.raise_signal(number), attempt=1)
    with pytest.raises(Interrupted) as stop:
        carry_out(folder.plan(7, batch_size=3), inpainter)
    assert stop.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert len(folder.states()) == 1 and folder.streams() == expected_streams(3)
    assert folder.record()["finished"] is False

    again = FakeInpainter()
    assert run(folder.plan_again(batch_size=3, show_progress=True), again) == []
    assert again.seeds == [[103, 104, 105], [106]]
    start, fresh = again.resumes
    assert start.position == 4 and fresh is None
    assert torch.equal(start.x, torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(3, 3, 32, 32))
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (103, 104, 105)]
    assert all(map(torch.equal, start.streams, states))
    assert folder.states() == [] and folder.streams() == expected_streams(7)
    last = capsys.readouterr().err.split("\r")[-1]  # with what was done before
    assert re.match(r"image 4 of 4: 100%\|.*\| 40/40 \[", last), last


def test_a_signal_after_the_last_evaluation_lets_the_batch_be_written(folder):
    class Late(FakeInpainter):
        def sample(self, *arguments, **keys):
            results = super().sample(*arguments, **keys)
            signal.raise_signal(signal.SIGTERM)
            return results

    with pytest.raises(Interrupted):
        carry_out(folder.plan(4, batch_size=3, checkpoint_every=0), Late())
    assert folder.streams() == expected_streams(3) and folder.states() == []


def test_the_state_is_saved_in_time(folder):
    clock = [0.0]

    class Crash(Exception):
        pass

    class Timed(FakeInpainter):
        """100 seconds for an evaluation; the ninth never ends."""

        def sample(
            self, gt, keep_mask, seeds, *, start_picture=None, resume=None, after_evaluation
        ):
            def tick(evaluation):
                clock[0] += 100
                if evaluation.position == 9:
                    raise Crash
                after_evaluation(evaluation)

            return super().sample(gt, keep_mask, seeds, resume=resume, after_evaluation=tick)

    positions = {}
    job = folder.plan(1)
    for every in (300, 700, 0, 1000):
        job.records.forget_states()
        config, run = folder.config(checkpoint_every=every), job.records.history().run + 1
        job = replace(job, plan=replace(job.plan, config=config, run=run))
        with patch.object(progress.time, "monotonic", lambda: clock[0]), pytest.raises(Crash):
            carry_out(replace(job, team=join(ALONE)), Timed())
        states = [load_state(str(path)) for path in folder.states()]
        positions[every] = [state["position"] for state in states]
    assert positions == {300: [6], 700: [7], 0: [8], 1000: []}


def test_a_state_that_no_batch_goes_on_from_is_removed_in_the_end(folder):
    stop = Eventful(event=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        carry_out(folder.plan(4, batch_size=3), stop)
    assert len(folder.states()) == 1
    again = FakeInpainter()
    run(folder.plan_again(batch_size=2), again)
    assert again.resumes == [None, None]
    assert folder.states() == [] and folder.streams() == expected_streams(4)


def test_a_damaged_state_costs_a_line_and_no_image(folder):
    stop = Eventful(event=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        carry_out(folder.plan(2, batch_size=2), stop)
    (state,) = folder.states()
    state.write_bytes(state.read_bytes()[:-100])
    again = FakeInpainter()
    (message,) = run(folder.plan_again(batch_size=2), again)
    assert state.name in message and message.endswith("; the images of this state start afresh")
    assert again.resumes == [None]
    assert folder.streams() == expected_streams(2) and folder.states() == []


def test_a_state_that_cannot_be_saved_is_told_and_the_run_goes_on(folder):
    def fill_up(path, state):
        raise OSError(28, "No space left on device")

    job = folder.plan(1, checkpoint_every=0)
    with patch.object(worker, "save_state", fill_up):
        messages = run(job, FakeInpainter())
    assert messages and all("cannot save the state in " in message for message in messages)
    assert all(message.endswith(": No space left on device") for message in messages)
    assert folder.streams() == expected_streams(1) and folder.record()["finished"]


def test_results_that_go_missing_meanwhile_are_told_and_made_by_the_next_run(folder):
    results = folder.path / "out" / "results"
    inpainter = Eventful(event=(results / "0.png").unlink, attempt=2)
    with pytest.raises(UserError, match=r"1 result of 3 went missing, first 0\.png: something"):
        carry_out(folder.plan(3), inpainter)
    assert folder.record()["finished"] is False
    again = FakeInpainter()
    run(folder.plan_again(), again)
    assert again.seeds == [[SEED]] and folder.streams() == expected_streams(3)


def test_what_another_run_has_finished_meanwhile_is_left_alone(folder):
    slow = folder.plan(2)
    quick = folder.plan_again()  # neither has locked anything: there was nothing to lock
    carry_out(quick, FakeInpainter())
    quick.records._lock.close()  # as its process ends
    with pytest.raises(UserError, match="another run has just written to .*; run the same command"):
        carry_out(slow, FakeInpainter())
    assert folder.streams() == expected_streams(2)
    assert folder.plan_again().plan.done == {"0.png", "1.png"}


@pytest.mark.parametrize("changed", ["gts/1.png", "mask.png"])
def test_an_input_that_is_another_by_its_turn(folder, changed):
    """Else pixels of one file would be recorded as those of another."""
    job = folder.plan(2)
    original = (folder.path / changed).read_bytes()
    Image.new("RGB", (SIZE, SIZE), "blue").save(folder.path / changed)
    with pytest.raises(UserError, match=f"{changed} changed during the run; run the same command"):
        carry_out(job, FakeInpainter())
    (folder.path / changed).write_bytes(original)
    assert "1.png" not in folder.plan_again().plan.done


# ---- Several processes ----


@pytest.fixture
def clock() -> Iterator[list[float]]:
    """Seconds that pass when the test says so."""
    now = [1.0]
    with patch.object(progress.time, "monotonic", lambda: now[0]):
        yield now


@pytest.fixture
def pair(folder) -> Callable[..., tuple[Job, Job]]:
    """Jobs of two processes that share a plan: of ranks 0 and 1."""

    def make(images: int, **keys: object) -> tuple[Job, Job]:
        job, store = folder.plan(images, **keys), HashStore()
        first, second = (Team(World(rank, 2, rank, 2), store) for rank in (0, 1))
        records = Records(job.plan.dataset.inpainted_dir, 1)
        return replace(job, team=first), replace(job, records=records, team=second)

    return make


def names_recorded(folder: Folder, rank: int) -> list[str]:
    lines = (folder.path / "out" / "results.run" / f"images-{rank}.jsonl").read_text().splitlines()
    return [line["name"] for line in map(json.loads, lines) if "bytes" in line]


def test_batches_are_handed_out_one_by_one(folder, pair, capsys):
    first, second = pair(7, batch_size=2)
    fast = FakeInpainter()
    slow = Eventful(
        event=lambda: carry_out(second, fast)
    )  # all else is done during its first batch
    assert run(first, slow) == []
    assert slow.seeds == [[100, 101]]
    assert fast.seeds == [[102, 103], [104, 105], [106]]
    assert folder.streams() == expected_streams(7)
    assert names_recorded(folder, 0) == ["0.png", "1.png"]
    assert names_recorded(folder, 1) == ["2.png", "3.png", "4.png", "5.png", "6.png"]
    record = folder.record()
    assert record["finished"]
    assert list(record["seconds_per_image"]) == list(expected_streams(7))
    told = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[rank 0] ") for line in told)
    assert len([line for line in told if " results: " in line]) == 1


def test_what_one_process_finds_ends_all(folder, pair, monkeypatch):
    monkeypatch.setattr(ranks, "TALLYING", 0)  # look at every evaluation
    first, second = pair(4, batch_size=2)
    seen = []

    def fail() -> None:
        (folder.path / "gts" / "3.png").write_bytes(b"")
        with pytest.raises(UserError, match=r"^cannot read image .*3\.png") as error:
            carry_out(second, FakeInpainter())
        seen.append(str(error.value))

    with pytest.raises(UserError) as error:
        carry_out(first, Eventful(event=fail))
    assert str(error.value) == f"stopped, because of [rank 1] {seen[0]}"
    (state,) = folder.states()  # of the batch that rank 0 had begun
    assert load_state(str(state))["position"] == 4
    assert folder.streams() == {} and folder.record()["finished"] is False


def test_rank_0_does_not_wait_for_ever(folder, pair):
    first, second = pair(3)
    assert second.team.add("batches begun", 1) == 1  # and never done
    with (
        patch.object(worker, "STALLED", 0),
        patch.object(worker, "POLLING", 0),
        pytest.raises(UserError, match="another process has done nothing for half an hour"),
    ):
        carry_out(first, FakeInpainter())
    assert folder.streams() == {"1.png": SEED + 1, "2.png": SEED + 2}


def test_rank_0_waits_for_the_others_while_they_do_something(folder, pair, clock):
    first, second = pair(3)
    second.team.add("batches begun", 1)
    inpainter, looks = FakeInpainter(), []

    def look(seconds: float) -> None:
        clock[0] += 20 * 60
        second.team.add("evaluations", 1)
        looks.append(folder.record()["finished"])
        if len(looks) == 3:
            finish_first_batch()
            second.team.add("batches done", 1)
            second.team.leave()

    def finish_first_batch() -> None:
        plan = replace(second.plan, tasks=second.plan.tasks[:1])
        team = Team(second.team.world, HashStore())
        settled = {"batch_size": 1, "digest": second.recipe.digest}
        team.store.set("settled plan", json.dumps({"made": settled}))
        carry_out(replace(second, plan=plan, team=team), inpainter)

    with patch.object(worker.time, "sleep", look):
        run(first, FakeInpainter())
    assert looks == [False] * 3 and inpainter.seeds == [[SEED]]
    assert folder.streams() == expected_streams(3) and folder.record()["finished"]


@pytest.fixture
def reports(clock) -> list[ProgressReport]:
    """Of two processes, over four images of ten evaluations."""
    store, err = HashStore(), io.StringIO()
    teams = [Team(World(rank, 2, rank, 2), store) for rank in (0, 1)]
    with contextlib.redirect_stderr(err), contextlib.ExitStack() as stack:
        yield [stack.enter_context(ProgressReport(4, 40, True, team)) for team in teams]


def test_the_bar_of_rank_0_counts_what_all_processes_do(reports, clock):
    first, second = reports
    x = torch.zeros(2, 3, 1, 1)
    assert second.bar.disable and not first.bar.disable
    first.start_batch(0, 2)
    second.start_batch(2, 2)
    second.evaluation_done(x)
    first.evaluation_done(x)
    assert (first.bar.n, first.done, first.bar.total) == (4, 4, 40)
    second.evaluation_done(x)  # is told later, to spare the store
    first.tell()
    assert first.bar.n == 4
    clock[0] += 0.5
    second.evaluation_done(x)
    first.tell()
    assert first.bar.n == first.done == 8
    second.skip(5)
    second.tell()
    with pytest.warns(UserWarning, match="too many"):
        second.take_back_batch("too many")
    second.tell()
    first.tell()
    assert first.bar.n == 2  # its own
    assert (first.own, second.own) == (2, 6)


def test_the_estimate_counts_on_all_processes(reports, clock, capsys):
    first, second = reports
    x = torch.zeros(1, 3, 1, 1)
    for report, before in ((first, 0), (second, 1)):
        report.start_batch(before, 1)
    for _ in range(5):
        clock[0] += 2
        second.evaluation_done(x)
        first.evaluation_done(x)
    # 10 of 40 evaluations are done; one takes 2 seconds, and two are done at a time.
    assert capsys.readouterr().out == "[rank 0] about 30 s left (2 s per evaluation)\n"
