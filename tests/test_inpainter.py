"""The Python entry: what goes in, what comes out, and that it does what the command does."""

import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import factory, load_inpainter
from guided_diffusion.config import UserError
from guided_diffusion.denoiser import FiniteCheck, NonFiniteError
from guided_diffusion.gaussian_diffusion import ReverseStep
from guided_diffusion.images.files import load_prepared
from guided_diffusion.images.tensors import to_bytes
from guided_diffusion.inpainter import Inpainter
from guided_diffusion.run.records import load_state, save_state
from guided_diffusion.streams import SamplerState, Streams

ROOT = Path(__file__).parents[1]
CASE = ROOT / "tests" / "golden" / "e2e" / "resample"
OVERRIDES = (
    f"model_path={ROOT / 'tests' / 'golden' / 'tiny32.pt'}",
    "timestep_respacing='4'",
    "schedule_jump_params={t_T: 4, n_sample: 1, jump_length: 2, jump_n_sample: 2}",
)
EVALUATIONS = 6  # times 3 2 1 0, up to 2, and 1 0 again
SIZE = 32


def load(*overrides: str, device: str | None = "cpu") -> Inpainter:
    return load_inpainter(str(CASE / "conf.yml"), device, (*OVERRIDES, *overrides))


@pytest.fixture(scope="module")
def inpaint() -> Inpainter:
    return load()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.open(path) for path in sorted(CASE.glob("gts/*"))]


@pytest.fixture(scope="module")
def masks() -> list[Image.Image]:
    return [Image.open(path) for path in sorted(CASE.glob("masks/*"))]


@pytest.fixture(scope="module")
def results(inpaint, pictures, masks) -> list[Image.Image]:
    """Each picture by itself, image i from seed 7 + i."""
    pairs = zip(pictures, masks, strict=True)
    return [inpaint(picture, mask, seed=7 + i) for i, (picture, mask) in enumerate(pairs)]


