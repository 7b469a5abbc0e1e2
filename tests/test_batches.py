"""Batches: how many images are worked on at once, and what happens when they are too many.

The networks are fakes on the CPU that run out of memory as a GPU does. A fake paints each image in
the grey of its seed, so that a written picture tells which random stream it got.
"""

import contextlib
import io
import json
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import yaml
from PIL import Image

from guided_diffusion import memory, progress, runner
from guided_diffusion.accel import Speed
from guided_diffusion.config import UserError, load_config
from guided_diffusion.denoiser import NonFiniteError
from guided_diffusion.progress import ProgressReport
from guided_diffusion.scheduler import plain_times

SIZE = 32
EVALUATIONS = 10
SEED = 100
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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

    @property
    def diffusion(self) -> SimpleNamespace:
        return SimpleNamespace(device=self.device)

    @property
    def sizes(self) -> list[int]:
        return [len(seeds) for seeds in self.seeds]

    def sample(self, gt, keep_mask, seeds, progress):
        assert gt.shape == keep_mask.shape == (len(seeds), 3, SIZE, SIZE)
        self.seeds.append(list(seeds))
        room = self.room(len(self.seeds) - 1)
        for done in range(EVALUATIONS):
            if len(seeds) > room and done == self.fails_after:
                self.fail()
            progress(done + 1, EVALUATIONS, gt)
        return torch.stack([torch.full((3, SIZE, SIZE), s / 127.5 - 1) for s in seeds])

    def fail(self) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@dataclass(frozen=True)
