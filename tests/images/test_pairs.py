"""Pairing, preparing and writing pictures, against the golden PNGs and cases worked out by hand."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.images import files, pairs
from guided_diffusion.images.files import encode_png, load_prepared, prepare
from guided_diffusion.images.pairs import Pair, find_pairs
from guided_diffusion.images.tensors import flip_decision, image_to_tensor, mask_to_tensor, to_bytes
from tests.support.pictures import noise, save_images, user_error

GOLDEN_RUNS = sorted((Path(__file__).parents[1] / "golden" / "e2e").iterdir())


def write_png(depth: int, colour_type: int, samples: np.ndarray) -> Image.Image:
    """A PNG written by hand, because Pillow does not write 16-bit colour. samples: (H, W, C)."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in samples)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)))


# ---- Against the original ----


@pytest.mark.parametrize("run", GOLDEN_RUNS, ids=lambda run: run.name)
def test_golden_inputs_are_prepared_to_the_byte(run):
    image_size = yaml.safe_load((run / "conf.yml").read_text())["image_size"]
    pairs = find_pairs(str(run / "gts"), str(run / "masks"))
    assert [pair.name for pair in pairs] == sorted(p.name for p in run.glob("expected/gt/*"))
    for pair in pairs:
        gt = image_to_tensor(load_prepared(pair.image_path, image_size))
        m = mask_to_tensor(load_prepared(pair.mask_path, image_size))
        written = {"gt": gt, "gt_masked": gt * m - (1 - m), "gt_keep_mask": 2 * m - 1}
        for folder, tensor in written.items():
            expected = np.asarray(Image.open(run / "expected" / folder / pair.name))
            np.testing.assert_array_equal(to_bytes(tensor[None])[0], expected)


# ---- Finding and pairing ----


def test_pairs_are_sorted_and_keep_their_subfolders(tmp_path):
    images = save_images(tmp_path / "gts", "b.png", "a.b.jpg", "sub/deep/c.v2.GIF", "B.JPEG")
    masks = save_images(tmp_path / "masks", "B.png", "a.b.png", "b.png", "z/c.v2.png")
    pairs = find_pairs(images, masks)
    assert pairs[1] == Pair(1, f"{images}/a.b.jpg", f"{masks}/a.b.png", "a.b.png")
    assert [pair.index for pair in pairs] == [0, 1, 2, 3]
    assert [pair.name for pair in pairs] == ["B.png", "a.b.png", "b.png", "sub/deep/c.v2.png"]
    assert pairs[3].mask_path == f"{masks}/z/c.v2.png"


def test_all_types_in_any_case_and_nothing_hidden_nor_foreign(tmp_path):
    names = ["1.jpg", "2.jpeg", "3.png", "4.gif", "5.webp", "6.bmp", "7.tif", "8.tiff"]
    names += [name.upper().replace(".", "x.") for name in names]
    images = save_images(tmp_path / "gts", *names)
    save_images(tmp_path / "gts", ".hidden.png", ".ipynb_checkpoints/1.png", "1/.thumbs/2.png")
    for foreign in ("notes.txt", "png", "list.png.txt", "x.pngx"):
        (tmp_path / "gts" / foreign).write_bytes(b"")
    mask = save_images(tmp_path, "mask.png") + "/mask.png"
    assert [Path(pair.image_path).name for pair in find_pairs(images, mask)] == sorted(names)


def test_one_mask_file_serves_all_images(tmp_path, recwarn):
    images = save_images(tmp_path / "gts", "a.png", "b.png")
    mask = save_images(tmp_path, "any name.png") + "/any name.png"
    assert [pair.mask_path for pair in find_pairs(images, mask)] == [mask, mask]
    assert not recwarn


def test_single_files_pair_with_each_other(tmp_path, recwarn):
    image = save_images(tmp_path / "in", "my.photo.jpg") + "/my.photo.jpg"
    mask = save_images(tmp_path / "in", "hole.png") + "/hole.png"
    assert find_pairs(image, mask) == [Pair(0, image, mask, "my.photo.png")]
    assert not recwarn


def test_relative_paths_and_trailing_slashes(tmp_path, monkeypatch):
    save_images(tmp_path / "gts", "sub/a.png")
    save_images(tmp_path / "masks", "a.png")
    monkeypatch.chdir(tmp_path)
    assert find_pairs("gts/", "masks//")[0].name == "sub/a.png"
    monkeypatch.chdir(tmp_path / "gts")
    assert find_pairs(".", "../masks")[0].name == "sub/a.png"


