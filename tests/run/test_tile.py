"""Whole photos at their own resolution (`fit: tile`), in runs of `test.py`."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import denoiser
from guided_diffusion.images import tiles
from guided_diffusion.images.views import TiledPhoto
from guided_diffusion.inpainter import PixelInpainter
from tests.support.case import EVALUATIONS, SIZE, Case
from tests.support.pictures import noise
from tests.support.small_runs import (
    assert_equal,
    assert_refused,
    evaluations,
    one_thread,
    outputs,
    small_case,
    states,
)

SIZES = {"a.png": (101, 67), "b.png": (40, 50), "c.png": (20, 27), "d.png": (90, 70)}
HOLES = {  # name -> boxes (left, top, right, bottom)
    "a.png": [(0, 30, 101, 33), (60, 0, 62, 67), (0, 0, 3, 3), (97, 63, 101, 67)],
    "b.png": [],
    "c.png": [(4, 20, 12, 24)],  # a photo smaller than a window
    "d.png": [(87, 0, 90, 4), (0, 68, 3, 70), (40, 40, 42, 41)],
}


@pytest.fixture(autouse=True, scope="module")
def as_in_processes() -> Iterator[None]:
    with one_thread():
        yield


def hole_of(name: str) -> np.ndarray:
    hole = np.zeros(SIZES[name][::-1], bool)
    for left, top, right, bottom in HOLES[name]:
        hole[top:bottom, left:right] = True
    return hole


def tile_case(folder: Path, names: str = "abcd", **keys: object) -> Case:
    """Photos with scratches across, with no hole, smaller than a window, with specks at edges."""
    case = small_case(folder, **keys)
    for kind in ("gts", "masks"):
        for path in (folder / kind).iterdir():
            path.unlink()
    for seed, name in enumerate(SIZES):
        if name[0] in names:
            noise(*SIZES[name], seed=seed).save(folder / "gts" / name)
            mask = Image.fromarray(~hole_of(name))
            mask.save(folder / "masks" / name)
    case.dataset |= {"fit": "tile"}
    return case


def quick(case: Case) -> Case:
    """With the quick sampler."""
    del case.config["schedule_jump_params"]
    case.config |= {"sampler": "langevin", "evaluations": 16, "timestep_respacing": ""}
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Case:
    """An undisturbed run."""
    case = tile_case(tmp_path_factory.mktemp("whole"), log_every=2)
    with evaluations() as case.sizes:
        case.result = case.run()
    return case


@pytest.mark.parametrize("sampler", ["repaint", "langevin"])
def test_photos_keep_their_sizes_and_their_known_pixels(whole, tmp_path, sampler):
    case = whole
    if sampler == "langevin":
        case = quick(tile_case(tmp_path))
        case.result = case.run()
    assert (case.result.status, case.result.lines("error")) == (0, [])
    written, masked, masks = (case.written(k) for k in ("inpainted", "gt_masked", "gt_keep_mask"))
    assert {name: picture.shape[1::-1] for name, picture in written.items()} == SIZES
    for name, picture in written.items():
        original, hole = np.asarray(Image.open(case.folder / "gts" / name)), hole_of(name)
        np.testing.assert_array_equal(picture[~hole], original[~hole])
        np.testing.assert_array_equal(masked[name], np.where(hole[..., None], 0, original))
        np.testing.assert_array_equal(masks[name] == 0, np.repeat(hole[..., None], 3, 2))
        for left, top, right, bottom in HOLES[name]:
            box = np.s_[top:bottom, left:right]
            assert (picture[box] != original[box]).mean() > 0.9


def test_only_windows_with_holes_are_computed_and_the_plan_says_how_many(whole):
    each = [len(tiles.find_windows(tiles.padded(hole_of(name), SIZE), SIZE)) for name in SIZES]
    assert each[0] > 8 and each[1:] == [0, 1, 3]
    assert whole.sizes == [n for n in each if n for _ in range(EVALUATIONS)]
    assert f"5 network evaluations per image, {3 * EVALUATIONS} in all\n" in whole.result.out
    number = sum(each)
    line = f"{number} windows of 32x32 over the holes, in each evaluation of its image: "
    assert f"{line}{number * EVALUATIONS} windows to compute\n" in whole.result.out
    assert whole.record()["evaluations"] == 3 * EVALUATIONS
    dry = whole.run("--dry-run", "--overwrite")
    assert f"{line}{number * EVALUATIONS} windows to compute\n" in dry.out
    assert line not in whole.run("--dry-run").out  # nothing is left to compute


@pytest.mark.parametrize("sampler", ["repaint", "langevin"])
def test_a_photo_of_the_windows_size_is_filled_as_a_crop_is(tmp_path, sampler):
    case = small_case(tmp_path, images=1)
    if sampler == "langevin":
        quick(case)
    for path in (tmp_path / "masks").iterdir():
        mask = np.full((SIZE, SIZE), 255, np.uint8)
        mask[10:20, 8:25] = 0
        Image.fromarray(mask).save(path)
    (crop,) = case.finish().values()
    case.dataset["fit"] = "tile"
    case.write_to("tiled")
    (tile,) = case.finish().values()
    hole = mask == 0
    assert np.abs(crop[hole].astype(int) - tile[hole]).max() <= 1


@pytest.mark.parametrize("most", [1, 4])
def test_results_do_not_depend_on_batches_of_windows(whole, tmp_path, most):
    case = tile_case(tmp_path, log_every=2)
    with patch.object(denoiser, "AT_A_TIME", most * SIZE**2), evaluations() as sizes:
        written = case.finish()
    assert max(sizes) == most
    for name, picture in whole.written().items():
        assert np.abs(written[name].astype(int) - picture).max() <= 1


@pytest.mark.parametrize("sampler, at", [("repaint", 1), ("repaint", 4), ("langevin", 7)])
def test_a_stopped_photo_goes_on_where_it_was(tmp_path, sampler, at):
    cases = [tile_case(tmp_path / name, "a", log_every=2) for name in ("whole", "stopped")]
    whole, stopped = map(quick, cases) if sampler == "langevin" else cases
    with evaluations() as sizes:
        whole.finish()
    with evaluations(at, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert stopped.run().status == 128 + signal.SIGTERM
    assert len(states(stopped)) == 1 and outputs(stopped) == {}
    with evaluations() as rest:
        stopped.finish()
    assert len(rest) == len(sizes) - at
    assert_equal(outputs(whole), stopped)


def test_very_many_windows_are_computed_in_parts(tmp_path):
    """Each part is a view with numbers of its own, and the photo is the same but for its holes."""
    case = tile_case(tmp_path, "ad", log_every=2)
    seeds = []
    sample = PixelInpainter.sample

    def noted(inpainter, gt, keep_mask, streams, **options):
        seeds.extend(streams)
        return sample(inpainter, gt, keep_mask, streams, **options)

    with patch.object(tiles, "MOST", 2), patch.object(PixelInpainter, "sample", noted):
        written = case.finish()
        views = [part for name in "ad" for part in tiles.find_tiles(hole_of(f"{name}.png"), SIZE)]
    assert len(seeds) == len(set(seeds)) == len(views) > 3
    for name, picture in written.items():
        original, hole = np.asarray(Image.open(tmp_path / "gts" / name)), hole_of(name)
        np.testing.assert_array_equal(picture[~hole], original[~hole])
        assert (picture[hole] != original[hole]).mean() > 0.9


def test_it_may_start_from_a_picture(tmp_path):
    case = quick(tile_case(tmp_path, "ac", start_from={"t": 400}))
    started = case.finish()
    del case.config["start_from"]
    plain = case.finish()
    assert all((started[name] != plain[name]).any() for name in plain)


def test_samples_of_a_photo_differ(tmp_path):
    first, second = tile_case(tmp_path, "c", samples_per_image=2).finish().values()
    assert (first != second).any()


def test_the_film_shows_the_photo(whole):
    frames = {path.parent.name: Image.open(path).size for path in whole.out.rglob("*_x0.png")}
    assert frames == {"a": SIZES["a.png"], "c": (SIZE, SIZE), "d": SIZES["d.png"]}
    frame = min((whole.out / "process").rglob("d/*_xt.png"))
    photo, shown = (np.asarray(Image.open(p)) for p in (whole.folder / "gts" / "d.png", frame))
    changed = (photo != shown).any(axis=2)
    (part,) = tiles.find_tiles(hole_of("d.png"), SIZE)
    assert changed[part.covered].mean() > 0.9
    assert np.abs(photo.astype(int) - shown)[~part.covered].max() <= 1  # to_bytes truncates


def test_the_preview_shows_the_photo_with_its_holes(tmp_path):
    case = tile_case(tmp_path, "a")
    result = case.run("--preview", str(tmp_path / "preview.png"))
    assert (result.status, result.lines("error")) == (0, [])
    assert (tmp_path / "preview.png").exists()


# ---- What serves better otherwise, and what is refused ----------------------------------------


def warned(tmp_path: Path, hole: np.ndarray) -> list[str]:
    case = tile_case(tmp_path, "")
    noise(*hole.shape[::-1]).save(tmp_path / "gts" / "x.png")
    Image.fromarray(~hole).save(tmp_path / "masks" / "x.png")
    result = case.run("--dry-run")
    assert result.status == 0
    return result.lines("warning")


def test_a_mask_of_most_of_the_photo_and_a_wide_hole_are_warned_of(tmp_path):
    hole = np.zeros((100, 100), bool)
    hole[10:90, 10:90] = True
    wide, most = warned(tmp_path, hole)
    assert "x.png, have holes wider than 32 pixels, the window of the network" in wide
    assert "x.png, are to be filled in for the most part, but a network that sees 32x32" in most
    for line in (wide, most):
        assert line.endswith("fit: region, a larger model or method: latent serves better")


@pytest.mark.parametrize("side, lines", [(SIZE, 0), (SIZE + 1, 1)])
def test_holes_as_wide_as_a_window_are_not_warned_of(tmp_path, side, lines):
    hole = np.zeros((100, 100), bool)
    hole[5 : 5 + side, 20 : 20 + side] = True
    assert len(warned(tmp_path, hole)) == lines


@pytest.mark.parametrize("hole", ["a stripe", "three of four pixels"])
def test_long_scratches_and_fine_patterns_are_not_warned_of(tmp_path, hole):
    holes = np.zeros((100, 200), bool)
    if hole == "a stripe":
        holes[20:52] = True  # as long as the photo, but not wider than a window
    else:
        holes = ~(np.indices((100, 200)) % 2 == 0).all(axis=0)
    lines = warned(tmp_path, holes)
    assert not any("window" in line for line in lines)


def test_with_latent_diffusion_it_is_refused(tmp_path):
    case = tile_case(tmp_path, "a")
    path = tmp_path / "latent.yml"
    path.write_text(
        "method: latent\nmodel_path: x.ckpt\ndata: {eval: {x: {gt_path: g, mask_path: m, "
        "fit: tile, paths: {srs: o/a, lrs: o/b, gt_keep_masks: o/c}}}}\n"
    )
    case.conf_path = lambda: str(path)
    line = assert_refused(case.run())
    assert "fit" in line and "crop or region with method: latent, whose" in line


@pytest.mark.parametrize("key, value", [("random_flip", True), ("batch_size", 2)])
def test_what_does_not_go_with_it_is_refused(tmp_path, key, value):
    case = tile_case(tmp_path, "a")
    case.dataset[key] = value
    line = assert_refused(case.run())
    assert key in line and "with fit: tile" in line


def test_a_mask_of_another_size_is_refused(tmp_path):
    case = tile_case(tmp_path, "a")
    Image.new("L", (50, 50), 255).save(tmp_path / "masks" / "a.png")
    line = assert_refused(case.run())
    assert "fit: tile needs masks in the size of their images" in line


# ---- Memory -----------------------------------------------------------------------------------


def test_a_view_holds_no_more_pixels_than_its_windows(tmp_path):
    """Of a photo of 24 megapixels, a scratch from side to side takes a thin row of them."""
    image = np.zeros((4000, 6000, 3), np.uint8)
    keep = np.ones((4000, 6000), bool)
    keep[2000:2003] = False
    photo = TiledPhoto(image, keep, 64)
    view = photo.view(0)
    assert photo.views == 1 and view.image.shape == (3, 1, 64 * 6000)
    assert view.windows.dtype == torch.int32
    result = np.full((1, 64 * 6000, 3), 9, np.uint8)
    np.testing.assert_array_equal(photo.finish([result])[..., 0] == 9, ~keep)


def test_dust_everywhere_in_a_huge_photo_comes_in_parts():
    hole = np.zeros((1500, 3000), bool)
    hole[5::25, 5::25] = hole[6::25, 5::25] = True
    parts = tiles.find_tiles(hole, SIZE)
    assert len(parts) > 3
    assert all(len(part.windows) < 1.2 * tiles.MOST for part in parts)


def test_the_network_is_asked_about_a_window(tmp_path):
    """It gets squares, though the sampler has one row of pixels."""
    case = quick(tile_case(tmp_path))
    with evaluations() as sizes:
        result = case.run("--check-weights")
    assert result.status == 0 and "everything is in order" in result.out
    assert sizes and set(sizes) == {1} and not case.out.exists()
