"""Windows over the holes of photos: where they lie, and how what they see becomes one estimate."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion import denoiser as denoisers
from guided_diffusion.denoiser import Denoiser, tiled
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep, beta_schedule
from guided_diffusion.images import tiles
from guided_diffusion.images.regions import label_holes
from guided_diffusion.images.tiles import Tiles, find_tiles, find_windows, is_wide, padded

SIDE = 16


@st.composite
def holes(draw: st.DrawFn) -> np.ndarray:
    """Dust, scratches and boxes in photos that are as large as a window at least."""
    height, width = draw(st.integers(SIDE, 70)), draw(st.integers(SIDE, 70))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    hole = random.random((height, width)) < draw(st.sampled_from([0, 0.002, 0.05]))
    for _ in range(draw(st.integers(0, 3))):
        top, left = random.integers(0, height), random.integers(0, width)
        tall, wide = random.choice([1, 2, 9, 60], 2)
        hole[top : top + tall, left : left + wide] = True
    return hole


def hole_at(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Rectangles: top, left, height, width."""
    hole = np.zeros((height, width), bool)
    for top, left, tall, wide in boxes:
        hole[top : top + tall, left : left + wide] = True
    return hole


# ---- Where they lie ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(holes())
def test_each_pixel_of_a_hole_lies_well_inside_some_window(hole):
    height, width = hole.shape
    inside = np.zeros_like(hole)
    for top, left in find_windows(hole, SIDE):
        assert 0 <= top <= height - SIDE and 0 <= left <= width - SIDE
        assert hole[top : top + SIDE, left : left + SIDE].any()  # none is computed for nothing
        first_row, first_column = (start + 4 if start else 0 for start in (top, left))
        last_row = top + SIDE if top + SIDE == height else top + SIDE - 4
        last_column = left + SIDE if left + SIDE == width else left + SIDE - 4
        inside[first_row:last_row, first_column:last_column] = True
    assert inside[hole].all()


@pytest.mark.parametrize("box", [(0, 0, 3, 3), (0, 57, 3, 3), (47, 0, 3, 3), (47, 57, 3, 3)])
def test_a_hole_in_a_corner_takes_the_window_in_that_corner(box):
    (window,) = find_windows(hole_at(50, 60, box), SIDE).tolist()
    assert window == [0 if box[0] == 0 else 50 - SIDE, 0 if box[1] == 0 else 60 - SIDE]


def test_a_window_has_its_hole_in_the_middle():
    assert find_windows(hole_at(50, 60, (20, 30, 2, 4)), SIDE).tolist() == [[13, 24]]


@pytest.mark.parametrize("slope", [(1, 0), (0, 1), (1, 1)])
def test_a_long_scratch_takes_a_window_for_each_half_of_a_window(slope):
    hole = np.zeros((400, 400), bool)
    for i in range(400):
        hole[200 if slope[0] == 0 else i, 200 if slope[1] == 0 else i] = True
    assert len(find_windows(hole, SIDE)) == pytest.approx(400 / (SIDE / 2), abs=2)


def test_specks_near_each_other_share_a_window():
    assert len(find_windows(hole_at(80, 80, (30, 30, 1, 1), (34, 36, 1, 1)), SIDE)) == 1
    assert len(find_windows(hole_at(80, 80, (30, 30, 1, 1), (30, 50, 1, 1)), SIDE)) == 2


@settings(deadline=None, max_examples=30)
@given(holes())
def test_of_very_many_windows_each_hole_is_in_one_part(hole):
    with patch.object(tiles, "MOST", 3):
        parts = find_tiles(hole, SIDE)
    np.testing.assert_array_equal(sum(part.hole.astype(int) for part in parts), hole)
    labels = label_holes(~hole)
    of_part = [set(labels[part.hole]) for part in parts]
    assert sum(map(len, of_part)) == labels.max()
    for part in parts:
        assert part.hole.any() and part.covered[part.hole].all()


