"""Pictures that are left as they are (image_size: null), and masks that are cut at one half.

From files to batches, plans, previews and animations; the networks are in test_latent.
"""

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from guided_diffusion.config import CUT, Config, UserError, load_config
from guided_diffusion.images.files import InputFile, load_prepared, prepare, read_input
from guided_diffusion.images.pairs import Pair
from guided_diffusion.images.views import Crop
from guided_diffusion.output.film import Stage, shown_size
from guided_diffusion.run import preview
from guided_diffusion.run.plan import Task, from_json, make_batches, to_json
from guided_diffusion.run.preview import write_preview
from guided_diffusion.speed.choice import Speed
from tests.support.checks import DATASET, REGION, check_pairs, load_pair, messages_of
from tests.support.films import JUMP, LEVELS, frames_of, log
from tests.support.pictures import noise, user_error
from tests.support.plans import CPU, TIMES, Case, names, names_in_batches

SIZES = {"a": (9, 14), "b": (12, 7), "c": (9, 14), "d": (9, 14), "e": (12, 7)}  # height, width


def save(path: Path | str, picture: Image.Image | np.ndarray, **options: object) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(path, **options)
    return str(path)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ---- As they are -----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 13), (301, 2), (64, 64)])
def test_without_a_size_a_picture_stays_as_it_is(tmp_path, width, height):
    picture = noise(width, height)
    np.testing.assert_array_equal(prepare(picture, None), np.asarray(picture))
    path = save(tmp_path / "x.png", picture)
    prepared = load_prepared(path, None)
    assert prepared.shape == (height, width, 3) and prepared.dtype == np.uint8
    np.testing.assert_array_equal(prepared, np.asarray(picture))


def test_without_a_size_a_picture_is_still_upright_of_8_bits_and_rgb(tmp_path):
    picture = noise(5, 3)
    path = save(tmp_path / "turned.png", picture, exif=turned(6))
    np.testing.assert_array_equal(load_prepared(path, None), np.rot90(np.asarray(picture), -1))
    grey = np.array([[0, 257, 65535]], np.uint16)
    assert load_prepared(save(tmp_path / "16.png", grey), None)[0, :, 0].tolist() == [0, 1, 255]
    see_through = picture.copy()
    see_through.putalpha(7)
    np.testing.assert_array_equal(prepare(see_through, None), np.asarray(picture))


# ---- Sizes, without a look at the pixels -------------------------------------------------------


def after_the_pixels(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk before the last one, of 12 bytes."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return png[:-12] + struct.pack(">I", len(data)) + kind + data + check + png[-12:]


def png_bytes(width: int, height: int, **options: object) -> bytes:
    file = io.BytesIO()
    noise(width, height).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_sizes_are_those_of_the_upright_picture(tmp_path, suffix, orientation):
    options = {} if orientation is None else {"exif": turned(orientation)}
    path = save(tmp_path / f"x.{suffix}", noise(30, 20), **options)
    on_its_side = orientation in (5, 6, 7, 8)
    assert read_input(path).size() == ((30, 20) if on_its_side else (20, 30))
    assert load_prepared(path, None).shape[:2] == read_input(path).size()


@pytest.mark.parametrize("suffix", ["gif", "bmp"])
def test_sizes_of_types_that_cannot_be_turned(tmp_path, suffix):
    assert read_input(save(tmp_path / f"x.{suffix}", noise(30, 20))).size() == (20, 30)


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("kind", "data", "size"),
    [
        (b"eXIf", turned(6).tobytes()[6:], (30, 20)),
        (b"eXIf", turned(3).tobytes()[6:], (20, 30)),
        (b"iTXt", XMP, (30, 20)),
        (b"tEXt", b"Comment\0nothing of note", (20, 30)),
        (b"tIME", bytes(7), (20, 30)),
    ],
)
def test_what_follows_the_pixels_of_a_png_counts(tmp_path, kind, data, size):
    path = tmp_path / "x.png"
    path.write_bytes(after_the_pixels(png_bytes(30, 20), kind, data))
    assert read_input(str(path)).size() == load_prepared(str(path), None).shape[:2] == size


