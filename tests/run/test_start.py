"""Starting from a picture: the part of the walk, the sampler, the config, the plan, the command."""

import hashlib
import json
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageOps

from guided_diffusion import load_inpainter
from guided_diffusion.config import (
    DatasetConfig,
    ScheduleConfig,
    StartConfig,
    UserError,
    load_config,
    to_yaml_dict,
)
from guided_diffusion.factory import build_times
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep, beta_schedule
from guided_diffusion.images.pairs import Pair, find_pairs
from guided_diffusion.images.regions import Region, cut_start
from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.repaint import repaint
from guided_diffusion.run.plan import from_json, to_json
from guided_diffusion.run.records import Origin, Records, load_state
from guided_diffusion.run.worker import load
from guided_diffusion.scheduler import (
    count_evaluations,
    jump_times,
    plain_times,
    schedules_of,
    times_from,
)
from guided_diffusion.streams import Known, Streams
from tests.exact_gaussian import DATA, PIXELS, SIDE, BalancedNoise, ideal_network, new_diffusion
from tests.support.case import EVALUATIONS, GOLDEN, SIZE, Case
from tests.support.checks import load_pair
from tests.support.plans import NAMES
from tests.support.plans import Case as PlanCase
from tests.support.schedules import schedules
from tests.support.small_runs import assert_refused, evaluations, one_thread, outputs, states

# ---- The part of the walk ---------------------------------------------------------------------

# Jumps of two up from 2 and from 0, once each.
WALK = jump_times(ScheduleConfig(t_T=6, n_sample=1, jump_length=2, jump_n_sample=2))


def test_the_walk_that_is_cut_below():
    assert WALK == [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (5, WALK),
        (4, [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]),
        (3, [3, 2, 3, 2, 1, 0, 1, 2, 1, 0, -1]),  # the first jump ends at 3
        (2, [2, 1, 0, 1, 2, 1, 0, -1]),  # the first jump is gone
        (1, [1, 0, 1, 0, -1]),  # the second one ends at 1
        (0, [0, -1]),
    ],
)
def test_a_walk_cut_by_hand(t, expected):
    assert times_from(WALK, t) == expected


def test_several_jumps_above_t_leave_nothing():
    """Each of four visits to 1 goes up to 3 and back."""
    walk = [3, 2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 0, -1]
    assert times_from(walk, 1) == [1, 0, -1]
    assert times_from(walk, 2) == [2, 1, 2, 1, 2, 1, 2, 1, 0, -1]


def test_without_a_schedule_the_walk_is_shorter():
    assert times_from(plain_times(100), 3) == [3, 2, 1, 0, -1]


@settings(max_examples=100, deadline=None)
@given(schedules)
def test_every_cut_walks_in_single_steps_from_t_to_the_end(params):
    times = jump_times(params)
    assert times_from(times, params.t_T - 1) == times
    for t in range(params.t_T):
        cut = times_from(times, t)
        assert cut[0] == max(cut) == t and cut[-2:] == [0, -1]
        assert all(abs(a - b) == 1 for a, b in pairwise(cut))
        for level in range(t):  # below t nothing is lost: each transition is walked as often
            pairs = (level, level + 1), (level + 1, level)
            assert [[*pairwise(cut)].count(pair) for pair in pairs] == [
                [*pairwise(times)].count(pair) - (pair == (t + 1, t)) for pair in pairs
            ]


# ---- The sampler, where the truth is known ----------------------------------------------------

PICTURE = np.linspace(-1, 1, PIXELS)  # far from what the data look like
BATCH = BalancedNoise.BATCH


def batch_of(row: np.ndarray, number: int = BATCH) -> torch.Tensor:
    return (
        torch.from_numpy(row.astype(np.float32)).expand(number, PIXELS).reshape(-1, 1, SIDE, SIDE)
    )


def started(t: int, streams: BalancedNoise | Streams, number: int = BATCH) -> np.ndarray:
    """Free samples of Gaussian data that start from PICTURE, (number, PIXELS) float64."""
    diffusion = new_diffusion()
    picture = batch_of(PICTURE, number)
    x_t = diffusion.q_sample(picture, t, streams.normal(picture))
    times = times_from(plain_times(250), t)
    drawn = repaint(ideal_network(DATA, diffusion), diffusion, times, x_t, streams)
    return drawn.flatten(1).numpy().astype(np.float64)