class Folder:
    """Some images, and the results of runs over them."""

    path: Path

    def plan(self, images: int, device=CPU, **keys: object) -> runner.Plan:
        (self.path / "gts").mkdir()
        for i in range(images):
            Image.new("RGB", (SIZE, SIZE), "red").save(self.path / "gts" / f"{i}.png")
        mask = Image.new("L", (SIZE, SIZE), 255)
        mask.paste(0, (0, 0, SIZE // 2, SIZE))
        mask.save(self.path / "mask.png")
        (self.path / "weights.pt").write_bytes(b"weights")
        return runner.make_plan(self.config(**keys), plain_times(EVALUATIONS), device)

    def config(self, show_progress: bool = False, **dataset: object):
        outputs = {"srs": "results", "lrs": "gt_masked", "gt_keep_masks": "masks_used"}
        dataset |= {"gt_path": str(self.path / "gts"), "mask_path": str(self.path / "mask.png")}
        dataset["paths"] = {key: str(self.path / "out" / name) for key, name in outputs.items()}
        config = {
            "image_size": SIZE,
            "channel_mult": "1,2",
            "timestep_respacing": str(EVALUATIONS),
            "model_path": str(self.path / "weights.pt"),
            "seed": SEED,
            "show_progress": show_progress,
            "data": {"eval": {"some": dataset}},
        }
        (self.path / "conf.yml").write_text(yaml.safe_dump(config))
        return load_config(self.path / "conf.yml")

    def streams(self) -> dict[str, int]:
        """Name -> seed, of the results that are written."""
        paths = sorted((self.path / "out" / "results").glob("*.png"))
        pictures = {path.name: Image.open(path).getextrema() for path in paths}
        assert all(len(set(sum(extrema, ()))) == 1 for extrema in pictures.values())
        return {name: extrema[0][0] for name, extrema in pictures.items()}

    def record(self) -> dict:
        return json.loads((self.path / "out" / "run.json").read_text())


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def expected_streams(images: int) -> dict[str, int]:
    return {f"{i}.png": SEED + i for i in range(images)}


def run(plan: runner.Plan, inpainter: FakeInpainter) -> list[str]:
    """Run to the end; the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.run(plan, inpainter, Speed())
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
    plan, inpainter = folder.plan(images, **keys), FakeInpainter()
    assert run(plan, inpainter) == []
    assert inpainter.sizes == sizes
    assert folder.streams() == expected_streams(sum(sizes)) and plan.images == sum(sizes)
    assert plan.total_evaluations == EVALUATIONS * sum(sizes)
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
        def sample(self, gt, *arguments):
            free.append([reference() is None for reference in held])
            held.append(weakref.ref(gt))
            return super().sample(gt, *arguments)

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


@pytest.mark.parametrize(
    ("precision", "offered", "remedy"),
    [
        ("fp32", ["fp32", "bf16"], "set precision: bf16 (half the memory), or device: cpu"),
        ("tf32", ["tf32", "bf16", "fp16"], "set precision: bf16 or fp16 (half the memory), or"),
        ("bf16", ["fp32", "bf16"], "memory for one image; set device: cpu"),
    ],
)
def test_a_single_image_that_does_not_fit_ends_the_run(folder, precision, offered, remedy):
    inpainter = FakeInpainter(lambda attempt: 2 if attempt == 0 else 0)
    with (
        patch.object(runner, "offered_precisions", lambda device: offered),
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(UserError) as error,
    ):
        warnings.simplefilter("always")
        runner.run(folder.plan(4, batch_size=2), inpainter, Speed(precision))
    assert str(error.value).startswith("cpu has not enough memory for one image; ")
    assert remedy in str(error.value)
    assert len(caught) == 1 and inpainter.sizes == [2, 2, 1]
    assert folder.streams() == expected_streams(2)
    assert folder.record()["finished"] is False


# ---- What the bar and the estimate say ----


def test_what_a_failed_batch_did_is_taken_back_from_the_bar(folder, capsys):
    plan = folder.plan(3, batch_size=3, show_progress=True)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        runner.run(plan, FakeInpainter(always(1), fails_after=7), Speed())
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.match(r"image 3 of 3: 100%\|.*\| 30/30 \[", last), last


def test_the_bar_counts_every_image_of_a_batch_once():
    x = torch.zeros(1, 3, 1, 1)
    with contextlib.redirect_stderr(io.StringIO()), ProgressReport(4, 5, True) as report:
        report.start_batch(0, 3)
        for done in (1, 2):
            report.evaluation_done(done, 5, x)
        assert report.bar.n == report.done == 6 and report.bar.desc == "image 1-3 of 4: "
        with pytest.warns(UserWarning, match="too many"):
            report.take_back_batch("too many")
        assert report.bar.n == report.done == 0
        report.start_batch(0, 1)
        report.evaluation_done(1, 5, x)
        assert report.bar.n == report.done == 1 and report.bar.desc == "image 1 of 4: "
        assert report.bar.total == 20


def test_a_batch_that_fails_at_once_takes_nothing_back():
    x = torch.zeros(1, 3, 1, 1)
    with contextlib.redirect_stderr(io.StringIO()), ProgressReport(4, 1, True) as report:
        report.start_batch(0, 2)
        report.evaluation_done(1, 1, x)
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
        ProgressReport(4, 5, True) as report,
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

        def sample(self, gt, keep_mask, seeds, progress):
            def tick(*arguments):
                clock[0] += 1 if len(seeds) == 1 else len(seeds) / 2
                progress(*arguments)

            return super().sample(gt, keep_mask, seeds, tick)

    with patch.object(progress.time, "monotonic", lambda: clock[0]):
        run(folder.plan(2, batch_size=2), Timed(always(1), fails_after=6))
    # Five calls of two images out of 20 evaluations leave 10; then five of one image leave 15.
    assert capsys.readouterr().out.splitlines() == [
        "about 5 s left (0.5 s per evaluation)",
        "about 15 s left (1 s per evaluation)",
    ]


def test_the_estimate_does_not_mix_batches_that_failed_with_others(folder, capsys):
    clock = [0.0]

    class Timed(FakeInpainter):
        def sample(self, gt, keep_mask, seeds, progress):
            def tick(*arguments):
                clock[0] += 100 if len(seeds) > 1 else 1
                progress(*arguments)

            return super().sample(gt, keep_mask, seeds, tick)

    with patch.object(progress.time, "monotonic", lambda: clock[0]):
        run(folder.plan(2, batch_size=2), Timed(always(1), fails_after=3))
    assert capsys.readouterr().out == "about 15 s left (1 s per evaluation)\n"


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
    plan = folder.plan(3, batch_size="auto")
    assert plan.batch_size == 1
    assert "batch size 1 (auto)\n" in plan.describe(CPU, Speed())
    assert runner.fit_batch_size(plan, FakeInpainter()) == plan


@pytest.mark.parametrize(("images", "size"), [(200, 80), (12, 12)])
def test_auto_is_measured_on_cuda_with_the_first_step_of_the_run(folder, images, size):
    plan = folder.plan(images, CUDA, batch_size="auto")
    assert plan.batch_size == "auto"
    assert "batch size auto\n" in plan.describe(CUDA, Speed())
    steps = []

    class Measured(FakeInpainter):
        def sample(self, gt, keep_mask, seeds, progress=None):
            assert gt.shape == keep_mask.shape == (len(seeds), 3, SIZE, SIZE)
            steps.append((len(seeds), self.times))
            gpu.evaluate(len(seeds))
            raise NonFiniteError([0], self.times[0])  # memory is what counts here

    with FakeGpu(10_000).in_place() as gpu:
        fitted = runner.fit_batch_size(plan, Measured(device=CUDA))
    assert fitted.batch_size == size and fitted.pairs == plan.pairs
    assert steps == [(2, (EVALUATIONS - 1, -1)), (1, (EVALUATIONS - 1, -1))]
    assert f"batch size {size} (auto)\n" in fitted.describe(CUDA, Speed())


def test_a_number_is_not_measured(folder):
    plan = folder.plan(3, CUDA, batch_size=2)
    assert runner.fit_batch_size(plan, FakeInpainter()) is plan
    assert "batch size 2\n" in plan.describe(CUDA, Speed())


# ---- What was chosen, and why ----


def test_speed_and_batch_size_are_told_and_recorded(folder):
    speed = Speed("bf16", compile=True, cuda_graph=False, reason="fast: it is")
    plan = folder.plan(3, batch_size=2)
    assert plan.describe(CPU, speed).endswith("\ndevice cpu, bf16, compiled (fast: it is)")
    runner.run(plan, FakeInpainter(), speed)
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
        patch.object(runner, "offered_precisions", lambda device: ["fp32", "bf16", "fp16"]),
        pytest.raises(UserError) as error,
    ):
        runner.run(folder.plan(4, batch_size=2), inpainter, speed)
    message = str(error.value)
    assert message.startswith(named) and "not finite" in message and message.endswith(remedy)
    assert "at step 6, after 4 of 10 evaluations" in message
    assert inpainter.sizes == [2, 2]
    assert folder.streams() == expected_streams(2)
    assert folder.record()["finished"] is False
