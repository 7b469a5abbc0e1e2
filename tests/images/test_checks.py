"""What is said of images and masks before sampling, and what the sampler then gets of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.images.pairs import Pair, find_pairs
from guided_diffusion.images.views import Crop, Photo
from guided_diffusion.machine import storage
from tests.support.checks import DATASET, REGION, check_pairs, load_pair, messages_of
from tests.support.pictures import noise, save_images, user_error

FILL = replace(DATASET, mask_convention="fill")


def grey_mask(path: Path, levels: list[int], size: int = 8) -> str:
    """A mask whose columns repeat the given levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(levels, np.uint8), (size, size))).save(path)
    return str(path)


def pairs_with_masks(tmp_path: Path, *levels: list[int]) -> list[Pair]:
    image = save_images(tmp_path, "image.png") + "/image.png"
    masks = [grey_mask(tmp_path / f"{i}.png", values) for i, values in enumerate(levels)]
    return [Pair(i, image, mask, f"{i}.png") for i, mask in enumerate(masks)]


def test_good_pairs_pass_silently(tmp_path):
    assert messages_of(pairs_with_masks(tmp_path, [0, 255], [255, 0, 0, 0])) == []


def test_grey_masks_are_counted_in_one_warning(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 255], [0, 200], [0, 128])
    (message,) = messages_of(pairs)
    assert message.startswith(f"2 of 3 masks, first {pairs[1].mask_path}, have values between 0")
    assert "save images and masks at 8x8, masks black and white" in message


def test_masks_of_zeros_and_ones_are_told_apart_from_grey_ones(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 1], [0, 255])
    (message,) = messages_of(pairs)
    assert message.startswith(f"1 of 2 masks, first {pairs[0].mask_path}, are nowhere brighter")
    assert "multiply them by 255" in message


def test_masks_that_become_grey_by_resizing_are_found(tmp_path):
    (message,) = messages_of(pairs_with_masks(tmp_path, [0, 255]), image_size=6)
    assert "have values between" in message


def test_masks_of_one_colour_are_legal_with_a_warning_a_kind(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0], [255], [255], [0, 255])
    white, black = messages_of(pairs)
    assert white.startswith(f"2 of 4 masks, first {pairs[1].mask_path}, keep everything")
    assert black.startswith(f"1 of 4 masks, first {pairs[0].mask_path}, keep nothing")


def test_sizes_that_differ_are_one_warning_with_the_first_such_pair(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 255], [0, 255], [0, 255])
    for pair in pairs[1:]:
        grey_mask(Path(pair.mask_path), [0] * 8 + [255] * 8, size=16)
    (message,) = messages_of(pairs)
    assert message.startswith("2 of 3 images differ in size from their mask")
    assert f"{pairs[1].image_path} (8x8) and {pairs[1].mask_path} (16x16)" in message


def test_sizes_are_compared_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(12, 8).save(tmp_path / "image.png", exif=exif)
    image = str(tmp_path / "image.png")
    pixels = np.zeros((12, 8), np.uint8)
    pixels[:6] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert messages_of([Pair(0, image, str(tmp_path / "mask.png"), "image.png")]) == []


def test_a_mask_that_serves_all_is_read_once_and_counted_once(tmp_path, monkeypatch):
    images = save_images(tmp_path / "gts", "a.png", "b.png", "c.png")
    mask = grey_mask(tmp_path / "mask.png", [100])
    opened = []
    open_binary = storage.open_binary

    def record(path):
        opened.append(path)
        return open_binary(path)

    monkeypatch.setattr(storage, "open_binary", record)
    (message,) = messages_of(find_pairs(images, mask))
    assert message.startswith("1 of 1 masks")
    assert opened.count(mask) == 1 and len(opened) == 4


def test_the_first_bad_file_is_named_and_the_others_counted(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0], [0, 255], [0, 255])
    for pair in pairs[1:]:
        Path(pair.mask_path).write_bytes(b"")
    message = user_error(check_pairs, pairs, DATASET, 8)
    assert f"cannot read image {pairs[1].mask_path}" in message
    assert message.endswith("(1 more cannot be read either)")
    Path(pairs[1].mask_path).unlink()
    grey_mask(Path(pairs[2].mask_path), [0, 255])
    message = user_error(check_pairs, pairs, DATASET, 8)
    assert "No such file" in message and "more" not in message


def test_masks_in_colour_are_told(tmp_path):
    (pair,) = pairs_with_masks(tmp_path, [0, 255])
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[:3] = (245, 255, 250)  # nearly white, as JPEG makes it
    for first_row, told in (((245, 255, 250), False), ((255, 0, 0), True)):
        pixels[:3] = first_row
        Image.fromarray(pixels).save(pair.mask_path)
        for dataset in (DATASET, REGION):
            messages = messages_of([pair], dataset=dataset)
            assert any("in colour" in m and "may be swapped" in m for m in messages) == told