@pytest.mark.parametrize(
    "offset, max_len, kept", [(0, None, "abcd"), (1, None, "bcd"), (1, 2, "bc"), (3, 100, "d")]
)
def test_offset_and_max_len(tmp_path, offset, max_len, kept):
    images = save_images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    pairs = find_pairs(images, images, offset, max_len)
    assert [pair.name for pair in pairs] == [f"{stem}.png" for stem in kept]
    assert [pair.index for pair in pairs] == list(range(len(kept)))


def test_different_names_are_one_warning_with_the_first_such_pair(tmp_path):
    images = save_images(tmp_path / "gts", "a.png", "b.jpg", "c.png")
    masks = save_images(tmp_path / "masks", "a.png", "b_mask.png", "c_mask.png")
    with pytest.warns(UserWarning) as record:
        find_pairs(images, masks)
    (warning,) = record
    assert f"image {images}/b.jpg, mask {masks}/b_mask.png" in str(warning.message)
    assert "\n" not in str(warning.message)
    assert warning.filename == __file__


def test_equal_names_of_different_types_are_no_warning(tmp_path, recwarn):
    images = save_images(tmp_path / "gts", "a.jpg", "s/b.v1.jpg")
    find_pairs(images, save_images(tmp_path / "masks", "a.png", "b.v1.png"))
    assert not recwarn


def test_missing_folders_are_named_with_their_key(tmp_path):
    images = save_images(tmp_path / "gts", "a.png")
    missing = str(tmp_path / "nowhere")
    assert f"gt_path: no such file or folder: {missing}" in user_error(find_pairs, missing, images)
    assert f"mask_path: no such file or folder: {missing}" in user_error(
        find_pairs, images, missing
    )