def test_many_windows_become_parts_of_about_the_most():
    hole = np.zeros((400, 400), bool)
    hole[8::20, 8::20] = True  # 400 specks
    with patch.object(tiles, "MOST", 100):
        parts = find_tiles(hole, SIDE)
    numbers = [len(part.windows) for part in parts]
    assert sum(numbers) == 400 and len(numbers) <= 5 and max(numbers) <= 125


def test_nothing_to_fill_in_takes_no_window():
    assert find_tiles(np.zeros((40, 30), bool), SIDE) == []


def test_places_are_those_of_the_covered_pixels_in_the_photos_order():
    hole = hole_at(40, 50, (20, 10, 2, 30))
    (part,) = find_tiles(hole, SIDE)
    numbered = np.arange(40 * 50).reshape(40, 50)
    row = numbered[part.covered]
    assert len(part.windows) > 2 and (np.diff(row) > 0).all()
    for (top, left), places in zip(part.windows, part.places, strict=True):
        np.testing.assert_array_equal(row[places], numbered[top : top + SIDE, left : left + SIDE])


def test_a_photo_smaller_than_a_window_is_mirrored():
    assert padded(np.array([[1, 2, 3]]), 5).tolist() == [[1, 2, 3, 3, 2]] * 5
    assert padded(np.zeros((7, 2, 3)), 5).shape == (7, 5, 3)
    np.testing.assert_array_equal(padded(np.eye(6), 5), np.eye(6))


@pytest.mark.parametrize("tall, wide, side, answer", [(9, 12, 9, 1), (9, 12, 10, 0), (1, 60, 2, 0)])
def test_a_hole_is_wide_if_a_square_fits_into_it(tall, wide, side, answer):
    assert is_wide(hole_at(60, 61, (17, 1, tall, wide)), side) == answer
    assert is_wide(hole_at(60, 61, (60 - tall, 61 - wide, tall, wide)), side) == answer
    assert not is_wide(np.ones((5, 5), bool), 6)


# ---- What they see together -------------------------------------------------------------------


def step_of(x0: torch.Tensor) -> ReverseStep:
    return ReverseStep(2 * x0, x0 - 3, x0)