def test_samples_of_an_image_are_one_image(tmp_path):
    pair = photo_pair(tmp_path, (200, 100), (150, 20, 190, 70))
    with pytest.warns(UserWarning, match="1 of 1 photos have holes"):
        assert check_pairs([pair, pair, pair], REGION, 32) == [1, 1, 1]


# ---- What is nearly white, and where a mask is ----


def save_values(path: str, levels: list[int], dtype: str = "uint8") -> None:
    """A mask of 8x8 whose columns repeat the given levels, of 8 or 16 bits."""
    Image.fromarray(np.resize(np.array(levels, dtype), (8, 8))).save(path)


NEARLY_WHITE = {  # levels of the file -> what they mean
    "254": ("uint8", [0, 254], [0, 255]),
    "JPEG": ("uint8", [3, 252, 251], [0, 255, 254]),
    "video": ("uint8", [16, 235], [0, 255]),
    "235": ("uint8", [0, 235], [0, 255]),
    "soft": ("uint8", [0, 127, 254], [0, 127, 255]),  # 127 * 255 / 254 = 127.5, to the even 128
    "all over": ("uint8", [254], [255]),
    "8 bits in 16": ("uint16", [0, 65280], [0, 255]),
    "254 in 16": ("uint16", [0, 254 * 257], [0, 255]),
    "video in 16": ("uint16", [16 << 8, 235 << 8], [0, 255]),
}


@pytest.mark.parametrize("name", NEARLY_WHITE)
@pytest.mark.parametrize("known_from", [None, 255])
def test_nearly_white_is_white_with_one_line(tmp_path, name, known_from):
    dtype, levels, meant = NEARLY_WHITE[name]
    (pair,) = pairs_with_masks(tmp_path, [0])
    save_values(pair.mask_path, levels, dtype)
    picture = load_pair(pair, DATASET, 8, known_from=known_from)
    expected = np.resize(np.array(meant), 8)
    assert np.abs(picture.mask[0, :, 0].astype(int) - expected).max() <= 1
    assert (picture.mask[0, :, 0] == 255).tolist() == (expected == 255).tolist()
    message, *others = [m for m in messages_of([pair]) if "nearly white is taken as white" in m]
    white = 255 if dtype == "uint8" else 65535
    numbers = f"from {min(levels):,} to {max(levels):,}, where white is {white:,}"
    assert message.startswith(f"1 of 1 masks, first {pair.mask_path}, have values {numbers}")
    assert not others


def test_the_case_of_a_mask_of_254(tmp_path):
    """With paste_known, all known pixels are the image's own bytes."""
    (pair,) = pairs_with_masks(tmp_path, [0, 254])
    picture = load_pair(pair, DATASET, 8, known_from=255)
    finished, original = picture.finish([np.full((8, 8, 3), 7, np.uint8)]), np.asarray(noise(8, 8))
    np.testing.assert_array_equal(finished[:, 1::2], original[:, 1::2])
    assert (finished[:, ::2] == 7).all()


@pytest.mark.parametrize(
    ("levels", "meant"), [([254, 0], [0, 255]), ([235, 16], [0, 255]), ([255, 16], [0, 255])]
)
def test_nearly_white_and_black_where_white_means_fill_in(tmp_path, levels, meant):
    (pair,) = pairs_with_masks(tmp_path, levels)
    picture = load_pair(pair, FILL, 8)
    assert picture.mask[0, :, 0].tolist() == meant * 4
    assert sum("nearly white" in message for message in messages_of([pair], dataset=FILL)) == 1


@pytest.mark.parametrize("levels", [[0, 255], [5, 255], [0, 128], [0, 230], [0, 1], [0, 200, 255]])
def test_other_levels_stay_as_they_are(tmp_path, levels):
    (pair,) = pairs_with_masks(tmp_path, levels)
    assert load_pair(pair, DATASET, 8).mask[0, : len(levels), 0].tolist() == levels
    assert not any("nearly white" in message for message in messages_of([pair]))


def test_masks_that_are_cut_need_no_stretching(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 254, 127, 0])  # stretched, 127 would be kept
    assert messages_of(pairs, dataset=REGION) == messages_of(pairs, known_from=128) == []
    assert not load_pair(pairs[0], REGION, 8).keep[:, 2].any()