def random_batch(number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(number, 3, SIZE, SIZE, generator=generator) * 2 - 1
    keep_masks = torch.rand(number, 1, SIZE, SIZE, generator=generator).round()
    return images, keep_masks


def assert_within_one_level(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    differences = np.abs(np.stack(ours).astype(int) - np.stack(theirs).astype(int))
    assert differences.max() <= 1 and (differences > 0).mean() < 0.001


# ---- Kinds ----


def test_tensors_in_tensors_out(inpaint):
    images, keep_masks = random_batch()
    before = images.clone(), keep_masks.clone()
    result = inpaint(images, keep_masks, seed=1)
    assert result.shape == images.shape
    assert result.dtype == torch.float32 and result.device.type == "cpu"
    assert result.isfinite().all() and not torch.equal(result[0], result[1])
    assert torch.equal(images, before[0]) and torch.equal(keep_masks, before[1])


def test_masks_of_one_and_of_three_channels_are_the_same(inpaint):
    images, keep_masks = random_batch()
    result = inpaint(images, keep_masks, seed=1)
    assert torch.equal(result, inpaint(images, keep_masks.repeat(1, 3, 1, 1), seed=1))


def test_the_channels_of_a_mask_are_kept_apart():
    inpaint = load("paste_known=true")
    images, _ = random_batch(1)
    red_alone = torch.zeros(1, 3, SIZE, SIZE)
    red_alone[:, 0] = 1
    result = inpaint(images, red_alone)
    assert torch.equal(result[:, 0], images[:, 0])
    assert not torch.isclose(result[:, 1:], images[:, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_tensors_of_another_precision_are_computed_with_in_fp32(inpaint, dtype):
    images, keep_masks = (tensor.to(dtype) for tensor in random_batch())
    result = inpaint(images, keep_masks, seed=1)
    assert result.dtype == torch.float32
    assert torch.equal(result, inpaint(images.float(), keep_masks.float(), seed=1))


def test_a_picture_in_a_picture_out(results):
    assert all(isinstance(result, Image.Image) for result in results)
    assert {(result.mode, result.size) for result in results} == {("RGB", (SIZE, SIZE))}


def test_lists_in_a_list_out(inpaint, pictures, masks, results):
    batch = inpaint(pictures, tuple(masks), seed=7)
    assert isinstance(batch, list)
    assert_within_one_level(batch, results)


def test_pictures_and_tensors_give_the_same(inpaint, pictures, masks, results):
    gt = np.asarray(pictures[0].convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    keep = np.asarray(masks[0].convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    result = inpaint(torch.from_numpy(gt)[None], torch.from_numpy(keep)[None], seed=7)
    np.testing.assert_array_equal(to_bytes(result)[0], np.asarray(results[0]))


def test_pictures_of_any_size_and_mode_are_prepared_like_files(inpaint, pictures, masks):
    large = pictures[0].convert("RGBA").resize((150, 90))
    result = inpaint(large, masks[0].convert("L").resize((70, 70)))
    assert (result.mode, result.size) == ("RGB", (SIZE, SIZE))


# ---- Seeds ----


def test_the_same_seed_gives_the_same_and_another_seed_does_not(inpaint):
    images, keep_masks = random_batch()
    result = inpaint(images, keep_masks, seed=1)
    assert torch.equal(result, inpaint(images, keep_masks, seed=1))
    assert not torch.isclose(result, inpaint(images, keep_masks, seed=3)).all()
    assert torch.equal(inpaint(images, keep_masks), inpaint(images, keep_masks, seed=0))


def test_image_i_of_a_batch_is_a_single_run_from_seed_plus_i(inpaint):
    images, keep_masks = random_batch(3)
    batch = inpaint(images, keep_masks, seed=40)
    for i in range(3):
        single = inpaint(images[i : i + 1], keep_masks[i : i + 1], seed=40 + i)
        torch.testing.assert_close(batch[i], single[0], atol=1e-3, rtol=0)


def test_samples_of_an_image_have_other_random_numbers():
    """Their seeds are 2³² apart, of which a generator must not take the lower bits alone."""
    streams = Streams([7 + sample * 2**32 for sample in range(4)])
    noise = streams.normal(torch.zeros(4, 3, 8, 8))
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 4


def test_the_command_writes_the_same_pictures(tmp_path, results):
    folders = {"srs": "inpainted", "lrs": "gt_masked", "gt_keep_masks": "gt_keep_mask"}
    paths = ", ".join(f"{key}: {tmp_path / name}" for key, name in folders.items())
    overrides = (
        *OVERRIDES,
        f"data.eval.resample.gt_path={CASE / 'gts'}",
        f"data.eval.resample.mask_path={CASE / 'masks'}",
        f"data.eval.resample.paths={{{paths}}}",
        "seed=7",
        "device=cpu",
    )
    sets = [word for override in overrides for word in ("--set", override)]
    argv = ["test.py", "--conf_path", str(CASE / "conf.yml"), *sets]
    with (
        patch.object(sys, "argv", argv),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        pytest.raises(SystemExit, match="^0$"),
    ):
        runpy.run_path(str(ROOT / "test.py"), run_name="__main__")
    written = sorted((tmp_path / "inpainted").glob("*.png"))
    assert len(written) == len(results) == 4
    for path, result in zip(written, results, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(result))


def test_no_seed_draws_one(inpaint):
    images, keep_masks = random_batch()
    first, second = (inpaint(images, keep_masks, seed=None) for _ in range(2))
    assert not torch.isclose(first, second).all()
    with patch("guided_diffusion.inpainter.secrets.randbelow", return_value=5):
        drawn = inpaint(images, keep_masks, seed=None)
    assert torch.equal(drawn, inpaint(images, keep_masks, seed=5))


@pytest.mark.parametrize("seed", [np.int64(9), np.uint8(9), torch.tensor(9)])
def test_whole_numbers_of_any_type_are_seeds(inpaint, seed):
    images, keep_masks = random_batch(1)
    assert torch.equal(inpaint(images, keep_masks, seed=seed), inpaint(images, keep_masks, seed=9))


@pytest.mark.parametrize(
    ("seed", "shown"),
    [
        (torch.Generator(), "a Generator"),
        (np.random.default_rng(0), "a Generator"),
        ([1, 2], "a list"),
        ("7", "'7'"),
        (7.0, "7.0"),
        (True, "True"),
        (-1, "-1"),
        (2**62, "4611686018427387904"),
    ],
)
def test_what_is_no_seed_is_refused_in_words(inpaint, seed, shown):
    images, keep_masks = random_batch(1)
    with pytest.raises(ValueError, match=f"seed is {shown}; accepted: a whole number") as error:
        inpaint(images, keep_masks, seed=seed)
    assert "None" in str(error.value) and "\n" not in str(error.value)


# ---- What is said of masks, as by the command ----


def told(inpaint: Inpainter, *arguments: object) -> list[str]:
    """The warnings of a call. Each is shown at the line of the call."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        inpaint(*arguments)
    assert all((w.category, w.filename) == (UserWarning, __file__) for w in record)
    return [str(warning.message) for warning in record]


HALF = np.repeat(np.arange(SIZE) < SIZE // 2, SIZE).reshape(SIZE, SIZE)  # True above
SLIGHT = np.repeat(np.arange(SIZE) < 4, SIZE).reshape(SIZE, SIZE)
COLOURED = np.where(HALF[..., None], (255, 0, 0), 255)
KINDS = {
    "good": (HALF * 255, None),
    "0 and 1": (HALF * 1, "are nowhere brighter than half of 255, so that nothing is kept"),
    "white": (HALF * 0 + 255, "keep everything (white all over)"),
    "black": (HALF * 0, "keep nothing (black all over)"),
    "grey": (HALF * 155 + 100, "have values between 0"),
    "little": (SLIGHT * 255, "keep less than a fifth of the picture; if white (255) means fill in"),
    "colour": (COLOURED, "are in colour, of which more or less may be kept than one sees"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["picture", "list", "tensor"])
def test_masks_that_may_be_meant_otherwise_are_told(inpaint, pictures, kind, given):
    pixels, words = KINDS[kind]
    mask = Image.fromarray(pixels.astype(np.uint8))
    if given == "tensor":
        keep = np.atleast_3d(pixels).transpose(2, 0, 1)[None] / np.float32(255)
        messages = told(inpaint, random_batch(1)[0], torch.from_numpy(keep).float())
    elif given == "list":
        good = Image.fromarray((HALF * 255).astype(np.uint8))
        messages = told(inpaint, pictures[:3], [good, mask, mask])
    else:
        messages = told(inpaint, pictures[0], mask)
    count = "2 of 3 masks, first mask 2, " if given == "list" else "1 of 1 masks, first mask 1, "
    assert [message[: len(count + (words or ""))] for message in messages] == (
        [count + words] if words else []
    )
    assert not any("gt_path" in message or "mask_convention" in message for message in messages)


def test_masks_of_another_size_are_told(inpaint, pictures):
    (message,) = told(
        inpaint, pictures[0].resize((96, 64)), Image.fromarray((HALF * 255).astype(np.uint8))
    )
    assert message.startswith(
        "1 of 1 images differ in size from their mask, first image 1 (96x64) and mask 1 (32x32)"
    )


# ---- Known pixels ----


def test_known_pixels_pasted_into_tensors():
    images, keep_masks = random_batch()
    plain = load()(images, keep_masks, seed=2)
    pasted = load("paste_known=true")(images, keep_masks, seed=2)
    known = (keep_masks == 1).expand_as(images)
    assert torch.equal(pasted[known], images[known])
    assert torch.equal(pasted[~known], plain[~known])


def test_known_pixels_pasted_into_pictures(pictures, masks, results):
    pasted = np.asarray(load("paste_known=true")(pictures[0], masks[0], seed=7))
    known = np.asarray(masks[0].convert("RGB")) == 255
    assert known.any() and not known.all()
    original = load_prepared(str(sorted(CASE.glob("gts/*"))[0]), SIZE)
    np.testing.assert_array_equal(pasted[known], original[known])
    np.testing.assert_array_equal(pasted[~known], np.asarray(results[0])[~known])


# ---- Progress ----


def test_progress_is_told_after_each_evaluation(inpaint):
    calls = []
    images, keep_masks = random_batch()
    inpaint(images, keep_masks, progress=lambda *call: calls.append(call))
    assert inpaint.evaluations == EVALUATIONS
    assert [call[:2] for call in calls] == [(i + 1, EVALUATIONS) for i in range(EVALUATIONS)]
    for _, _, x0 in calls:
        assert x0.shape == images.shape and x0.abs().max() <= 1
    assert not torch.equal(calls[0][2], calls[-1][2])


def test_watching_changes_nothing(inpaint, pictures, masks, results):
    calls = []
    watched = inpaint(pictures[0], masks[0], 7, lambda done, total, x0: calls.append(done))
    np.testing.assert_array_equal(np.asarray(watched), np.asarray(results[0]))
    assert calls == list(range(1, EVALUATIONS + 1))


# ---- Stopping, and going on ----


def changing_network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Depends on all that it is told, without sense."""
    time, label = (numbers.view(-1, 1, 1, 1) / 1000 for numbers in (t, y))
    noise = torch.tanh(1.3 * x + label) * (1 - time)
    return torch.cat([noise, torch.sin(5 * noise + time)], dim=1)


def sampled_with_states(inpaint: Inpainter, **sample: object) -> tuple[torch.Tensor, list]:
    """A result, and the sampler's state after each evaluation."""
    states = []
    x = inpaint.sample(**sample, after_evaluation=lambda now: states.append(now.state()))
    return x, states


@pytest.mark.parametrize("merge_known", ["true", "false"])
@pytest.mark.parametrize(
    "schedule",
    [
        "{t_T: 8, n_sample: 1, jump_length: 3, jump_n_sample: 3}",
        "{t_T: 8, n_sample: 2, jump_length: 1, jump_n_sample: 2, start_resampling: 3}",
        "null",
    ],
)
def test_from_any_state_the_sampler_goes_on_to_the_same_bits(monkeypatch, schedule, merge_known):
    monkeypatch.setattr(factory, "load_network", lambda *_: changing_network)
    monkeypatch.setattr(factory, "check_checkpoints", factory.build_networks)
    inpaint = load(
        *("class_cond=true", "timestep_respacing='8'", "inpa_inj_time_shift=0"),
        *(f"schedule_jump_params={schedule}", f"inpa_inj_sched_prev={merge_known}"),
    )
    ups = [u > t for t, u in pairwise(inpaint.times)]
    assert any(ups) == (schedule != "null")
    gt, keep_mask = random_batch(3)
    batch = {"gt": gt, "keep_mask": keep_mask, "seeds": [7, 100, 8]}
    whole, states = sampled_with_states(inpaint, **batch)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 3
    # Every downward transition is followed by a state.
    assert [state.position - 1 for state in states] == [i for i, up in enumerate(ups) if not up]
    for done, state in enumerate(states, start=1):
        rest, later = sampled_with_states(inpaint, **batch, resume=state)
        assert torch.equal(rest, whole)
        assert inpaint.evaluations_before(state) == done
        assert len(later) == inpaint.evaluations - done
    # What a state holds is its own: going on from it changes neither it nor another.
    assert torch.equal(inpaint.sample(**batch, resume=states[0]), whole)


def test_a_state_on_disk_is_as_good(inpaint, tmp_path):
    gt, keep_mask = random_batch(2)
    batch = {"gt": gt, "keep_mask": keep_mask, "seeds": [1, 2]}
    whole, states = sampled_with_states(inpaint, **batch)
    assert len(states) == EVALUATIONS
    for state in states:
        save_state(str(tmp_path / "state.pt"), vars(state))
        loaded = SamplerState(**load_state(str(tmp_path / "state.pt")))
        assert torch.equal(inpaint.sample(**batch, resume=loaded), whole)


def test_what_is_raised_after_an_evaluation_stops_the_sampler(inpaint):
    calls = []

    def stop_after_two(evaluation) -> None:
        calls.append(evaluation.position)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inpaint.sample(*random_batch(1), [0], after_evaluation=stop_after_two)
    assert calls == [1, 2]


# ---- What is not finite ----


class FailingNetwork:
    """Puts out zeros, and in one evaluation a value that is none, in some images."""

    def __init__(self, value: float, images: list[int], channel: int, evaluation: int):
        self.value, self.images, self.channel = value, images, channel
        self.evaluation, self.evaluations = evaluation, 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.evaluations += 1
        output = torch.zeros(len(x), 6, SIZE, SIZE)
        if self.evaluations == self.evaluation:
            output[self.images, self.channel, 3, 4] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 5])  # of the noise, of the variance
@pytest.mark.parametrize(("images", "evaluation"), [([1], 1), ([0, 2], 4), ([2], EVALUATIONS)])
def test_what_is_not_finite_stops_the_sampler_at_once(
    monkeypatch, value, channel, images, evaluation
):
    network = FailingNetwork(value, images, channel, evaluation)
    monkeypatch.setattr(factory, "load_network", lambda *_: network)
    inpaint, calls = load(), []
    steps = [t for t, u in pairwise(inpaint.times) if u < t]
    with pytest.raises(NonFiniteError) as error:
        inpaint(*random_batch(3), progress=lambda *call: calls.append(call))
    assert list(error.value.images) == images
    assert error.value.step == steps[evaluation - 1]
    assert f"step {error.value.step}, in images {images}" in str(error.value)
    assert network.evaluations == evaluation
    assert len(calls) == evaluation - 1


def test_a_network_that_stays_finite_runs_to_the_end(monkeypatch):
    network = FailingNetwork(float("nan"), [0], 0, EVALUATIONS + 1)
    monkeypatch.setattr(factory, "load_network", lambda *_: network)
    assert load()(*random_batch(3)).isfinite().all()
    assert network.evaluations == EVALUATIONS


class FakeGpu:
    """A GPU whose answers arrive no sooner than they are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        gpu = self
        self.on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.events = self.waits = 0

        class Tensor(torch.Tensor):
            is_cuda = True

        class PinnedTensor(torch.Tensor):
            def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
                assert non_blocking
                gpu.on_the_way.append((self, source))

        class Event:
            def record(self) -> None:
                self.copies, gpu.on_the_way = gpu.on_the_way, []
                gpu.events += 1

            def synchronize(self) -> None:
                gpu.waits += 1
                for copy, source in self.copies:
                    plain, arrived = (tensor.as_subclass(torch.Tensor) for tensor in (copy, source))
                    plain.copy_(arrived)

        plain_empty_like = torch.empty_like

        def empty_like(tensor: torch.Tensor, **options: object) -> torch.Tensor:
            if not options:
                return plain_empty_like(tensor)
            assert options == {"device": "cpu", "pin_memory": True}
            return torch.zeros(tensor.shape, dtype=tensor.dtype).as_subclass(PinnedTensor)

        self.tensor = Tensor
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch, "empty_like", empty_like)

    def denoiser(self, images: list[int], step: int) -> Callable:
        """Gives what is not finite in these images at this step."""

        def denoise(x_t: torch.Tensor, t: int) -> ReverseStep:
            mean = torch.zeros(x_t.shape)
            if t == step:
                mean[images, 0, 1, 2] = torch.nan
            mean = mean.as_subclass(self.tensor)
            return ReverseStep(mean, torch.zeros(1, 1, 1, 1), mean)

        return denoise


@pytest.mark.parametrize(("step", "last"), [(9, 7), (5, 3), (2, 0), (1, None), (0, None)])
def test_on_a_gpu_the_answer_is_awaited_later(monkeypatch, step, last):
    """last: the step with which the sampler finds out, two evaluations on; None: at the end."""
    gpu = FakeGpu(monkeypatch)
    check = FiniteCheck(gpu.denoiser([0, 2], step))
    with pytest.raises(NonFiniteError) as error:
        for t in range(9, -1, -1):
            check(torch.zeros(3, 3, 4, 4), t)
            assert gpu.events - gpu.waits <= 2
            assert gpu.waits == max(0, gpu.events - 2)
        t = None
        check.finish()
    assert t == last
    assert (list(error.value.images), error.value.step) == ([0, 2], step)


def test_on_a_gpu_all_answers_are_looked_at_in_the_end(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    check = FiniteCheck(gpu.denoiser([0], step=-1))
    for t in range(9, -1, -1):
        check(torch.zeros(3, 3, 4, 4), t)
    check.finish()
    assert gpu.events == gpu.waits == 10


def test_on_a_gpu_the_sampler_looks_at_the_last_answers_too(monkeypatch, inpaint):
    denoise = FakeGpu(monkeypatch).denoiser([1], step=0)
    calls = []
    with pytest.raises(NonFiniteError, match=r"step 0, in images \[1\]"):
        monkeypatch.setattr(inpaint, "denoiser", lambda x_t, t, y: denoise(x_t, t))
        monkeypatch.setattr(inpaint, "times", range(4, -2, -1))
        inpaint(*random_batch(3), progress=lambda *call: calls.append(call))
    assert len(calls) == 5


# ---- What does not fit ----

IMAGES, MASKS = torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 1, SIZE, SIZE)
PICTURE = Image.new("RGB", (SIZE, SIZE))
MISFITS = {
    "no batch": (IMAGES[0], MASKS, r"images are \(3, 32, 32\), not \(B, 3, 32, 32\)"),
    "a number": (torch.tensor(0.0), MASKS, r"images are \(\)"),
    "empty batch": (IMAGES[:0], MASKS[:0], r"images are \(0, 3, 32, 32\)"),
    "grey images": (MASKS, MASKS, r"images are \(2, 1, 32, 32\)"),
    "another size": (torch.zeros(2, 3, 64, 64), MASKS, r"not \(B, 3, 32, 32\)"),
    "fewer masks": (IMAGES, MASKS[:1], r"keep masks are \(1, 1, 32, 32\), not \(2, 1 or 3, 32, 32"),
    "flat masks": (IMAGES, MASKS[:, 0], r"keep masks are \(2, 32, 32\)"),
    "two channels": (IMAGES, IMAGES[:, :2], r"keep masks are \(2, 2, 32, 32\)"),
    "bytes": (IMAGES.byte(), MASKS, r"images must be float numbers in \[-1, 1\]"),
    "0 to 255": (IMAGES + 255, MASKS, r"images must be float numbers in \[-1, 1\]"),
    "not a number": (IMAGES + float("nan"), MASKS, r"images must be float"),
    "mask above 1": (IMAGES, MASKS + 1.5, r"keep masks must be float numbers in \[0, 1\]"),
    "mask below 0": (IMAGES, MASKS - 1, r"keep masks must be float numbers in \[0, 1\]"),
    "boolean mask": (IMAGES, MASKS.bool(), r"keep masks must be float numbers in \[0, 1\]"),
    "mask of another kind": (IMAGES, PICTURE, "so the keep masks must be one too"),
    "no pictures": ([], [], "0 images and 0 keep masks"),
    "two masks": ([PICTURE], [PICTURE, PICTURE], "1 images and 2 keep masks"),
    "one mask": ([PICTURE], PICTURE, "keep masks must be PIL images .* two lists"),
    "a tensor mask": (PICTURE, MASKS, "keep masks must be"),
    "paths": ("x.png", "mask.png", "images must be PIL images"),
    "arrays": (
        np.zeros((2, 32, 32, 3)),
        np.zeros((2, 32, 32, 3)),
        "images must be PIL images .*fromarray",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_a_value_error(inpaint, case):
    images, keep_masks, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        inpaint(images, keep_masks)


# ---- Loading ----


def test_the_device_given_wins_over_the_config():
    assert load("device=cuda:99").diffusion.device == torch.device("cpu")


@pytest.mark.parametrize("overrides", [["device=cuda:99"], []])
def test_a_device_that_is_absent_is_a_user_error(overrides):
    with pytest.raises(UserError, match="cuda:99 was asked for"):
        load(*overrides, device=None if overrides else "cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(pictures, masks):
    result = load(device="cuda")(pictures[0], masks[0])
    assert (result.mode, result.size) == ("RGB", (SIZE, SIZE))


def test_a_config_without_data_is_enough(tmp_path):
    lines = (CASE / "conf.yml").read_text().splitlines()
    without_data = lines[: lines.index("data:")]
    (tmp_path / "conf.yml").write_text("\n".join(without_data))
    images, keep_masks = random_batch(1)
    result = load_inpainter(str(tmp_path / "conf.yml"), "cpu", OVERRIDES)(images, keep_masks)
    assert torch.equal(result, load()(images, keep_masks))


def test_a_mistake_in_the_config_is_a_user_error():
    with pytest.raises(UserError, match="nearest known key is seed"):
        load("sede=1")


@pytest.mark.slow
def test_importing_the_package_does_not_import_torch():
    code = "import sys, guided_diffusion; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


def test_the_package_has_no_other_names():
    with pytest.raises(ImportError):
        from guided_diffusion import nothing_of_this_name  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_huge_pages_are_asked_for_unless_the_user_says_otherwise(given, expected):
    code = "import guided_diffusion, os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | given
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == expected
