"""Regions of photos: where the squares lie, what the network may know, what comes back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage
from skimage.transform import downscale_local_mean

from guided_diffusion.images.files import load_prepared
from guided_diffusion.images.regions import (
    Region,
    cut_image,
    cut_keep,
    find_regions,
    keep_of,
    label_holes,
    paste,
)


def keep_with(height: int, width: int, *holes: tuple[int, int, int, int]) -> np.ndarray:
    """All kept but rectangles: top, left, height, width."""
    keep = np.ones((height, width), bool)
    for top, left, tall, wide in holes:
        keep[top : top + tall, left : left + wide] = False
    return keep


def squares(regions: list[Region]) -> list[tuple[int, int, int]]:
    return [(region.left, region.top, region.side) for region in regions]


def a_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain."""
    random = np.random.default_rng(seed)
    coarse = random.integers(60, 180, (4, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(smooth) + random.integers(-6, 7, (height, width, 3))).astype(np.uint8)


def whole(photo: np.ndarray, region: Region, image_size: int) -> np.ndarray:
    """A network's result that is the truth, going on smoothly outside the photo."""
    border = region.side
    photo = np.pad(photo, ((border, border), (border, border), (0, 0)), "symmetric")
    region = replace(region, left=region.left + border, top=region.top + border)
    return cut_image(photo, np.ones(photo.shape[:2], bool), region, image_size)


def true_results(photo, keep, regions: list[Region], image_size: int) -> list[np.ndarray]:
    """What a network would make that knows the truth, and repeats what it was given."""
    results = []
    for region in regions:
        known = cut_keep(keep, region, image_size)[..., None]
        given = cut_image(photo, keep, region, image_size)
        results.append(np.where(known, given, whole(photo, region, image_size)))
    return results


def jumps(picture: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Colour in the hole minus colour beside it, for neighbours in a row."""
    left, right = np.nonzero(keep[:, 1:] != keep[:, :-1])
    sign = np.where(keep[left, right], 1, -1)[:, None]
    levels = picture.astype(int)
    return sign * (levels[left, right + 1] - levels[left, right])


# ---- Masks ----


def test_a_mask_keeps_from_128_on():
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for mask in (grey, np.dstack([grey] * 3), Image.fromarray(grey)):
        assert keep_of(mask).tolist() == [[False, False, True, True]]
    assert keep_of(Image.new("1", (2, 1), 1)).tolist() == [[True, True]]


def test_pixels_that_touch_at_a_corner_are_one_hole():
    labels = label_holes(~np.eye(3, 5, dtype=bool))
    assert labels.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


# ---- Which squares ----


def test_no_hole_no_region():
    assert find_regions(np.ones((50, 70), bool), 32) == []


def test_a_small_hole_has_a_square_of_the_networks_size_around_it():
    keep = keep_with(1000, 1500, (490, 700, 20, 40))  # its middle is (720, 500)
    assert find_regions(keep, 256) == [Region(592, 372, 256, (1,), 40)]


@pytest.mark.parametrize(
    ("top", "left", "square"),
    [(0, 0, (0, 0, 256)), (980, 1460, (1244, 744, 256)), (0, 700, (592, 0, 256))],
)
def test_at_the_photos_edge_a_square_is_shifted_into_it(top, left, square):
    assert squares(find_regions(keep_with(1000, 1500, (top, left, 20, 40)), 256)) == [square]


def test_a_hole_larger_than_the_network_has_a_quarter_of_its_size_on_each_side():
    keep = keep_with(2000, 3000, (600, 1000, 400, 800))
    assert find_regions(keep, 256) == [Region(800, 200, 1200, (1,), 800)]
    # In a corner, the photo ends before that: a quarter on one side only.
    keep = keep_with(2000, 3000, (0, 0, 400, 800))
    assert find_regions(keep, 256) == [Region(0, 0, 1000, (1,), 800)]


def test_holes_far_apart_are_two_regions_and_near_ones_share_one():
    far = find_regions(keep_with(1000, 1500, (100, 100, 50, 50), (800, 1300, 50, 50)), 256)
    assert squares(far) == [(0, 0, 256), (1197, 697, 256)]
    assert [region.holes for region in far] == [(1,), (2,)]
    near = find_regions(keep_with(1000, 1500, (500, 700, 50, 50), (500, 800, 50, 50)), 256)
    assert near == [Region(647, 397, 256, (1, 2), 150)]


@pytest.mark.parametrize(("last", "number"), [(155, 1), (156, 1), (157, 2)])
def test_holes_share_a_square_if_it_has_room_around_both(last, number):
    # 64 pixels, from 4 pixels before the first hole (96) to 4 after the last (160).
    for axis in (0, 1):
        keep = keep_with(400, 300, (100, 100, 3, 3), (100, 145, 3, last - 145))
        assert len(find_regions(np.moveaxis(keep, 0, axis), 64)) == number


def test_large_holes_are_filled_together_where_they_nearly_touch():
    close = keep_with(2000, 3000, (500, 500, 300, 300), (500, 860, 300, 300))
    assert find_regions(close, 256) == [Region(335, 155, 990, (1, 2), 660)]
    apart = keep_with(2000, 3000, (500, 500, 300, 300), (500, 870, 300, 300))
    assert [region.side for region in find_regions(apart, 256)] == [450, 450]


def test_a_small_hole_in_the_square_of_a_large_one_is_filled_with_it():
    keep = keep_with(2000, 3000, (600, 1000, 800, 800), (500, 1900, 5, 5), (100, 2500, 5, 5))
    assert [region.holes for region in find_regions(keep, 256)] == [(1,), (2, 3)]


def test_a_hole_that_covers_nearly_everything_takes_the_whole_photo():
    keep = keep_with(800, 1000, (100, 200, 600, 610), (0, 0, 2, 2))
    assert find_regions(keep, 256) == [Region(0, -100, 1000, (1, 2), 610)]
    smaller = keep_with(800, 1000, (100, 200, 600, 590), (0, 0, 2, 2))
    assert len(find_regions(smaller, 256)) == 2


def test_a_photo_of_about_the_networks_size_is_not_resized():
    assert squares(find_regions(keep_with(260, 270, (5, 5, 9, 9)), 256)) == [(0, 0, 256)]
    # Not even where a hole and what is around it are nearly all of the photo.
    assert squares(find_regions(keep_with(270, 270, (50, 50, 165, 165)), 256)) == [(4, 4, 256)]


def test_a_photo_that_is_smaller_than_the_network_is_taken_whole():
    assert squares(find_regions(keep_with(40, 60, (5, 5, 9, 9)), 64)) == [(0, -10, 60)]


def test_a_square_reaches_evenly_over_a_narrow_photo():
    assert squares(find_regions(keep_with(41, 3000, (10, 1490, 20, 20)), 64)) == [(1468, -11, 64)]


def test_dust_is_filled_in_few_squares_and_none_is_enlarged():
    random = np.random.default_rng(0)
    dust = [(*random.integers(0, 796, 2), *random.integers(1, 5, 2)) for _ in range(900)]
    regions = find_regions(keep_with(800, 800, *dust), 128)
    # 8 x 8 squares that step by 128 - 2 * 8 - 4 would cover it all, wherever a speck lies.
    assert len(regions) <= 1.1 * 8 * 8
    assert {region.side for region in regions} == {128}


masks = st.tuples(st.integers(1, 80), st.integers(1, 80), st.booleans()).flatmap(
    lambda size: arrays(bool, size[:2], fill=st.just(size[2]))
)
rectangles = st.tuples(*[st.integers(0, 79)] * 2, *[st.integers(1, 9) | st.just(30)] * 2)
boxes = st.builds(
    lambda height, width, holes: keep_with(height, width, *holes),
    *[st.integers(1, 80)] * 2,
    st.lists(rectangles, max_size=12),
)


@hypothesis_settings(deadline=None, max_examples=120)
@given(keep=masks | boxes, image_size=st.sampled_from([8, 16, 32]))
def test_any_mask(keep, image_size):
    regions = find_regions(keep, image_size)
    assert regions == find_regions(keep, image_size)
    labels, longest = label_holes(keep), max(keep.shape)
    filled = [hole for region in regions for hole in region.holes]
    assert sorted(filled) == list(range(1, labels.max() + 1))
    for region in regions:
        assert min(image_size, longest) <= region.side <= longest
        for start, length in zip((region.top, region.left), keep.shape, strict=True):
            if region.side <= length:
                assert 0 <= start <= length - region.side
            else:
                assert abs(start + start + region.side - length) <= 1
    if not keep.any():
        assert [region.side for region in regions] == [longest]
    photo = a_photo(*keep.shape)
    colours = [np.full((image_size, image_size, 3), 10 * i, np.uint8) for i in range(len(regions))]
    result = paste(photo, keep, regions, colours, image_size)
    assert result.shape == photo.shape and result.dtype == np.uint8
    np.testing.assert_array_equal(result[keep], photo[keep])
    for region in regions:
        top, left = max(region.top, 0), max(region.left, 0)
        square = (slice(top, region.top + region.side), slice(left, region.left + region.side))
        mine = np.isin(labels, region.holes)
        assert mine[square].sum() == mine.sum()


# ---- To the network ----


def test_at_the_networks_size_the_photo_comes_pixel_by_pixel():
    photo, keep = a_photo(50, 60), keep_with(50, 60, (20, 30, 5, 7))
    region = Region(17, 6, 32, (1,), 7)
    cut, known = cut_image(photo, keep, region, 32), cut_keep(keep, region, 32)
    np.testing.assert_array_equal(known, keep[6:38, 17:49])
    np.testing.assert_array_equal(cut, np.where(known[..., None], photo[6:38, 17:49], 0))


@pytest.mark.parametrize(("height", "width"), [(5, 3), (1, 40), (40, 1), (1, 1), (7, 33)])
def test_outside_the_photo_nothing_is_known(height, width):
    photo = a_photo(height, width)
    keep = np.random.default_rng(1).random((height, width)) < 0.7
    left, top = -((40 - width) // 2), -((40 - height) // 2)
    pads = ((-top, 40 - height + top), (-left, 40 - width + left))
    region = Region(left, top, 40, (1,), 1)
    known = np.pad(keep, pads)
    np.testing.assert_array_equal(cut_keep(keep, region, 40), known)
    cut = cut_image(photo, keep, region, 40)
    np.testing.assert_array_equal(cut[known], np.pad(photo, (*pads, (0, 0)))[known])


def test_without_holes_the_image_is_scaled_like_any_picture(tmp_path):
    photo = a_photo(210, 210)
    Image.fromarray(photo).save(tmp_path / "x.png")
    for image_size in (32, 200, 256):
        cut = whole(photo, Region(0, 0, 210, (), 0), image_size)
        picture = load_prepared(str(tmp_path / "x.png"), image_size)
        assert np.abs(cut.astype(int) - picture).max() <= 2  # each scaling rounds there, not here


@pytest.mark.parametrize("side", [64, 70, 100, 129, 200, 20])
def test_nothing_of_what_is_removed_reaches_the_network(side):
    photo, keep = a_photo(200, 200), keep_with(200, 200, (40, 50, 17, 9), (0, 0, 3, 90))
    region = Region(0, 0, side, (1,), 17) if side > 57 else Region(45, 35, side, (1,), 17)
    cuts = []
    for colour in (0, 255, [255, 0, 255]):
        photo[~keep] = colour
        cuts.append(cut_image(photo, keep, region, 64))
    np.testing.assert_array_equal(cuts[0], cuts[1])
    np.testing.assert_array_equal(cuts[0], cuts[2])


@pytest.mark.parametrize("side", [32, 45, 61, 130, 20])
def test_around_a_hole_colours_are_those_of_the_known_pixels(side):
    keep = keep_with(130, 130, (9, 5, 7, 12), (60, 60, 30, 1))
    photo = np.full((130, 130, 3), (250, 3, 128), np.uint8)
    photo[~keep] = (0, 255, 0)
    region = Region(0, 0, side, (1,), 12)
    cut, known = cut_image(photo, keep, region, 32), cut_keep(keep, region, 32)
    assert known.any() and not known.all()
    assert np.unique(cut[known], axis=0).tolist() == [[250, 3, 128]]
    assert not cut[~known].any()


def test_known_is_what_covers_kept_pixels_alone():
    keep = np.random.default_rng(0).random((128, 128)) < 0.97
    known = downscale_local_mean(keep.astype(float), (4, 4)) == 1
    np.testing.assert_array_equal(cut_keep(keep, Region(0, 0, 128, (), 1), 32), known)
    # 3 pixels for 2: the middle one belongs to both. 2 for 3: the middle one takes from both.
    keep = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    region = Region(0, 0, 3, (1,), 1)
    assert cut_keep(keep, region, 2).tolist() == [[True, True], [True, False]]
    assert cut_keep(np.roll(keep, (-1, -1), (0, 1)), region, 2).tolist() == [[False] * 2] * 2
    region = Region(0, 0, 2, (1,), 1)
    kept = cut_keep(np.array([[1, 1], [1, 0]], bool), region, 3)
    assert kept.tolist() == [[True, True, True], [True, False, False], [True, False, False]]


# ---- Back into the photo ----

PHOTOS = [
    (a_photo(203, 301, 1), keep_with(203, 301, (80, 120, 31, 17), (20, 260, 9, 9)), 64),
    (a_photo(97, 333, 2), keep_with(97, 333, (0, 100, 97, 60), (50, 300, 3, 33)), 32),
    (a_photo(259, 51, 3), keep_with(259, 51, (30, 5, 200, 40)), 32),
]


@pytest.mark.parametrize(("photo", "keep", "image_size"), PHOTOS)
def test_known_pixels_stay_whatever_the_network_makes(photo, keep, image_size):
    regions = find_regions(keep, image_size)
    before = photo.copy()
    shape = (len(regions), image_size, image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    result = paste(photo, keep, regions, noise, image_size)
    assert result.shape == photo.shape
    np.testing.assert_array_equal(result[keep], photo[keep])
    assert (result[~keep] != photo[~keep]).any(axis=1).mean() > 0.9
    np.testing.assert_array_equal(photo, before)


@pytest.mark.parametrize(("photo", "keep", "image_size"), PHOTOS)
def test_a_tint_of_the_networks_leaves_no_seam(photo, keep, image_size):
    regions = find_regions(keep, image_size)
    tinted = [truth + 20 for truth in true_results(photo, keep, regions, image_size)]
    result = paste(photo, keep, regions, tinted, image_size).astype(int)
    assert abs(jumps(result, keep).mean() - jumps(photo, keep).mean()) < 1  # of 20
    assert abs((result - photo)[~keep].mean()) < 0.5


def test_at_the_networks_size_the_truth_comes_back():
    photo, keep, image_size = PHOTOS[0]
    regions = find_regions(keep, image_size)
    truths = true_results(photo, keep, regions, image_size)
    assert {region.side for region in regions} == {image_size}
    np.testing.assert_array_equal(paste(photo, keep, regions, truths, image_size), photo)


def test_an_uneven_error_fades_into_the_hole():
    # 30 too dark on the left, 30 too bright on the right of a grey photo: right on the mean.
    keep = keep_with(64, 64, (0, 12, 64, 40))
    photo = np.full((64, 64, 3), 100, np.uint8)
    result = np.full((64, 64, 3), 100, np.uint8)
    result[:, :32], result[:, 32:] = 70, 130
    filled = paste(photo, keep, [Region(0, 0, 64, (1,), 64)], [result], 64)[:, :, 0]
    assert np.ptp(filled, axis=0).max() == 0  # the same in every row
    row = filled[0].astype(int)
    assert row[12] == row[51] == 100  # no jump
    assert 100 > row[13] > row[14] > row[15] > 70
    assert row[16:32].tolist() == [70] * 16 and row[32:48].tolist() == [130] * 16


def test_noise_around_a_hole_stays_outside():
    keep = keep_with(128, 128, (40, 40, 48, 48))
    photo = np.full((128, 128, 3), 100, np.uint8)
    region = Region(0, 0, 128, (1,), 48)
    checkers = np.where(np.indices((32, 32, 3))[:2].sum(0) % 2 == 0, 80, 120).astype(np.uint8)
    result = np.where(cut_keep(keep, region, 32)[..., None], checkers, np.uint8(100))
    filled = paste(photo, keep, [region], [result], 32)
    assert np.ptp(filled[~keep]) < 8


def test_a_hole_is_filled_from_its_own_region_alone():
    keep = keep_with(60, 60, (10, 10, 8, 8), (14, 24, 8, 8))
    regions = [Region(0, 0, 32, (1,), 8), Region(10, 2, 32, (2,), 8)]
    photo = np.full((60, 60, 3), 90, np.uint8)
    results = [photo[:32, :32].copy() for _ in regions]
    for result, colour in zip(results, (10, 200), strict=True):
        result[~cut_keep(keep, regions[colour > 10], 32)] = colour
    filled = paste(photo, keep, regions, results, 32)
    assert np.unique(filled[10:18, 10:18]).tolist() == [10]
    assert np.unique(filled[14:22, 24:32]).tolist() == [200]


def test_a_network_that_knows_nothing_is_taken_at_its_word():
    keep = np.zeros((40, 30), bool)
    (region,) = find_regions(keep, 64)
    result = np.full((64, 64, 3), 77, np.uint8)
    filled = paste(a_photo(40, 30), keep, [region], [result], 64)
    assert filled.shape == (40, 30, 3) and np.unique(filled).tolist() == [77]


def test_a_larger_result_lies_where_the_photo_was():
    # A bright blob, seen at a quarter of its size, comes back in the same place.
    rows, columns = np.mgrid[:256, :256]
    blob = 200 * np.exp(-((rows - 101) ** 2 + (columns - 139) ** 2) / 800)
    photo = np.repeat(np.rint(blob).astype(np.uint8)[..., None], 3, axis=2)
    keep, region = keep_with(256, 256, (60, 90, 90, 100)), Region(0, 0, 256, (1,), 100)
    result = true_results(photo, keep, [region], 64)
    filled = paste(photo, keep, [region], result, 64)[..., 0]
    middle = ndimage.center_of_mass(np.where(keep, 0, filled.astype(float)))
    assert middle == pytest.approx(ndimage.center_of_mass(np.where(keep, 0, blob)), abs=0.05)
    assert np.abs(filled - blob)[~keep].max() < 4


def test_regions_and_results_are_of_the_same_number():
    photo, keep, image_size = PHOTOS[0]
    with pytest.raises(ValueError, match="shorter"):
        paste(photo, keep, find_regions(keep, image_size), [], image_size)