@pytest.mark.parametrize("brightest", [1, 255, 30000])
def test_masks_of_16_bits_are_judged_by_their_own_values(tmp_path, brightest):
    (pair,) = pairs_with_masks(tmp_path, [0])
    save_values(pair.mask_path, [0, brightest], "uint16")
    for dataset in (DATASET, REGION):
        (message,) = messages_of([pair], dataset=dataset)
        assert "nowhere brighter than half of the 65,535" in message
        assert message.endswith("if 255 means keep in your masks, multiply them by 257")


def test_masks_in_a_transparent_layer_name_the_command(tmp_path):
    """Black strokes on nothing, white with the mask in alpha, grey ones; and what is no layer."""
    (pair,) = pairs_with_masks(tmp_path, [0])
    alpha = Image.fromarray(np.resize(np.array([0, 255, 255], np.uint8), (8, 8)))
    for level in (0, 255, 30):
        for mode in ("LA", "RGBA"):
            layer = Image.new("L", (8, 8), level).convert(mode)
            layer.putalpha(alpha)
            layer.save(pair.mask_path)
            for dataset in (DATASET, REGION):
                (message,) = messages_of([pair], dataset=dataset)
                assert "shape in the transparency" in message and "from-alpha" in message
    strokes = Image.merge("LA", (alpha, alpha))  # what is drawn is there without its alpha
    strokes.save(pair.mask_path)
    assert messages_of([pair]) == []
    Image.new("LA", (8, 8), (0, 255)).save(pair.mask_path)
    assert "keep nothing (black all over)" in messages_of([pair])[0]


# ---- What white means in a mask ----


def test_masks_that_keep_little_are_asked_about(tmp_path):
    pairs = pairs_with_masks(tmp_path, [255] + [0] * 7, [255] + [0] * 7, [0, 255])
    (message,) = messages_of(pairs)
    assert message.startswith(f"2 of 3 masks, first {pairs[0].mask_path}, keep less than a fifth")
    assert message.endswith("white (255) means fill in in your masks, set mask_convention: fill")
    assert messages_of(pairs[1:]) == []  # half of them is not most
    assert messages_of(pairs, dataset=FILL) == []


def test_little_is_less_than_a_fifth_and_grey_masks_are_asked_about_too(tmp_path):
    fifth, grey = [255, 0, 0, 0, 0], [250] + [0] * 9
    (pair,) = pairs_with_masks(tmp_path, fifth)
    noise(10, 10).save(pair.image_path)
    grey_mask(Path(pair.mask_path), fifth, size=10)
    assert messages_of([pair], 10) == []
    grey_mask(Path(pair.mask_path), grey, size=10)
    assert any("keep less than a fifth" in message for message in messages_of([pair], 10))


def test_a_photo_keeps_what_is_as_bright_as_half(tmp_path):
    """The mean of this mask is bright, but an eighth of its pixels are kept."""
    (pair,) = pairs_with_masks(tmp_path, [100] * 7 + [250])
    (message,) = messages_of([pair], dataset=REGION)
    assert "keep less than a fifth" in message


def test_the_question_about_little_kept_goes_the_other_way_round_too(tmp_path):
    (message,) = messages_of(pairs_with_masks(tmp_path, [0] + [255] * 7), dataset=FILL)
    assert message.endswith("if white (255) means keep in your masks, set mask_convention: keep")


def test_a_black_mask_is_warned_of_once(tmp_path):
    (message,) = messages_of(pairs_with_masks(tmp_path, [0]))
    assert "keep nothing" in message
    (message,) = messages_of(pairs_with_masks(tmp_path, [255]), dataset=FILL)
    assert "keep nothing" in message


@pytest.mark.parametrize("fit", ["crop", "region"])
def test_a_mask_whose_white_means_fill_in_is_the_inverse_of_one_whose_white_means_keep(
    tmp_path, fit
):
    levels = [0, 255, 255, 0, 255, 255, 255, 255]
    keep, fill = pairs_with_masks(tmp_path, levels, [255 - level for level in levels])
    ours = load_pair(keep, replace(DATASET, fit=fit), 8)
    theirs = load_pair(fill, replace(FILL, fit=fit), 8)
    assert torch.equal(ours.view(0).keep_mask, theirs.view(0).keep_mask)
    expected = torch.tensor(levels).expand(3, 8, 8) / 255
    assert torch.equal(ours.view(0).keep_mask, expected)


# ---- The centre square ----


def test_flip_mirrors_image_and_mask_together(tmp_path):
    pair = pairs_with_masks(tmp_path, [0, 0, 255])[0]
    plain, flipped = (load_pair(pair, DATASET, 8, flip=flip) for flip in (False, True))
    assert torch.equal(flipped.view().image, plain.view().image.flip(-1))
    assert torch.equal(flipped.view().keep_mask, plain.view().keep_mask.flip(-1))
    np.testing.assert_array_equal(flipped.companions().gt, plain.companions().gt[:, ::-1])
    np.testing.assert_array_equal(plain.image, np.asarray(noise(8, 8)))