def truth(t: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_0 if x_t ~ q(x_t | PICTURE) and then x_0 ~ p(x_0 | x_t)."""
    abar, eye = new_diffusion().alphas_cumprod[t], np.eye(PIXELS)
    gain = np.sqrt(abar) * DATA.cov @ np.linalg.inv(abar * DATA.cov + (1 - abar) * eye)
    mean = DATA.mean + np.sqrt(abar) * gain @ (PICTURE - DATA.mean)
    remaining = DATA.cov - np.sqrt(abar) * gain @ DATA.cov
    return mean, (1 - abar) * gain @ gain.T + remaining


@pytest.mark.parametrize("t", [0, 3, 40, 120, 249])
def test_a_noised_and_denoised_picture_has_the_moments_of_the_closed_form(t):
    """The means exactly; the covariance but for what steps with variances pixel by pixel cost."""
    mean, cov = truth(t)
    rows = started(t, BalancedNoise(0))
    np.testing.assert_allclose(rows.mean(axis=0), mean, atol=1e-4)
    found = np.cov(rows.T, bias=True)
    assert np.linalg.norm(found - cov) < 0.03 * np.linalg.norm(DATA.cov)


def test_a_low_t_keeps_the_picture_and_a_high_one_the_data_alone():
    distances = [
        [np.abs(rows.mean(axis=0) - other).max() for other in (PICTURE, DATA.mean)]
        for rows in (started(t, BalancedNoise(0)) for t in (0, 60, 249))
    ]
    to_picture, to_data = zip(*distances, strict=True)
    assert to_picture[0] < 0.002 and to_data[2] < 0.01
    assert to_picture[0] < to_picture[1] < to_picture[2]
    assert to_data[0] > to_data[1] > to_data[2]


def test_from_the_top_it_is_a_plain_run_but_for_what_is_left_of_the_picture():
    diffusion, streams = new_diffusion(), Streams(range(4))
    noise = streams.normal(torch.zeros(4, 1, SIDE, SIDE))
    arguments = ideal_network(DATA, diffusion), diffusion, plain_times(250)
    plain = repaint(*arguments, noise, streams).flatten(1).numpy()
    difference = np.abs(started(249, Streams(range(4)), 4) - plain).max()
    assert 0 < difference < np.sqrt(diffusion.alphas_cumprod[-1])  # of a picture within [-1, 1]


# ---- The sampler, draw by draw ----------------------------------------------------------------

KEEP = np.tile([1.0, 0.25, 0.0, 1.0], (3, 4, 1))  # (3, 4, 4)
JUMPS = times_from(jump_times(ScheduleConfig(t_T=8, n_sample=1, jump_length=3, jump_n_sample=3)), 5)
DIFFUSION = GaussianDiffusion(beta_schedule("linear", 30)[:9])


def pictures_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, 4, 4))


def senseless(x: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
    """A denoiser that depends on all that it is told."""
    mean = torch.tanh(1.1 * x + y.view(-1, 1, 1, 1) / 1000) * (1 - t / 20)
    return ReverseStep(mean, torch.sin(x) - 2, mean)


def numpy_loop(gt: np.ndarray, picture: np.ndarray, seed: int, inject: bool) -> np.ndarray:
    """The contract in float64, one image; from the code under test comes nothing."""
    stream = torch.Generator().manual_seed(seed)
    beta = np.linspace(30**-1 * 0.1, 30**-1 * 20, 30)[:9]  # linear, 30 steps
    abar = np.cumprod(1 - beta)

    def draw() -> np.ndarray:
        return torch.randn(3, 4, 4, generator=stream).numpy().astype(np.float64)

    y = int(torch.randint(0, 1000, (1,), generator=stream))
    x = np.sqrt(abar[JUMPS[0]]) * picture + np.sqrt(1 - abar[JUMPS[0]]) * draw()
    for t, u in pairwise(JUMPS):
        n = draw()
        if u > t:
            x = np.sqrt(1 - beta[u]) * x + np.sqrt(beta[u]) * n
            continue
        if inject:
            known = np.sqrt(abar[t]) * gt + np.sqrt(1 - abar[t]) * draw()
            x = KEEP * known + (1 - KEEP) * x
        mean = np.tanh(1.1 * x + y / 1000) * (1 - t / 20)
        x = mean + (t > 0) * np.exp((np.sin(x) - 2) / 2) * n
    return x


def small_inpainter(**fields: object) -> PixelInpainter:
    return PixelInpainter(senseless, DIFFUSION, JUMPS, 4, start_from="image", **fields)


@pytest.mark.parametrize("inject", [True, False])
def test_the_loop_is_the_slow_one_with_the_same_draws(inject):
    """Class, the start's noise, then n and n' down and n up; the merge from the first step on."""
    assert any(u > t for t, u in pairwise(JUMPS)) and JUMPS[0] == 5
    gt, pictures = ([pictures_of(10 * kind + i) for i in range(2)] for kind in (1, 2))
    found = small_inpainter(merge_known=inject).sample(
        torch.from_numpy(np.stack(gt)).float(),
        torch.from_numpy(KEEP).float().expand(2, -1, -1, -1),
        [7, 100],
        start_picture=torch.from_numpy(np.stack(pictures)).float(),
    )
    for i, seed in enumerate((7, 100)):
        expected = numpy_loop(gt[i], pictures[i], seed, inject)
        np.testing.assert_allclose(found[i].numpy(), expected, atol=2e-4)


def test_the_first_evaluation_sees_both_at_the_noise_level_of_t():
    """Without noise in the draws: known pixels are the image's, the others the picture's."""

    class Silent:
        def normal(self, like: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(like)

    seen = []

    def denoise(x: torch.Tensor, t: int) -> ReverseStep:
        seen.append((t, x))
        return ReverseStep(x, torch.zeros_like(x), x)

    gt, picture, keep = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), -1.0), torch.eye(2)
    keep = keep.view(1, 1, 2, 2)
    x_5 = DIFFUSION.q_sample(picture, 5, torch.zeros_like(picture))
    times = [5, 4, 3, 2, 1, 0, -1]
    repaint(denoise, DIFFUSION, times, x_5, Silent(), known=Known(gt, keep), merge_first=True)
    level = float(np.sqrt(DIFFUSION.alphas_cumprod[5]))
    assert [t for t, _ in seen] == [5, 4, 3, 2, 1, 0]
    expected = torch.tensor([[0.5, -1.0], [-1.0, 0.5]]) * level
    torch.testing.assert_close(seen[0][1][0, 0], expected)


def test_from_any_state_it_goes_on_to_the_same_bits():
    inpaint, gt = small_inpainter(), torch.from_numpy(pictures_of(3)).float()[None]
    batch = {"gt": gt, "keep_mask": torch.from_numpy(KEEP).float()[None], "seeds": [3]}
    batch |= {"start_picture": torch.from_numpy(pictures_of(4)).float()[None]}
    found = []
    whole = inpaint.sample(**batch, after_evaluation=lambda now: found.append(now.state()))
    assert len(found) == inpaint.evaluations == count_evaluations(JUMPS)
    for done, state in enumerate(found, start=1):
        assert torch.equal(inpaint.sample(**batch, resume=state), whole)
        assert inpaint.evaluations_before(state) == done


# ---- The config -------------------------------------------------------------------------------

FILE = """model_path: m.pt
timestep_respacing: 20
schedule_jump_params: {t_T: 15, n_sample: 1, jump_length: 5, jump_n_sample: 3}
data: {eval: {some: {gt_path: in/gts, mask_path: in/masks, paths: {
  srs: out/a, lrs: out/b, gt_keep_masks: out/c}}}}
"""


def config_of(folder: Path, *overrides: str):
    (folder / "c.yml").write_text(FILE)
    return load_config(folder / "c.yml", overrides)


def test_the_keys(tmp_path):
    config = config_of(tmp_path)
    assert config.start_from is None and config.start_path is None
    config = config_of(tmp_path, "start_from.t=14")
    assert config.start_from == StartConfig(t=14) and config.start_path == "in/gts"
    config = config_of(tmp_path, "start_from={t: 0, path: pastes}")
    assert config.start_from == StartConfig(path="pastes", t=0) and config.start_path == "pastes"
    assert to_yaml_dict(config)["start_from"] == {"path": "pastes", "t": 0}
    assert config_of(tmp_path, "start_from.t=3", "start_from=null") == config_of(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["start_from.t=15"], "start_from.t: found 15; accepted: from 0 to 14, the times of the"),
        (["start_from.t=20", "schedule_jump_params=null"], "found 20; accepted: from 0 to 19"),
        (["start_from.t=-1"], "start_from.t: found -1; accepted: a whole number >= 0"),
        (["start_from.t=null"], "start_from.t: found null; accepted: a whole number >= 0"),
        (["start_from.path=x.png"], "start_from.t: missing; accepted: a whole number >= 0"),
        (["start_from={}"], "start_from.t: missing"),
        (["start_from=x.png"], "start_from: found x.png; accepted: a map of keys"),
        (
            ["start_form.path=x"],
            "start_form.path: unknown key; the nearest known key is start_from.path",
        ),
        (
            ["start_from={t: 3, path: out}"],
            "paths.srs: found out/a; accepted: a folder apart from start_from.path, which is input",
        ),
        (["start_from={t: 3, path: out/a}"], "a folder apart from start_from.path"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        config_of(tmp_path, *overrides)
    assert words in str(error.value)


def test_without_a_schedule_all_kept_steps_are_times(tmp_path):
    config = config_of(tmp_path, "start_from.t=19", "schedule_jump_params=null")
    assert build_times(config) == plain_times(20)


@pytest.mark.filterwarnings("error")  # the noise at the start is that of t: no warning is due
def test_the_times_are_cut_for_the_sampler_and_for_the_plot(tmp_path):
    config = config_of(tmp_path, "start_from.t=3")
    times = build_times(config)
    assert times[0] == max(times) == 3 and times[-2:] == [0, -1]
    (tmp_path / "c.yml").write_text(f"{FILE}start_from: {{t: 3}}\n")
    assert [*schedules_of([str(tmp_path / "c.yml")]).values()] == [times]


def test_only_steps_that_are_walked_must_be_there_for_re_noising(tmp_path):
    """Going up from 9 takes the β of step 15 of 15 steps, which is not there; from 8 it is."""
    keys = "timestep_respacing=15", "inpa_inj_time_shift=6"
    with pytest.raises(UserError, match="re-noising needs steps"):
        build_times(config_of(tmp_path, *keys))
    assert max(build_times(config_of(tmp_path, *keys, "start_from.t=9"))) == 9


# ---- Inputs -----------------------------------------------------------------------------------


def save(path: Path, *pictures: np.ndarray) -> str:
    path.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{i}.png")
    return str(path)


def noise_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_start_pictures_are_paired_as_masks_are(tmp_path):
    images = save(tmp_path / "i", *[noise_picture(2, 2)] * 3)
    assert {pair.start_path for pair in find_pairs(images, images)} == {None}
    pairs = find_pairs(images, images, 1, None, images)
    assert [Path(pair.start_path).name for pair in pairs] == ["1.png", "2.png"]
    one = f"{images}/0.png"
    assert {pair.start_path for pair in find_pairs(images, images, start_path=one)} == {one}


def test_another_number_of_start_pictures_is_an_error(tmp_path):
    images = save(tmp_path / "i", *[noise_picture(2, 2)] * 3)
    fewer = save(tmp_path / "s", *[noise_picture(2, 2)] * 2)
    with pytest.raises(UserError) as error:
        find_pairs(images, images, start_path=fewer)
    assert str(error.value) == (
        f"gt_path {images} has 3 image(s), but start_from.path {fewer} has 2 (subfolders included):"
        " give each image one start picture, or, to use one start picture for all images, give the "
        f"start picture file itself as start_from.path, e.g. {fewer}/0.png"
    )


def test_other_names_are_warned_of(tmp_path):
    images = save(tmp_path / "i", noise_picture(2, 2))
    (tmp_path / "s").mkdir()
    shutil.copy(f"{images}/0.png", tmp_path / "s" / "x.png")
    with pytest.warns(UserWarning, match=r"start pictures are paired in sorted .*/s/x\.png$"):
        find_pairs(images, images, start_path=str(tmp_path / "s"))


def pair_in(folder: Path, shape: tuple[int, int], **options: object):
    """An image, a mask that is black in the middle, and a start picture, of this shape."""
    mask = np.full((*shape, 3), 255, np.uint8)
    mask[shape[0] // 3 : 2 * shape[0] // 3, shape[1] // 3 : 2 * shape[1] // 3] = 0
    pictures = noise_picture(*shape), mask, noise_picture(*shape, seed=1)
    paths = [save(folder / kind, each) for kind, each in zip("ims", pictures, strict=True)]
    image, mask_path, start = (f"{path}/0.png" for path in paths)
    fit = options.pop("fit", "crop")
    folders = dict.fromkeys(("inpainted_dir", "gt_masked_dir", "keep_mask_dir"), "x")
    dataset = DatasetConfig(name="x", gt_path="x", mask_path="x", fit=fit, **folders)
    pair = Pair(0, image, mask_path, "0.png", start)
    return load_pair(pair, dataset, 8, **options), pictures


@pytest.mark.parametrize("flip", [False, True])
def test_a_start_picture_is_prepared_and_mirrored_as_its_image_is(tmp_path, flip):
    crop, (image, _, start) = pair_in(tmp_path, (8, 12), flip=flip)
    view = crop.view()
    for tensor, picture in ((view.image, image), (view.start, start)):
        centre = picture[:, 2:10]
        expected = np.fliplr(centre) if flip else centre
        np.testing.assert_allclose(
            tensor.numpy().transpose(1, 2, 0), expected / 127.5 - 1, atol=1e-6
        )


def test_a_photo_s_start_picture_is_cut_by_its_regions(tmp_path):
    photo, (_, _, start) = pair_in(tmp_path, (9, 24), fit="region")
    (region,) = photo.regions
    assert (region.left, region.top, region.side) == (6, -1, 12)  # around a hole of 8 x 3
    view = photo.view(0)
    square = np.pad(start[:, 6:18], ((1, 2), (0, 0), (0, 0)), mode="edge")
    scaled = Image.fromarray(square).resize((8, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled) / 127.5 - 1
    np.testing.assert_allclose(view.start.numpy().transpose(1, 2, 0), expected, atol=1e-6)


def test_a_region_of_the_network_s_size_is_cut_out_and_goes_on_at_the_edges():
    photo = noise_picture(10, 20)
    inside = cut_start(photo, Region(left=11, top=1, side=8, holes=(), largest_hole=1), 8)
    np.testing.assert_array_equal(inside, photo[1:9, 11:19])
    beyond = cut_start(photo, Region(left=-2, top=-3, side=16, holes=(), largest_hole=1), 16)
    np.testing.assert_array_equal(beyond[3:13, 2:], photo[:, :14])
    np.testing.assert_array_equal(beyond[:3, 2:], photo[:1, :14].repeat(3, axis=0))
    np.testing.assert_array_equal(beyond[3:13, :2], photo[:, :1].repeat(2, axis=1))
    halved = cut_start(photo, Region(left=0, top=0, side=10, holes=(), largest_hole=1), 5)
    means = photo[:, :10].reshape(5, 2, 5, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - means).max() <= 1  # rounded along each axis


# ---- Plans and records ------------------------------------------------------------------------


@pytest.fixture
def plan_case(tmp_path) -> PlanCase:
    """Five finished results that started from pictures in `starts`."""
    case = PlanCase(tmp_path)
    shutil.copytree(tmp_path / "gts", tmp_path / "starts")
    for path in (tmp_path / "starts").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    case.keys["start_from"] = {"path": str(tmp_path / "starts"), "t": 4}
    case.finish()
    return case


def test_a_changed_start_picture_makes_its_result_anew(plan_case):
    assert plan_case.plan().done == set(NAMES)
    starts = plan_case.path / "starts"
    shutil.copy(starts / "a.png", starts / "z.png")
    assert plan_case.plan().redo == {"z.png": "the start picture changed"}
    plan_case.finish()
    assert plan_case.plan().done == set(NAMES)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"t": 5, "path": "starts"}, "start_from.t was 4, is 5"),
        ({"t": 4}, "the start picture changed"),  # to the image itself
        (None, "start_from.t was 4, is at its default"),
    ],
)
def test_another_start_makes_all_anew(plan_case, keys, reason):
    if keys and "path" in keys:
        keys["path"] = str(plan_case.path / keys["path"])
    plan_case.keys["start_from"] = keys
    assert plan_case.plan().redo == dict.fromkeys(NAMES, reason)


def test_a_start_makes_anew_what_came_from_pure_noise(tmp_path):
    case = PlanCase(tmp_path)
    case.finish()
    case.keys["start_from"] = {"t": 4}
    reason = "start_from.t was at its default, is 4"
    assert case.plan().redo == dict.fromkeys(NAMES, reason)


def test_where_the_same_start_pictures_are_does_not_matter(plan_case):
    (plan_case.path / "starts").rename(plan_case.path / "moved")
    plan_case.keys["start_from"]["path"] = str(plan_case.path / "moved")
    assert plan_case.plan().done == set(NAMES)


def test_a_changed_image_is_named_first_where_it_is_the_start_itself(tmp_path):
    case = PlanCase(tmp_path)
    case.keys["start_from"] = {"t": 4}
    case.finish()
    assert case.plan().done == set(NAMES)
    shutil.copy(tmp_path / "gts" / "a.png", tmp_path / "gts" / "b.png")
    assert case.plan().redo == {"b.png": "the image changed"}


def test_the_digest_of_the_start_is_that_of_its_file(plan_case):
    for task in plan_case.plan().tasks:
        content = (plan_case.path / "starts" / task.name).read_bytes()
        assert task.origin.start == hashlib.sha256(content).hexdigest()


def test_another_process_gets_the_start_pictures_too(plan_case):
    plan = plan_case.plan()
    content = json.loads(json.dumps(to_json(plan)))
    assert from_json(plan_case.config(), content) == plan
    assert all(task.pair.start_path and task.origin.start for task in plan.tasks)


def test_a_start_picture_that_changes_during_the_run_ends_it(plan_case):
    plan = plan_case.plan()
    Image.new("RGB", (16, 16)).save(plan.tasks[0].pair.start_path)
    with pytest.raises(UserError, match=r"starts/a\.png changed during the run"):
        load(plan.tasks[0], plan)


def test_records_and_states_from_pure_noise_are_those_of_earlier_versions(tmp_path):
    """Lines do not name a start, and the state's name is one that such a version gave."""
    case = PlanCase(tmp_path)
    case.finish()
    lines = map(json.loads, Path(case.records.path).read_text().splitlines())
    (keys,) = {tuple(line) for line in lines if "bytes" in line}
    assert keys == (
        "run",
        "name",
        "digest",
        "stream",
        "flip",
        "image",
        "mask",
        "bytes",
        "seconds",
        "inputs",
    )
    origin = Origin(stream=7, flip=False, image="1f", mask="2e")
    path = Records("out/results").state_path("a1b2", [origin, replace(origin, stream=8)], 1)
    assert Path(path).name == "50e4347a88b574d8cedd6626724ef9e5.state"


# ---- The command ------------------------------------------------------------------------------

T = 1  # of 3
CUT = [1, 0, 1, 0, -1]  # of times 2 1 2 1 0 1 0 -1


@pytest.fixture
def case(tmp_path) -> Case:
    case = Case(tmp_path)
    (tmp_path / "pastes").mkdir()
    for path in sorted((tmp_path / "gts").iterdir()):
        ImageOps.mirror(Image.open(path).convert("RGB")).save(tmp_path / "pastes" / path.name)
    case.config["start_from"] = {"path": str(tmp_path / "pastes"), "t": T}
    return case


def pictures_in(case: Case, kind: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((case.folder / kind).iterdir())]


def from_python(case: Case, *, start: bool = True, **options: object) -> list[np.ndarray]:
    """What Python gives for the pictures of a case, each by itself."""
    inpaint = load_inpainter(case.conf_path(), "cpu")
    kinds = [pictures_in(case, kind) for kind in ("gts", "masks", "pastes")]
    return [
        np.asarray(inpaint(gt, mask, case.config["seed"] + i, start_from=paste if start else None))
        for i, (gt, mask, paste) in enumerate(zip(*kinds, strict=True))
    ]


def assert_same(found: dict[str, np.ndarray], expected: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(np.stack([*found.values()]), np.stack(expected))


def test_the_command_starts_from_pictures_and_says_so(case):
    case.config |= {"log_every": 1, "seed": 5}
    with one_thread(), evaluations() as done:
        result = case.run()
        assert result.status == 0 and result.lines("warning") == []
        assert len(done) == 2 * count_evaluations(CUT) == 6 < 2 * EVALUATIONS
        assert_same(case.written(), from_python(case))
    assert "3 network evaluations per image, 6 in all" in result.out
    start = f"{case.folder / 'pastes'}, noised to t = {T}"
    assert f"starts from {start}, not from pure noise" in result.out
    assert start in (case.out / "report.html").read_text()
    assert case.record()["config"]["start_from"] == case.config["start_from"]
    frames = {path.name for path in (case.out / "process").glob("*/*_xt.png")}
    assert frames == {"000001_xt.png", "000003_xt.png", "000004_xt.png"}
    assert "all were finished before" in case.run().out
    shutil.copy(*sorted((case.folder / "pastes").iterdir()))
    assert "first 000001.png: the start picture changed" in case.run("--dry-run").out


def test_without_a_path_the_images_are_the_start(case):
    del case.config["start_from"]["path"]
    case.config["seed"] = 5
    with one_thread():
        found = case.finish()
        assert_same(found, from_python(case, start=False))
        shutil.rmtree(case.folder / "pastes")
        shutil.copytree(case.folder / "gts", case.folder / "pastes")
        assert_same(found, from_python(case))
    assert "starts from the images themselves, noised to t = 1" in case.run("--dry-run").out


@pytest.mark.parametrize("keys", [{"batch_size": 2}, {"fit": "region"}])
def test_a_stopped_run_goes_on_to_the_same_bytes(case, keys):
    case.dataset |= keys
    case.config |= {"samples_per_image": 2, "seed": 5, "checkpoint_every": 0}
    with one_thread():
        assert case.run().status == 0
        whole = outputs(case)
        case.write_to("again")
        with evaluations(at=2, do=lambda: signal.raise_signal(signal.SIGTERM)):
            assert case.run().status == 128 + signal.SIGTERM
        (state,) = states(case)
        assert load_state(str(state))["position"] == 3  # two evaluations, and one step up between
        with evaluations() as rest:
            assert case.run().status == 0
    assert outputs(case) == whole
    inputs = 2 if "batch_size" in keys else 4  # batches, or pictures
    assert len(rest) == inputs * 3 - 2


def test_one_picture_serves_all_images(case):
    first, second = sorted((case.folder / "pastes").iterdir())
    case.config["seed"] = 5
    shutil.copy(first, second)
    expected = case.finish()
    case.config["start_from"]["path"] = str(first)
    case.write_to("one")
    assert_same(case.finish(), [*expected.values()])


def spoil_size(case: Case) -> None:
    path = sorted((case.folder / "pastes").iterdir())[1]
    Image.new("RGB", (SIZE, SIZE + 2)).save(path)


def spoil_file(case: Case) -> None:
    sorted((case.folder / "pastes").iterdir())[1].write_bytes(b"no picture")


def spoil_number(case: Case) -> None:
    sorted((case.folder / "pastes").iterdir())[1].unlink()


def spoil_folder(case: Case) -> None:
    shutil.rmtree(case.folder / "pastes")


def spoil_time(case: Case) -> None:
    case.config["start_from"]["t"] = 3


def spoil_outputs(case: Case) -> None:
    case.dataset["paths"]["srs"] = str(case.folder / "pastes" / "results")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_size, "1 of 2 images differ in size from their start picture, first "),
        (spoil_size, f"gts/000001.png ({SIZE}x{SIZE}) and "),
        (spoil_size, f"pastes/000001.png ({SIZE}x{SIZE + 2}): start_from needs pictures in the"),
        (spoil_file, "pastes/000001.png: empty, damaged, or not an image"),
        (spoil_number, "has 2 image(s), but start_from.path"),
        (spoil_folder, "start_from.path: no such file or folder:"),
        (spoil_time, "start_from.t: found 3; accepted: from 0 to 2"),
        (spoil_outputs, "a folder apart from start_from.path, which is input"),
    ],
)
@pytest.mark.parametrize("fit", ["crop", "region"])
def test_mistakes_end_the_command_before_anything_is_written(case, spoil, words, fit):
    case.dataset["fit"] = fit
    spoil(case)
    case.config["model_path"] = str(GOLDEN / "tiny32.pt")
    case.conf_path()
    before = case.tree()
    with evaluations() as done:
        assert words in assert_refused(case.run())
    assert done == [] and case.tree() == before