def test_sizes_are_read_without_the_pixels(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"x.{suffix}", noise(40, 30)) for suffix in ("png", "jpg", "webp")]
    paths.append(save(tmp_path / "turned.jpg", noise(30, 40), exif=turned(8)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", pytest.fail)
    assert {read_input(path).size() for path in paths} == {(30, 40)}


def test_a_file_without_a_size_is_named(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    assert "x.png: empty, damaged, or not an image" in user_error(
        read_input(str(tmp_path / "x.png")).size
    )
    assert "No such file" in user_error(read_input, str(tmp_path / "y.png"))


# ---- Masks that are cut, and what comes out ---------------------------------------------------


def pair_of(folder: Path, image: np.ndarray, mask: np.ndarray, name: str = "x") -> Pair:
    paths = (
        save(folder / f"{kind}-{name}.png", each) for kind, each in (("i", image), ("m", mask))
    )
    return Pair(0, *paths, f"{name}.png")


def grey_levels(*levels: int, height: int = 3) -> np.ndarray:
    return np.tile(np.array(levels, np.uint8), (height, 1))


PHOTO = np.asarray(noise(6, 3))
HALF = grey_levels(0, 1, 127, 128, 254, 255)  # cut between the third and the fourth column


def test_a_pair_as_it_is_with_its_mask_cut_at_one_half(tmp_path):
    crop = load_pair(pair_of(tmp_path, PHOTO, HALF), DATASET, None, known_from=CUT)
    view = crop.view()
    assert isinstance(crop, Crop) and crop.views == 1 and view.start is None
    assert view.image.shape == view.keep_mask.shape == (3, 3, 6)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(3, 3, 6)
    assert torch.equal(view.keep_mask, expected)
    result = 255 - PHOTO
    finished = crop.finish([result])
    np.testing.assert_array_equal(finished[:, 3:], PHOTO[:, 3:])
    np.testing.assert_array_equal(finished[:, :3], result[:, :3])


def test_companions_of_a_cut_mask_are_the_bytes_that_results_keep(tmp_path):
    companions = load_pair(
        pair_of(tmp_path, PHOTO, HALF), DATASET, None, known_from=CUT
    ).companions()
    np.testing.assert_array_equal(companions.gt, PHOTO)
    np.testing.assert_array_equal(companions.gt_masked[:, 3:], PHOTO[:, 3:])
    assert (companions.gt_masked[:, :3] == 0).all()
    assert companions.keep_mask[0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]
    assert {each.dtype for each in vars(companions).values()} == {np.dtype(np.uint8)}


@pytest.mark.parametrize(("level", "kept"), [(255, True), (128, True), (127, False), (0, False)])
def test_masks_of_one_level(tmp_path, level, kept):
    mask = np.full((3, 6), level, np.uint8)
    crop = load_pair(pair_of(tmp_path, PHOTO, mask), DATASET, None, known_from=CUT)
    assert crop.views == 1 and (crop.view().keep_mask == float(kept)).all()
    result = 255 - PHOTO
    np.testing.assert_array_equal(crop.finish([result]), PHOTO if kept else result)


def test_a_mask_of_a_fixed_size_is_cut_after_it_is_resized(tmp_path):
    """Pairs of columns become one: 255, 127, 255 and 0 on average.

    If it were cut before, 254 would count as 255, and Pillow makes 128 of the mean of 255 and 0.
    """
    mask = np.tile(np.array([255, 255, 254, 0, 255, 255, 0, 0], np.uint8), (8, 1))
    crop = load_pair(pair_of(tmp_path, np.asarray(noise(8, 8)), mask), DATASET, 4, known_from=CUT)
    assert crop.mask[0, :, 0].tolist() == [255, 0, 255, 0]
    assert crop.view().image.shape == (3, 4, 4)


def test_a_mask_of_a_fixed_size_is_black_and_white(tmp_path):
    mask = np.asarray(Image.linear_gradient("L").resize((50, 30)))
    crop = load_pair(
        pair_of(tmp_path, np.asarray(noise(50, 30)), mask), DATASET, 16, known_from=CUT
    )
    assert set(np.unique(crop.mask)) == {0, 255}
    soft = load_pair(pair_of(tmp_path, np.asarray(noise(50, 30)), mask), DATASET, 16)
    assert len(np.unique(soft.mask)) > 10
    np.testing.assert_array_equal(crop.mask == 255, soft.mask >= 128)


def test_of_pixel_models_only_white_is_known(tmp_path):
    crop = load_pair(pair_of(tmp_path, PHOTO, HALF), DATASET, None, known_from=255)
    assert crop.mask[0, :, 0].tolist() == HALF[0].tolist()
    finished = crop.finish([255 - PHOTO])
    assert (finished == PHOTO).all(axis=(0, 2)).tolist() == [False] * 5 + [True]


def test_a_mask_whose_white_means_fill_in_is_inverted_before_it_is_cut(tmp_path):
    dataset = replace(DATASET, mask_convention="fill")
    crop = load_pair(pair_of(tmp_path, PHOTO, HALF), dataset, None, known_from=CUT)
    assert crop.mask[0, :, 0].tolist() == [255, 255, 255, 0, 0, 0]  # 255 - 127 = 128 is kept


def test_a_mask_in_colour_is_cut_as_one(tmp_path):
    mask = np.zeros((1, 3, 3), np.uint8)
    mask[0] = [(255, 0, 0), (0, 255, 0), (0, 255, 255)]  # as grey: 76, 150 and 179
    crop = load_pair(pair_of(tmp_path, PHOTO[:1, :3], mask), DATASET, None, known_from=CUT)
    assert crop.mask.tolist() == [[[0] * 3, [255] * 3, [255] * 3]]


def test_pictures_as_they_are_can_be_mirrored(tmp_path):
    crop = load_pair(pair_of(tmp_path, PHOTO, HALF), DATASET, None, flip=True, known_from=CUT)
    np.testing.assert_array_equal(crop.image, PHOTO[:, ::-1])
    assert crop.mask[0, :, 0].tolist() == [255, 255, 255, 0, 0, 0]


# ---- What is checked --------------------------------------------------------------------------


def check(pairs: list[Pair], image_size: int | None = None) -> list[str]:
    return messages_of(pairs, image_size, known_from=CUT)


def test_pairs_of_any_size_pass_silently_and_are_one_input_each(tmp_path):
    pairs = [
        pair_of(tmp_path, np.asarray(noise(3, n)), grey_levels(0, 255, 255, height=n), str(n))
        for n in (3, 40)
    ]
    assert check(pairs) == []
    assert check_pairs(pairs, DATASET, None, CUT) == [1, 1]


@pytest.mark.parametrize("image_size", [None, 3])
def test_grey_masks_that_are_cut_are_no_warning(tmp_path, image_size):
    pair = pair_of(tmp_path, PHOTO[:, :3], grey_levels(10, 140, 200))
    assert check([pair], image_size) == []
    (message,) = messages_of([pair], 3)
    assert "used as they are" in message


def test_masks_that_keep_all_or_nothing_or_are_dim_are_told_as_they_are_cut(tmp_path):
    levels = {"white": (128, 200), "black": (0, 0), "dim": (1, 127)}
    pairs = [
        pair_of(tmp_path, PHOTO[:, :2], grey_levels(*each), name) for name, each in levels.items()
    ]
    told = {
        name: message
        for message in check(pairs)
        for name, pair in zip(levels, pairs, strict=True)
        if pair.mask_path in message
    }
    assert told.keys() == levels.keys()
    assert "keep everything" in told["white"] and "keep nothing" in told["black"]
    assert "nowhere brighter than half" in told["dim"]


def test_little_is_counted_of_what_is_kept_after_the_cut(tmp_path):
    """The mean of these levels is 113 of 255, but a tenth is kept."""
    pair = pair_of(tmp_path, np.asarray(noise(10, 3)), grey_levels(*[100] * 9, 230))
    (message,) = check([pair])
    assert "keep less than a fifth" in message


def test_without_a_size_masks_need_the_size_of_their_images(tmp_path):
    pairs = [
        pair_of(tmp_path, np.asarray(noise(6, 4)), grey_levels(0, 255, height=height), f"{i}")
        for i, height in enumerate((4, 3, 4))
    ]
    for pair in pairs[::2]:
        save(pair.mask_path, grey_levels(0, 255, 0, 255, 0, 255, height=4))
    message = user_error(check_pairs, pairs, DATASET, None, CUT)
    assert message == (
        f"1 of 3 images differ in size from their mask, first {pairs[1].image_path} (6x4) and "
        f"{pairs[1].mask_path} (2x3): image_size: null needs masks in the size of their images"
    )
    assert any("centre cropped separately" in each for each in check(pairs, 2))


def test_large_pictures_get_advice_where_they_are_taken_as_they_are(tmp_path):
    half = np.repeat(np.array([0, 255], np.uint8), 8193)[:, None].repeat(64, 1)
    pairs = [pair_of(tmp_path, half[:16384], half[:16384], "a"), pair_of(tmp_path, half, half, "b")]
    (message,) = check(pairs)
    assert message.startswith(
        f"1 of 2 pictures are larger than 1024x1024, first {pairs[1].image_path} (64x16386): "
    )
    assert message.endswith("set image_size: 512 and, in the dataset, fit: region")
    assert check(pairs, 64) == []


def test_sizes_that_fit_after_turning_fit(tmp_path):
    image = save(tmp_path / "i.jpg", noise(6, 3), exif=turned(6))
    mask = save(tmp_path / "m.png", grey_levels(0, 255, 255, height=6))
    assert check([Pair(0, image, mask, "i.png")]) == []


def test_one_mask_for_all_fits_images_of_one_size(tmp_path):
    mask = save(tmp_path / "m.png", grey_levels(0, 255, 255))
    sizes = {"a": (3, 3), "b": (4, 3)}
    pairs = [Pair(0, save(tmp_path / f"{n}.png", noise(*s)), mask, n) for n, s in sizes.items()]
    assert check(pairs[:1]) == []
    assert "1 of 2 images differ in size" in user_error(check_pairs, pairs, DATASET, None, CUT)


def test_photos_with_regions_say_what_they_said(tmp_path):
    pair = pair_of(tmp_path, PHOTO, grey_levels(0, 255, height=2))
    message = user_error(check_pairs, [pair], REGION, 8, CUT)
    assert message.endswith("fit: region needs masks in the size of their images")


# ---- Batches ----------------------------------------------------------------------------------


class TwoSizes(Case):
    """Five pictures of two sizes; see `SIZES`."""

    def __init__(self, path: Path, **dataset: object):
        super().__init__(path)
        for kind in ("gts", "masks"):
            for file in (path / kind).rglob("*.png"):
                file.unlink()
        self.dataset |= dataset
        for name, size in SIZES.items():
            self.add(name, *size)

    def add(self, name: str, height: int, width: int) -> None:
        mask = np.full((height, width), 255, np.uint8)
        mask[1 : height // 2, 1:-1] = 0
        save(self.path / "gts" / f"{name}.png", noise(width, height, seed=ord(name)))
        save(self.path / "masks" / f"{name}.png", mask)

    def config(self) -> Config:
        content = {"method": "latent", "image_size": None} | self.keys
        content |= {"data": {"eval": {"some": self.dataset}}}
        (self.path / "conf.yml").write_text(yaml.safe_dump(content))
        return load_config(self.path / "conf.yml")

    def batches(self) -> list[str]:
        """The names of each batch, as one word."""
        return ["".join(names).replace(".png", "") for names in names_in_batches(self.plan())]


def test_batches_hold_pictures_of_one_size_in_the_order_of_the_first(tmp_path):
    for size, batches in {
        1: ["a", "c", "d", "b", "e"],
        2: ["ac", "d", "be"],
        3: ["acd", "be"],
        9: ["acd", "be"],
    }.items():
        case = TwoSizes(tmp_path / str(size), batch_size=size)
        assert case.batches() == batches
        assert names(case.plan()) == [f"{name}.png" for name in SIZES]


def test_samples_of_an_image_have_its_size(tmp_path):
    case = TwoSizes(tmp_path, batch_size=4, max_len=2)
    case.keys["samples_per_image"] = 3
    assert case.batches() == ["a_0a_1a_2", "b_0b_1b_2"]
    case.dataset["max_len"] = 3
    assert case.batches() == ["a_0a_1a_2c_0", "c_1c_2", "b_0b_1b_2"]


@pytest.mark.parametrize(
    ("done", "batches"),
    [("", ["ac", "d", "be"]), ("ac", ["d", "be"]), ("ab", ["ac", "d", "be"]), ("abced", [])],
)
def test_batches_of_sizes_are_made_up_as_in_a_fresh_run(tmp_path, done, batches):
    case = TwoSizes(tmp_path, batch_size=2)
    case.finish([f"{name}.png" for name in done])
    assert case.batches() == batches
    plan = case.plan()
    assert len(plan.done) == len(done) and plan.redo == {}
    assert [task.size for task in plan.tasks] == list(SIZES.values())


def test_sizes_are_those_of_upright_images(tmp_path):
    case = TwoSizes(tmp_path, batch_size=2)
    save(tmp_path / "gts" / "b.png", noise(12, 7), exif=turned(8))
    assert case.batches() == ["ac", "d", "be"]


def test_with_one_size_for_all_nothing_is_grouped(tmp_path):
    case = TwoSizes(tmp_path, batch_size=2)
    case.keys["image_size"] = 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputFile, "size", pytest.fail)
        assert case.batches() == ["ab", "cd", "e"]
        assert {task.size for task in case.plan().tasks} == {None}
        assert case.plan().largest_size == (32, 32)


def test_the_largest_size_is_that_of_what_is_still_to_be_made(tmp_path):
    case = TwoSizes(tmp_path)  # 9 x 14 = 126 pixels, 12 x 7 = 84
    case.add("f", 4, 30)
    assert case.plan().largest_size == (9, 14)
    case.finish(["a.png", "c.png", "d.png"])
    assert case.plan().largest_size == (4, 30)
    case.finish(["f.png"])
    assert case.plan().largest_size == (12, 7)


def test_incomplete_batches_are_left_out_of_each_size(tmp_path):
    case = TwoSizes(tmp_path, batch_size=2, drop_last=True)
    plan = case.plan()
    assert names(plan) == ["a.png", "b.png", "c.png", "e.png"]
    assert case.batches() == ["ac", "be"]
    assert (plan.images, plan.total_evaluations) == (4, 4 * len(TIMES[1:]))
    case.dataset["batch_size"] = 3
    assert case.batches() == ["acd"]
    case.dataset["batch_size"] = 4
    with pytest.raises(UserError) as error:
        case.plan()
    assert (
        "drop_last leaves no batch: there are 3 image(s) of one size, fewer than batch_size 4"
        in (str(error.value))
    )


def test_an_image_that_cannot_be_read_ends_the_plan(tmp_path):
    case = TwoSizes(tmp_path)
    for name in "bd":
        (tmp_path / "gts" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"gts/b\.png: .*\(1 more cannot be read either\)"):
        case.plan()


def test_a_plan_checks_masks_by_the_rule_of_the_method(tmp_path, recwarn):
    case = TwoSizes(tmp_path)
    save(tmp_path / "masks" / "a.png", np.full((9, 14), 130, np.uint8))
    case.plan()
    (message,) = [str(warning.message) for warning in recwarn]
    assert "a.png, keep everything" in message
    save(tmp_path / "masks" / "e.png", np.full((7, 12), 255, np.uint8))
    with pytest.raises(UserError, match=r"e\.png \(12x7\): image_size: null needs masks"):
        case.plan()


def test_a_plan_with_sizes_is_the_same_at_the_other_process(tmp_path):
    case = TwoSizes(tmp_path, batch_size=2)
    plan = case.plan()
    other = from_json(case.config(), json.loads(json.dumps(to_json(plan))))
    assert other == plan and other.batches == plan.batches
    assert other.largest_size == (9, 14)


def task(number: int, size: tuple[int, int] | None) -> Task:
    return Task(None, f"{number}", None, True, size)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([(1, 2), (2, 1), (3, 3)]), max_size=12), st.integers(1, 5))
def test_batches_hold_each_task_once(sizes, batch_size):
    tasks = [task(number, size) for number, size in enumerate(sizes)]
    batches = make_batches(tasks, batch_size)
    order = list(dict.fromkeys(sizes))
    expected = sorted(range(len(tasks)), key=lambda number: (order.index(sizes[number]), number))
    assert [int(each.name) for batch in batches for each in batch] == expected
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len({each.size for each in batch}) == 1 for batch in batches)
    incomplete = [batch[0].size for batch in batches if len(batch) < batch_size]
    assert len(incomplete) == len(set(incomplete))  # one of each size at most


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 12), st.integers(1, 5))
def test_batches_of_one_size_are_pieces_of_the_list(number, batch_size):
    tasks = [task(i, None) for i in range(number)]
    pieces = [tasks[i : i + batch_size] for i in range(0, number, batch_size)]
    assert make_batches(tasks, batch_size) == pieces