def test_a_crop_is_what_the_sampler_made_unless_known_pixels_are_pasted(tmp_path):
    pair = pairs_with_masks(tmp_path, [0, 255])[0]
    result = np.full((8, 8, 3), 7, np.uint8)
    plain, pasted = (load_pair(pair, DATASET, 8, known_from=level) for level in (None, 255))
    np.testing.assert_array_equal(plain.finish([result]), result)
    finished, original = pasted.finish([result]), np.asarray(noise(8, 8))
    np.testing.assert_array_equal(finished[:, ::2], result[:, ::2])
    np.testing.assert_array_equal(finished[:, 1::2], original[:, 1::2])
    assert isinstance(plain, Crop) and plain.views == 1


# ---- Whole photos ----


def photo_pair(tmp_path: Path, size: tuple[int, int], *holes: tuple[int, int, int, int]) -> Pair:
    """A photo of noise; holes are (left, top, right, bottom)."""
    mask = Image.new("L", size, 255)
    for hole in holes:
        mask.paste(0, hole)
    noise(*size).save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    return Pair(0, str(tmp_path / "photo.png"), str(tmp_path / "mask.png"), "photo.png")


def test_a_photo_keeps_its_size_and_its_known_pixels(tmp_path):
    pair = photo_pair(tmp_path, (101, 67), (3, 5, 7, 9), (80, 40, 90, 60))
    photo = load_pair(pair, REGION, 16)
    assert isinstance(photo, Photo) and photo.views == 2
    for view in map(photo.view, range(2)):
        assert view.image.shape == view.keep_mask.shape == (3, 16, 16)
    finished = photo.finish([np.full((16, 16, 3), level, np.uint8) for level in (0, 255)])
    original = np.asarray(noise(101, 67))
    changed = (finished != original).any(axis=2)
    assert changed[5:9, 3:7].all() and changed[40:60, 80:90].all()
    assert changed.sum() == 4 * 4 + 20 * 10
    companions = photo.companions()
    np.testing.assert_array_equal(companions.gt, original)
    assert companions.gt_masked[5:9, 3:7].max() == companions.keep_mask[5:9, 3:7].max() == 0
    assert companions.keep_mask.sum() == 255 * 3 * (101 * 67 - changed.sum())


def test_a_photo_without_a_hole_stays_as_it_is(tmp_path):
    photo = load_pair(photo_pair(tmp_path, (20, 30)), REGION, 16)
    assert photo.views == 0
    np.testing.assert_array_equal(photo.finish([]), np.asarray(noise(20, 30)))


def test_inputs_are_counted_and_large_holes_are_told(tmp_path):
    pair = photo_pair(tmp_path, (200, 100), (10, 10, 14, 14), (150, 20, 190, 70))
    with pytest.warns(UserWarning) as record:
        assert check_pairs([pair], REGION, 32) == [2]
    (message,) = [str(warning.message) for warning in record]
    assert message.startswith("1 of 1 photos have holes larger than the 32 pixels that the network")
    assert f"{pair.image_path} (50 pixels)" in message


def test_a_crop_is_one_input(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 255], [255, 0])
    assert check_pairs(pairs, DATASET, 8) == [1, 1]


def test_patterns_too_fine_for_the_network_are_told(tmp_path):
    pairs = [pairs_with_masks(tmp_path, [0, 255])[0]]
    grey_mask(Path(pairs[0].mask_path), [0, 255], size=40)
    noise(40, 40).save(pairs[0].image_path)
    assert any(
        "keep no spot as large as a pixel of the network's 8x8" in message
        for message in (messages_of(pairs, dataset=REGION))
    )
    assert not any("no spot" in message for message in messages_of(pairs, 40, dataset=REGION))


def test_photos_need_masks_of_their_own_size(tmp_path):
    pairs = pairs_with_masks(tmp_path, [0, 255], [0, 255])
    grey_mask(Path(pairs[1].mask_path), [0, 255], size=16)
    message = user_error(check_pairs, pairs, REGION, 8)
    assert f"{pairs[1].image_path} (8x8) and {pairs[1].mask_path} (16x16)" in message
    assert message.endswith("fit: region needs masks in the size of their images")


def test_masks_of_photos_may_be_grey_but_not_dim(tmp_path):
    pairs = pairs_with_masks(tmp_path, [3, 250], [0, 1])
    (message,) = messages_of(pairs, dataset=REGION)
    assert message.startswith(f"1 of 2 masks, first {pairs[1].mask_path}, are nowhere brighter")