def test_the_preview_shows_the_start_in_the_hole(case):
    white = Image.new("RGB", (SIZE, SIZE), "white")
    for path in (case.folder / "pastes").iterdir():
        white.save(path)
    for path in (case.folder / "masks").iterdir():
        Image.new("L", (SIZE, SIZE)).save(path)
    out = case.folder / "preview.png"
    assert case.run("--preview", str(out)).status == 0
    with Image.open(out) as sheet:
        seen = np.asarray(sheet)[8:264, -264:-8]  # the last cell of 256 x 256, in its frame
    assert seen[:200].min() == 255
    target = sorted((case.folder / "pastes").iterdir())[0]
    assert "this is one of the inputs" in assert_refused(case.run("--preview", str(target)))


# ---- From Python ------------------------------------------------------------------------------


def test_tensors_start_from_tensors(case):
    case.config["seed"] = 5
    inpaint = load_inpainter(case.conf_path(), "cpu")
    assert inpaint.evaluations == 3
    generator = torch.Generator().manual_seed(0)
    gt, start = (torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1 for _ in range(2))
    keep = torch.ones(2, 1, SIZE, SIZE)
    keep[..., SIZE // 2 :] = 0
    result = inpaint(gt, keep, seed=3, start_from=start.double())
    expected = inpaint.sample(gt, keep, [3, 4], start_picture=start)
    assert torch.equal(result, expected)
    assert not torch.equal(result, inpaint(gt, keep, seed=3, start_from=gt))
    themselves = load_inpainter(case.conf_path(), "cpu", ["start_from.path=null"])
    assert torch.equal(themselves(gt, keep, seed=3), inpaint(gt, keep, seed=3, start_from=gt))
    assert torch.equal(themselves(gt, keep, seed=3, start_from=start), result)


def test_lists_of_pictures_start_from_lists(case):
    inpaint = load_inpainter(case.conf_path(), "cpu")
    gts, masks, pastes = (pictures_in(case, kind) for kind in ("gts", "masks", "pastes"))
    results = inpaint(gts, masks, start_from=tuple(pastes))
    single = inpaint(gts[0], masks[0], start_from=pastes[0])
    difference = np.abs(np.asarray(results[0]).astype(int) - np.asarray(single))
    assert difference.max() <= 1


def test_starts_that_do_not_fit_are_refused(case):
    inpaint = load_inpainter(case.conf_path(), "cpu")
    plain = load_inpainter(case.conf_path(), "cpu", ["start_from=null"])
    gt = Image.new("RGB", (SIZE, SIZE))
    tensor, keep = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, 1, SIZE, SIZE)
    refused = [
        (plain, (gt, gt), gt, "the config has none; with method: pixel, load it with"),
        (inpaint, (gt, gt), None, "the config has start_from.path, for the images of its dataset"),
        (inpaint, (tensor, keep), None, "the config has start_from.path"),
        (inpaint, (gt, gt), Image.new("RGB", (SIZE, SIZE + 1)), "as many and of their sizes"),
        (inpaint, ([gt, gt], [gt, gt]), [gt], "as many and of their sizes"),
        (inpaint, ([gt, gt], [gt, gt]), gt, "PIL images like the images"),
        (inpaint, (gt, gt), np.zeros((SIZE, SIZE, 3)), "PIL images like the images"),
        (inpaint, (tensor, keep), gt, "a tensor like the images"),
        (inpaint, (tensor, keep), keep, "a tensor like the images"),
        (inpaint, (tensor, keep), tensor + 2, r"float numbers in \[-1, 1\]"),
        (inpaint, (tensor, keep), tensor.int(), r"float numbers in \[-1, 1\]"),
    ]
    for call, inputs, start, words in refused:
        with pytest.raises(ValueError, match=words):
            call(*inputs, start_from=start)


def test_pictures_of_any_size_and_the_other_way_up_may_be_starts(case):
    """A photo that is stored on its side is as large as what was drawn over it."""
    inpaint = load_inpainter(case.conf_path(), "cpu")
    upright = Image.fromarray(noise_picture(48, 40))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    mask = Image.new("L", upright.size)
    first, second = (inpaint(photo, mask, start_from=upright) for photo in (upright, turned))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