def blur(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
    """x_0 is the mean of 3x3 pixels."""
    return step_of(F.avg_pool2d(F.pad(x_t, (1, 1, 1, 1), "reflect"), 3, stride=1))


def by_place(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
    """Each window sees something else: its own mean."""
    return step_of(x_t.mean((1, 2, 3), keepdim=True).expand_as(x_t))


def see(denoiser: Denoiser, part: Tiles, x: torch.Tensor) -> tuple[ReverseStep, torch.Tensor]:
    """The tiled denoiser's step, and x of the covered pixels; x: (3, H, W)."""
    row = x[None, :, None, torch.from_numpy(part.covered)]  # (1, 3, 1, N)
    places = torch.from_numpy(part.places)
    return tiled(denoiser, places)(row, 5, torch.tensor([7])), row


def noise(hole: np.ndarray, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, *hole.shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(holes().filter(np.any))
def test_weights_sum_to_one(hole):
    """Where all windows agree, their common estimate comes out."""
    (part,) = find_tiles(hole, SIDE)
    p, row = see(lambda x_t, t, y: step_of(x_t), part, noise(hole))
    torch.testing.assert_close(p.pred_x0, row)
    torch.testing.assert_close(p.mean, 2 * row)
    torch.testing.assert_close(p.log_variance, row - 3)


def test_the_blend_goes_smoothly_from_one_window_to_the_next():
    """Two windows, one black and one white: no step is larger than a smooth curve's."""
    part = Tiles(np.array([[0, 0], [0, 8]]), SIDE, np.ones((SIDE, 24), bool))

    def black_and_white(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        return step_of(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand_as(x_t))

    p, _ = see(black_and_white, part, torch.zeros(3, SIDE, 24))
    line = p.pred_x0.view(3, SIDE, 24)[0, 5]
    assert (line[:8] == 0).all() and (line[16:] == 1).all()
    steps = line.diff()
    assert (steps >= 0).all() and steps.max() < 0.25
    torch.testing.assert_close(line[8:16] + line[8:16].flip(0), torch.ones(8))


def test_where_windows_see_enough_it_is_as_if_the_whole_photo_were_seen():
    hole = hole_at(60, 70, (5, 3, 2, 60), (8, 40, 40, 3), (55, 66, 5, 4))
    (part,) = find_tiles(hole, SIDE)
    x = noise(hole)
    p, _ = see(blur, part, x)
    whole = blur(x[None], 5, torch.tensor([7])).pred_x0[0]
    clear = part.covered.copy()  # of the edges of windows, but where the photo ends too
    for top, left in part.windows:
        for row in {top, top + SIDE - 1} - {0, 59}:
            clear[row, left : left + SIDE] = False
        for column in {left, left + SIDE - 1} - {0, 69}:
            clear[top : top + SIDE, column] = False
    assert len(part.windows) > 10 and clear[hole].mean() > 0.5
    seen = p.pred_x0[0, :, 0][:, torch.from_numpy(clear[part.covered])]
    torch.testing.assert_close(seen, whole[:, torch.from_numpy(clear)])


def test_one_window_gives_what_the_denoiser_gives():
    part = Tiles(np.array([[0, 0]]), SIDE, np.ones((SIDE, SIDE), bool))
    x = noise(part.hole)
    ours, _ = see(blur, part, x)
    theirs = blur(x[None], 5, torch.tensor([7]))
    for name in ("mean", "log_variance", "pred_x0"):
        torch.testing.assert_close(
            getattr(ours, name).view(3, SIDE, SIDE), getattr(theirs, name)[0]
        )


def test_a_mean_belongs_to_the_blended_x0():
    diffusion = GaussianDiffusion(beta_schedule("linear", 50))

    def posterior(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        return diffusion.reverse_step(by_place(x_t, t, y).pred_x0, x_t, t, predict_xstart=True)

    hole = hole_at(60, 70, (5, 3, 2, 60), (8, 40, 40, 3))
    (part,) = find_tiles(hole, SIDE)
    p, row = see(posterior, part, noise(hole))
    torch.testing.assert_close(p.mean, diffusion.posterior_mean(p.pred_x0, row, 5))
    spread = diffusion.tables.fixed_log_variance[5].expand_as(row)  # of no window in particular
    torch.testing.assert_close(p.log_variance, spread)


def sized(sizes: list[int]) -> Callable[..., ReverseStep]:
    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        assert y.tolist() == [7] * len(x_t)  # each window is of the photo's class
        sizes.append(len(x_t))
        return by_place(x_t, t, y)

    return denoise


def test_batches_of_windows_are_of_one_size_and_change_nothing():
    hole = hole_at(60, 70, (5, 3, 2, 60), (8, 40, 40, 3), (55, 66, 5, 4))
    (part,) = find_tiles(hole, SIDE)
    steps = []
    for most in (1, 3, 10, 1000):
        sizes: list[int] = []
        with patch.object(denoisers, "AT_A_TIME", most * SIDE**2):
            steps.append(see(sized(sizes), part, noise(hole))[0])
        assert len(set(sizes)) == 1 and sizes[0] <= most
        assert len(part.windows) <= sum(sizes) < len(part.windows) + sizes[0]
        torch.testing.assert_close(steps[-1].pred_x0, steps[0].pred_x0, rtol=0, atol=1e-6)


def test_windows_of_any_size_are_seen():
    """One at least, however large."""
    part = Tiles(np.array([[0, 0], [0, 8]]), SIDE, np.ones((SIDE, 24), bool))
    sizes: list[int] = []
    with patch.object(denoisers, "AT_A_TIME", SIDE):
        see(sized(sizes), part, noise(part.hole))
    assert sizes == [1, 1]