def test_a_folder_without_images_names_the_accepted_types(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    message = user_error(find_pairs, str(tmp_path), str(tmp_path))
    assert f"no images in folder {tmp_path}" in message
    assert "jpg, jpeg, png, gif, webp, bmp, tif, tiff" in message


def test_a_folder_that_cannot_be_read_is_a_user_error(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(pairs.storage, "list_files", refuse)
    message = user_error(find_pairs, str(tmp_path), str(tmp_path))
    assert message == f"gt_path: cannot read {tmp_path}: Permission denied"


@pytest.mark.parametrize("masks", [["a.png"], ["a.png", "b.png", "c.png"]])
def test_counts_that_differ_are_both_named(tmp_path, masks):
    images = save_images(tmp_path / "gts", "a.png", "b.png")
    folder = save_images(tmp_path / "masks", *masks)
    message = user_error(find_pairs, images, folder)
    assert f"{images} has 2 " in message and f"{folder} has {len(masks)} " in message
    assert f"give the mask file itself as mask_path, e.g. {folder}/a.png" in message


@pytest.mark.parametrize("other", ["a.jpg", "a.JPG", "a.gif"])
def test_two_images_with_one_result_are_both_named(tmp_path, other):
    images = save_images(tmp_path / "gts", "sub/a.png", f"sub/{other}")
    message = user_error(find_pairs, images, images)
    assert f"{images}/sub/a.png" in message and f"{images}/sub/{other}" in message
    assert "sub/a.png:" in message


def test_same_name_in_another_folder_is_another_result(tmp_path):
    images = save_images(tmp_path, "a.png", "x/a.png", "y/a.png", "a.b.png")
    names = [pair.name for pair in find_pairs(images, images)]
    assert names == ["a.b.png", "a.png", "x/a.png", "y/a.png"]


@pytest.mark.parametrize("offset", [2, 5])
def test_offset_beyond_the_end(tmp_path, offset):
    images = save_images(tmp_path, "a.png", "b.png")
    message = user_error(find_pairs, images, images, offset)
    assert f"offset {offset} " in message and "has 2" in message and "at most 1" in message


# ---- Preparing ----


@pytest.mark.parametrize(
    "size, image_size, resized_to, crop_at",
    [
        # halve while the shorter side is at least twice the target; then bicubic; then crop
        ((200, 130), 32, [(100, 65), (50, 32), (50, 32)], (9, 0)),
        ((100, 75), 32, [(50, 37), (43, 32)], (5, 0)),  # 50 * 32/37 = 43.2; (43-32)//2 = 5
        ((64, 64), 32, [(32, 32), (32, 32)], (0, 0)),
        ((63, 63), 32, [(32, 32)], (0, 0)),  # 63 < 2 * 32: not halved
        ((16, 19), 24, [(24, 28)], (0, 2)),  # 19 * 1.5 = 28.5: Python rounds to the even 28
        ((16, 17), 24, [(24, 26)], (0, 1)),  # 17 * 1.5 = 25.5: to the even 26
        ((10, 41), 32, [(32, 131)], (0, 49)),  # 41 * 3.2 = 131.2; 99 // 2 = 49
    ],
)
def test_sizes_on_the_way_worked_out_by_hand(monkeypatch, size, image_size, resized_to, crop_at):
    calls, crops = [], []
    resize, crop = Image.Image.resize, Image.Image.crop

    def record_resize(self, new_size, resample):
        calls.append((new_size, resample))
        return resize(self, new_size, resample)

    def record_crop(self, box):
        crops.append(box)
        return crop(self, box)

    monkeypatch.setattr(Image.Image, "resize", record_resize)
    monkeypatch.setattr(Image.Image, "crop", record_crop)
    assert prepare(noise(*size), image_size).shape == (image_size, image_size, 3)
    filters = [Image.Resampling.BOX] * (len(resized_to) - 1) + [Image.Resampling.BICUBIC]
    assert calls == list(zip(resized_to, filters, strict=True))
    left, top = crop_at
    assert crops == [(left, top, left + image_size, top + image_size)]


def test_halving_is_the_mean_of_two_by_two():
    image = noise(128, 64)
    pixels = np.asarray(image).astype(int)
    while pixels.shape[0] > 16:  # columns, then rows, each rounded half up to 8 bits
        pixels = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2
        pixels = (pixels[0::2] + pixels[1::2] + 1) // 2
    np.testing.assert_array_equal(prepare(image, 16), pixels[:, 8:24])


def test_a_picture_of_the_right_size_stays_as_it_is():
    np.testing.assert_array_equal(prepare(noise(32, 32), 32), np.asarray(noise(32, 32)))


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),  # the camera was turned: rotate clockwise to view
        (8, lambda a: np.rot90(a)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_exif_orientation_is_applied_before_anything_else(tmp_path, orientation, upright, mode):
    pixels = np.asarray(noise(40, 60))
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    else:
        image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    expected = prepare(Image.fromarray(np.ascontiguousarray(upright(pixels))), 32)
    np.testing.assert_array_equal(load_prepared(str(tmp_path / "x.png"), 32), expected)


LEVELS_16 = np.array([[0, 128, 129, 257, 385, 386, 1000, 200 * 257, 65279, 65407, 65408, 65535]])
LEVELS_8 = [0, 0, 1, 1, 1, 2, 4, 200, 254, 255, 255, 255]  # value / 257, rounded, by hand


@pytest.mark.parametrize(
    "name, mode, dtype",
    [
        ("x.png", "I;16", "<u2"),
        ("x.tiff", "I;16", "<u2"),
        ("x.tiff", "I;16B", ">u2"),
        ("x.tiff", "I", "<i4"),
    ],
)
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name, mode, dtype):
    levels = np.repeat(LEVELS_16, 12, axis=0)
    path = str(tmp_path / name)
    Image.frombytes(mode, (12, 12), levels.astype(dtype).tobytes()).save(path)
    expected = np.broadcast_to(np.array(LEVELS_8)[None, :, None], (12, 12, 3))
    np.testing.assert_array_equal(load_prepared(path, 12), expected)


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_keep_their_high_byte(colour_type, channels):
    """Pillow reduces these while decoding: exact for 257 k, else at most one level lower."""
    levels = np.repeat(np.repeat(LEVELS_16[..., None], 12, axis=0), channels, axis=-1)
    prepared = prepare(write_png(16, colour_type, levels), 12)
    np.testing.assert_array_equal(prepared, (levels[..., :1] >> 8).repeat(3, axis=-1))
    assert ((np.array(LEVELS_8) - prepared[0, :, 0].astype(int)) <= 1).all()


@pytest.mark.parametrize("values", [[[70000.0]], [[-1.0]]])
def test_grey_beyond_16_bits_is_refused(values):
    with pytest.raises(ValueError, match="more than 16 bits"):
        prepare(Image.fromarray(np.array(values, dtype=np.int32)), 4)


def test_floating_point_pictures_are_refused_by_name(tmp_path):
    path = str(tmp_path / "depth.tiff")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
    message = user_error(load_prepared, path, 4)
    assert path in message and "floating-point" in message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = noise(16, 16).convert("RGB").convert("L" if mode in ("LA", "PA") else mode)
    image = image.convert(mode)
    np.testing.assert_array_equal(prepare(image, 16), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_blended(tmp_path, recwarn):
    pixels = np.asarray(noise(16, 16))
    transparent = np.dstack([pixels, np.zeros((16, 16), np.uint8)])
    np.testing.assert_array_equal(prepare(Image.fromarray(transparent), 16), pixels)
    palette = noise(16, 16).quantize(16)
    palette.save(tmp_path / "x.png", transparency=bytes(range(16)))
    prepared = load_prepared(str(tmp_path / "x.png"), 16)
    np.testing.assert_array_equal(prepared, np.asarray(palette.convert("RGB")))
    assert not recwarn  # Pillow would warn of such a palette


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (load_prepared(str(tmp_path / "x.gif"), 8) == [255, 0, 0]).all()


def test_the_picture_given_to_prepare_is_left_alone():
    image = noise(8, 8).quantize(4)
    image.info["transparency"] = b"\0\1"
    before = (image.copy(), dict(image.info))
    prepare(image, 8)
    assert (image, image.info) == before


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    image_size=st.sampled_from([1, 2, 7, 32, 64]),
)
def test_any_size_gives_the_square(width, height, image_size):
    prepared = prepare(Image.new("L", (width, height), 200), image_size)
    assert prepared.shape == (image_size, image_size, 3) and prepared.dtype == np.uint8
    assert (prepared == 200).all()  # neither resizing nor cropping reaches beyond the picture


# ---- Files that cannot be read ----


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, of TIFF
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tiff"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    noise(40, 40).save(path)
    content = path.read_bytes()
    for kept in (0, 1, 10, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:kept])
        message = user_error(load_prepared, str(path), 32)
        assert str(path) in message and "replace or remove" in message
        assert "0x" not in message and "BufferedReader" not in message