# ---- What results follow from -----------------------------------------------------------------

CHANGES = {
    "size": ({"image_size": 32}, "image_size was at its default, is 32"),
    "steps": ({"ddim_steps": 20}, "ddim_steps was at its default, is 20"),
    "noise": ({"ddim_eta": 0.5}, "ddim_eta was at its default, is 0.5"),
    "network": (
        {"latent": {"unet": {"num_res_blocks": 1}}},
        "latent.unet.num_res_blocks was at its default, is 1",
    ),
    "autoencoder": (
        {"latent": {"autoencoder": {"n_embed": 16}}},
        "latent.autoencoder.n_embed was at its default, is 16",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_of_latent_diffusion_does_all_again(tmp_path, change):
    case = TwoSizes(tmp_path)
    case.finish()
    assert len(case.plan().done) == 5
    keys, reason = CHANGES[change]
    case.keys |= keys
    assert case.plan().redo == {f"{name}.png": reason for name in SIZES}


def test_another_method_does_all_again(tmp_path):
    case, pixels = TwoSizes(tmp_path), Case(tmp_path)
    latent, others = (each.recipe.settings for each in (case, pixels))
    assert latent["method"] == "latent" and "method" not in others
    assert not any(key.split(".")[0] in ("latent", "ddim_steps") for key in others)


def test_batch_size_and_order_change_no_result(tmp_path):
    case = TwoSizes(tmp_path)
    case.finish()
    case.dataset |= {"batch_size": 3, "deterministic": False}
    assert len(case.plan().done) == 5


def test_a_plan_of_any_size_is_told(tmp_path):
    lines = TwoSizes(tmp_path).plan().describe(CPU, Speed()).splitlines()
    assert lines[1] == f"{len(TIMES) - 1} network evaluations per image, 50 in all"


# ---- Pictures of them -------------------------------------------------------------------------


def test_a_preview_shows_pictures_as_they_are_with_the_cut_mask(tmp_path, recwarn):
    """A picture of 64 x 16 fills a cell's width, and a quarter of its height."""
    case = TwoSizes(tmp_path, max_len=1)
    mask = np.full((16, 64), 255, np.uint8)
    mask[:, :16], mask[:, 16:32] = 127, 128
    save(tmp_path / "gts" / "a.png", Image.new("RGB", (64, 16), "blue"))
    save(tmp_path / "masks" / "a.png", mask)
    out = str(tmp_path / "p.png")
    assert write_preview(case.config(), out).startswith(
        f"written: {out} (1: image | mask over image"
    )
    assert not recwarn  # of greys that are cut
    cell, gap, blue = preview.CELL, preview.GAP, [0, 0, 255]
    sheet = np.asarray(Image.open(out)).astype(int)
    image, overlaid, seen = (
        sheet[gap : gap + cell, left : left + cell]
        for left in (gap + column * (cell + gap) for column in range(3))
    )
    top, bottom = 3 * cell // 8, 5 * cell // 8
    for each in (image, overlaid, seen):
        assert (each[:top] == 255).all() and (each[bottom:] == 255).all()
        assert (each[top:bottom, cell // 4 :] == blue).all()
    assert (image[top:bottom] == blue).all()
    assert abs(overlaid[top:bottom, : cell // 4] - [153, 0, 150]).max() <= 1  # 40 % blue
    greys = np.unique(seen[top:bottom, : cell // 4])
    assert len(greys) == 2 and greys.min() > 150


def test_a_preview_refuses_a_mask_of_another_size(tmp_path):
    case = TwoSizes(tmp_path)
    save(tmp_path / "masks" / "a.png", grey_levels(0, 255))
    with pytest.raises(UserError, match="image_size: null needs masks in the size"):
        write_preview(case.config(), str(tmp_path / "p.png"))
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((64, 64), (192, 192)),
        ((64, 32), (192, 96)),
        ((20, 50), (80, 200)),
        ((300, 200), (256, 171)),
        ((2048, 1536), (256, 192)),
        ((1000, 1), (256, 1)),
        ((1, 3), (54, 162)),
    ],
)
def test_in_animations_the_longer_side_is_for_eyes(size, shown):
    assert shown_size(size) == shown


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (192, 96)), ((60, 240), (60, 240))])
def test_a_frame_shows_both_pictures_in_their_shape(size, shown):
    x_0, x_t = (Image.new("RGB", size, colour) for colour in ("red", "blue"))
    column = max(shown[0], 160)
    frame = Stage(JUMP, LEVELS, size).draw(8, x_0, x_t)
    assert frame.size == (2 * column + 48, shown[1] + 166)
    pixels = np.asarray(frame)
    for left, colour in ((16, [255, 0, 0]), (32 + column, [0, 0, 255])):
        found = (pixels == colour).all(axis=2)
        expected = np.zeros_like(found)
        expected[38 : 38 + shown[1], left : left + shown[0]] = True
        np.testing.assert_array_equal(found, expected)


def test_the_process_of_a_picture_that_is_not_square(tmp_path):
    process = log(tmp_path)
    for end in (1, 8):
        process.write(["x.png"], end, torch.zeros(1, 3, 40, 90), -torch.ones(1, 3, 40, 90))
    process.finish("x.png")
    with Image.open(tmp_path / "x" / "000008_xt.png") as frame:
        assert frame.size == (90, 40)
    for kind in ("gif", "webp"):
        assert [each.shape for each in frames_of(tmp_path / f"x.{kind}")] == [(246, 408, 3)] * 2
