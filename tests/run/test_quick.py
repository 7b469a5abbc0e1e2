"""Runs of `test.py` with the quick sampler: what holds for RePaint's runs holds for these."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import load_inpainter
from guided_diffusion.config import UserError, load_config
from guided_diffusion.factory import build_times
from guided_diffusion.gaussian_diffusion import ReverseStep
from guided_diffusion.scheduler import levels_of
from tests.support.case import Case, assert_same
from tests.support.small_runs import assert_refused, evaluations, one_thread, states

EVALUATIONS = 16  # the least that is accepted


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own() -> Iterator[None]:
    with one_thread():
        yield


def quick_case(folder: Path, images: int = 2, **keys: object) -> Case:
    case = Case(folder, images)
    del case.config["schedule_jump_params"]
    case.config |= {"sampler": "langevin", "evaluations": EVALUATIONS, "seed": 3, **keys}
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Case:
    """An undisturbed run."""
    case = quick_case(tmp_path_factory.mktemp("whole"), log_every=5)
    with one_thread(), evaluations() as sizes:
        case.result = case.run()
    case.each = len(sizes) // 2  # evaluations of an image
    return case


# ---- A run -----------------------------------------------------------------------------------


def test_it_costs_what_was_asked_for_and_the_plan_says_how(whole):
    times = build_times(load_config(whole.conf_path()))
    assert (whole.result.status, whole.result.lines("error")) == (0, [])
    assert EVALUATIONS - 1 <= whole.each <= EVALUATIONS and len(times) - 1 == whole.each
    assert whole.record()["evaluations_per_image"] == whole.each
    levels = len(set(times)) - 1
    assert f"sampler langevin: {levels} noise levels (σ " in whole.result.out
    assert f"{whole.each - levels} Langevin steps between them\n" in whole.result.out


def test_known_pixels_come_out_byte_for_byte_and_the_hole_is_new(whole):
    written, inputs, masks = (whole.written(kind) for kind in ("inpainted", "gt", "gt_keep_mask"))
    assert len(written) == 2
    for name, mask in masks.items():
        original = np.asarray(Image.open(whole.folder / "gts" / name))
        np.testing.assert_array_equal(written[name][mask == 255], original[mask == 255])
        assert (written[name] != inputs[name])[mask == 0].mean() > 0.9


@pytest.mark.parametrize("at", [1, 7, EVALUATIONS - 1])
def test_a_stopped_picture_goes_on_where_it_was(whole, tmp_path, at):
    case = quick_case(tmp_path, log_every=5)
    with evaluations(at, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert case.run().status == 128 + signal.SIGTERM
    assert len(states(case)) == 1
    with evaluations() as rest:
        assert_same(case.finish(), whole.written())
    assert at + len(rest) == 2 * whole.each


def test_the_film_shows_the_noise_as_sigma(whole):
    frames = sorted((whole.out / "process").rglob("*_xt.png"))
    assert len(frames) == 2 * 3  # of two pictures, after 5, 10 and 15 evaluations
    assert load_inpainter(whole.conf_path()).noise_words[999] == "sigma 1.6e+02"


def test_samples_differ_and_are_those_of_their_seeds(tmp_path):
    case = quick_case(tmp_path, images=1, samples_per_image=2)
    first, second = case.finish().values()
    assert (first != second).any()
    image, mask = (Image.open(next((tmp_path / kind).iterdir())) for kind in ("gts", "masks"))
    alone = load_inpainter(case.conf_path())(image, mask, seed=3 + 2**32)
    np.testing.assert_array_equal(second, np.asarray(alone))


def test_photos_of_any_size(tmp_path):
    case = quick_case(tmp_path, images=1)
    case.dataset["fit"] = "region"
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    mask = np.full((50, 70), 255, np.uint8)
    mask[20:26, 30:40] = 0
    (name,) = [path.name for path in (tmp_path / "gts").iterdir()]
    Image.fromarray(photo).save(tmp_path / "gts" / name)
    Image.fromarray(mask).save(tmp_path / "masks" / name)
    result = case.finish()[name]
    np.testing.assert_array_equal(result[mask == 255], photo[mask == 255])
    assert (result != photo)[mask == 0].any()


def test_it_may_start_from_a_picture(tmp_path):
    case = quick_case(tmp_path, images=1, start_from={"t": 400})
    with evaluations() as sizes:
        (started,) = case.finish().values()
    levels = levels_of(load_config(case.conf_path()))
    assert levels[0].step <= 400 and len(sizes) == len(levels) - 1 < EVALUATIONS
    del case.config["start_from"]
    (plain,) = case.finish().values()
    assert (started != plain).any()


# ---- From Python -----------------------------------------------------------------------------


def test_the_python_entry_gives_the_commands_pixels(whole):
    inpaint = load_inpainter(whole.conf_path())
    paths = sorted((whole.folder / "gts").iterdir())
    images = [Image.open(path) for path in paths]
    masks = [Image.open(whole.folder / "masks" / path.name) for path in paths]
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        found = np.asarray(inpaint(image, mask, seed=3 + i))
        np.testing.assert_array_equal(found, whole.written()[paths[i].name])


def test_an_image_does_not_depend_on_its_batch(whole):
    inpaint = load_inpainter(whole.conf_path())
    inpaint.denoiser = with_neighbours(inpaint.diffusion)
    generator = np.random.default_rng(1)
    gt = torch.from_numpy(generator.uniform(-1, 1, (3, 3, 32, 32))).float()
    keep = torch.zeros_like(gt)
    keep[..., :16] = 1
    together = inpaint.sample(gt, keep, [5, 6, 7])
    alone = inpaint.sample(gt[1:2], keep[1:2], [6])
    assert torch.equal(together[1:2], alone)


def with_neighbours(diffusion):
    """A denoiser that computes each image by itself: x_0 is a blur of x_t."""

    def denoise(x_t, t, y):
        x0 = ((x_t + x_t.roll(1, -1)) / 2).clamp(-1, 1)
        return ReverseStep(x0, x0.new_zeros(()), x0)

    return denoise


# ---- The config ------------------------------------------------------------------------------


def test_on_the_command_line_it_takes_the_place_of_the_files_schedule(tmp_path):
    """So that one --set is enough for every published config."""
    case = Case(tmp_path, images=1)
    assert "schedule_jump_params" in case.config
    config = load_config(case.conf_path(), ["sampler=langevin"])
    assert config.schedule is None and config.langevin.evaluations == 48
    assert config.diffusion.timestep_respacing == ""
    result = case.run("--set", "sampler=langevin", "--dry-run")
    assert result.status == 0 and "48 network evaluations per image" in result.out


BAD = {
    "with jumps": ({"schedule_jump_params": {"t_T": 3}}, r"schedule_jump_params: found a map; acc"),
    "too few": ({"evaluations": 15}, "evaluations: found 15; accepted: a whole number from 16 to"),
    "too many": ({"evaluations": 501}, "evaluations: found 501; accepted: "),
    "other sampler": ({"sampler": "euler"}, "sampler: found euler; accepted: repaint or langevin"),
    "for repaint": ({"sampler": "repaint"}, "evaluations: found 16; accepted: no such key without"),
    "DDIM": ({"use_ddim": True}, "use_ddim: found true; accepted: false with sampler: langevin"),
    "levels": (
        {"langevin": {"levels": 1001}},
        "langevin.levels: found 1001; accepted: at most 1000",
    ),
    "sigmas": (
        {"langevin": {"sigma_min": 3, "sigma_max": 2}},
        "langevin.sigma_min: found 3; accepted: a number below langevin.sigma_max, 2",
    ),
    "inner": (
        {"langevin": {"inner_from": 9}},
        "langevin.inner_from: found 9; accepted: a number below langevin.inner_to, 6",
    ),
    "latent": ({"method": "latent"}, "method: latent has a sampler of its own"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_one_line(tmp_path, name):
    keys, expected = BAD[name]
    case = quick_case(tmp_path, images=1)
    case.config |= keys
    if name == "latent":
        case.config = {k: v for k, v in case.config.items() if k in ("data", "model_path")} | {
            "method": "latent",
            "sampler": "langevin",
        }
    assert re.search(re.escape(expected), assert_refused(case.run()))
    assert not case.out.exists()


def test_jumps_on_the_command_line_beside_it_are_refused(tmp_path):
    case = Case(tmp_path, images=1)
    overrides = ["sampler=langevin", "schedule_jump_params.t_T=2"]
    with pytest.raises(UserError, match="schedule_jump_params"):
        load_config(case.conf_path(), overrides)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_any_base_process_will_do(tmp_path, schedule, steps):
    case = quick_case(tmp_path, images=1, noise_schedule=schedule, diffusion_steps=steps)
    del case.config["timestep_respacing"]
    levels = levels_of(load_config(case.conf_path()))
    assert 10 < levels[0].sigma < 22 and levels[-2].sigma < 0.2
    assert len(levels) - 1 in (EVALUATIONS - 1, EVALUATIONS)