def test_text_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    assert "not an image" in user_error(load_prepared, str(tmp_path / "x.png"), 32)
    assert "No such file" in user_error(load_prepared, str(tmp_path / "y.png"), 32)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    path = save_images(tmp_path, "x.png") + "/x.png"
    monkeypatch.setattr(files, "MOST_PIXELS", 63)
    message = user_error(load_prepared, path, 8)
    assert path in message and "8x8 are 64 pixels, and at most 63 are read" in message
    assert "smaller" in message


# ---- Tensors and bytes ----


def grey_levels() -> np.ndarray:
    """All 256 levels as one prepared picture."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)


def test_image_tensor_is_scaled_in_float32_channels_first():
    prepared = np.zeros((2, 2, 3), np.uint8)
    prepared[0, 1] = [0, 51, 255]
    tensor = image_to_tensor(prepared)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 2, 2)
    assert tensor[:, 0, 1].tolist() == [-1, pytest.approx(-0.6, abs=1e-7), 1]
    # 155 / 127.5 - 1 rounded to float32 after each operation, not once at the end
    expected = np.float32(np.float32(155) / np.float32(127.5)) - np.float32(1)
    assert image_to_tensor(np.full((1, 1, 3), 155, np.uint8))[0, 0, 0].item() == expected


def test_mask_tensor_is_not_thresholded():
    prepared = np.zeros((1, 3, 3), np.uint8)
    prepared[0, :, 0] = [0, 51, 255]
    tensor = mask_to_tensor(prepared)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 1, 3)
    np.testing.assert_array_equal(tensor[0, 0], np.array([0, 0.2, 1], np.float32))


def test_truncation_lowers_63_of_the_256_levels_by_one():
    back = to_bytes(image_to_tensor(grey_levels())[None])[0]
    difference = grey_levels()[..., 0].astype(int) - back[..., 0]
    assert sorted(set(difference.ravel())) == [0, 1]
    assert difference.sum() == 63


def test_to_bytes_clamps_truncates_and_puts_channels_last():
    x = torch.zeros(2, 3, 1, 4)
    x[1, 2, 0] = torch.tensor([-7.0, 3 / 127.5 - 1 + 0.005, 0.999, 7.0])
    written = to_bytes(x)
    assert written.dtype == np.uint8 and written.shape == (2, 1, 4, 3)
    assert written[1, 0, :, 2].tolist() == [0, 3, 254, 255]
    assert (written[0] == 127).all()


def test_png_holds_the_same_bytes():
    array = np.asarray(noise(9, 5))
    image = Image.open(io.BytesIO(encode_png(array)))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), array)


def test_flips_are_half_of_all_fixed_by_seed_and_index_and_draw_from_no_shared_stream():
    state = torch.random.get_rng_state()
    decisions = [flip_decision(seed, index) for seed in range(50) for index in range(40)]
    assert abs(sum(decisions) / 2000 - 0.5) < 0.05  # 4.5 standard deviations
    assert decisions[:6] == [False, False, False, True, False, False]  # in every release
    # Neighbouring seeds share sampling streams (5, 1) = (6, 0), but not their flips.
    shifted = [flip_decision(1, index) for index in range(39)]
    assert decisions[1:40] != shifted
    assert torch.equal(torch.random.get_rng_state(), state)
