"""Whole photos (`fit: region`), the process (`log_every`) and the report, in runs of `test.py`."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageCms

from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.output.film import FilmLog
from guided_diffusion.run import worker
from guided_diffusion.run.plan import stream_of_view
from tests.support.case import EVALUATIONS, Case, assert_same
from tests.support.pictures import noise
from tests.support.small_runs import (
    assert_equal,
    assert_refused,
    evaluations,
    one_thread,
    outputs,
    small_case,
)

HOLES = {  # name -> boxes (left, top, right, bottom)
    "a.png": [(10, 12, 20, 22), (90, 50, 99, 60)],  # too far apart for one region
    "b.png": [],
    "c.png": [(0, 0, 8, 8)],
}
SIZES = {"a.png": (101, 67), "b.png": (40, 50), "c.png": (33, 48)}
REGIONS = 3  # in all


@pytest.fixture(autouse=True, scope="module")
def as_in_processes() -> Iterator[None]:
    with one_thread():
        yield


def photo_case(folder: Path, **keys: object) -> Case:
    """Three photos with two holes, none and one."""
    case = small_case(folder, **keys)
    for kind in ("gts", "masks"):
        for path in (folder / kind).iterdir():
            path.unlink()
    for seed, (name, holes) in enumerate(HOLES.items()):
        noise(*SIZES[name], seed=seed).save(folder / "gts" / name)
        mask = Image.new("L", SIZES[name], 255)
        for hole in holes:
            mask.paste(0, hole)
        mask.save(folder / "masks" / name)
    case.dataset |= {"fit": "region"}
    return case


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Case:
    """An undisturbed run, all three at a time."""
    case = photo_case(tmp_path_factory.mktemp("whole"), batch_size=3, log_every=2)
    with evaluations() as case.sizes:
        case.result = case.run()
    return case


def interrupt(case: Case, at: int) -> None:
    with evaluations(at, lambda: os.kill(os.getpid(), signal.SIGTERM)) as sizes:
        assert case.run().status == 128 + signal.SIGTERM
    assert len(sizes) == at


# ---- Whole photos -----------------------------------------------------------------------------


def test_photos_keep_their_sizes_and_their_known_pixels(whole):
    assert (whole.result.status, whole.result.lines("error")) == (0, [])
    written, inputs, masked = (whole.written(k) for k in ("inpainted", "gt", "gt_masked"))
    assert {name: picture.shape[1::-1] for name, picture in written.items()} == SIZES
    for name, holes in HOLES.items():
        original = np.asarray(Image.open(whole.folder / "gts" / name))
        hole = np.zeros(original.shape, bool)
        for left, top, right, bottom in holes:
            hole[top:bottom, left:right] = True
        np.testing.assert_array_equal(inputs[name], original)
        np.testing.assert_array_equal(masked[name], np.where(hole, 0, original))
        np.testing.assert_array_equal(written[name][~hole], original[~hole])
        assert np.mean(written[name] != original) == pytest.approx(hole.mean(), rel=0.1)


def test_the_first_regions_are_a_batch_then_the_second(whole):
    assert whole.sizes == [2] * EVALUATIONS + [1] * EVALUATIONS
    total = EVALUATIONS * REGIONS
    line = f"5 network evaluations per region, {total} in all for 3 regions\n"
    assert line in whole.result.out
    assert whole.record()["evaluations"] == total


def test_each_region_has_random_numbers_of_its_own(tmp_path):
    """Two holes in a photo of one colour are filled differently."""
    case = photo_case(tmp_path)
    Image.new("RGB", (101, 67), "grey").save(tmp_path / "gts" / "a.png")
    first, second = (case.finish()["a.png"][y : y + 9, x : x + 9] for x, y in ((10, 12), (90, 50)))
    assert (first != second).mean() > 0.5


def test_no_two_regions_of_any_photos_share_random_numbers(tmp_path):
    case = photo_case(tmp_path, batch_size=3)
    seeds = []
    sample = PixelInpainter.sample

    def noted(inpainter, gt, keep_mask, streams, **options):
        seeds.extend(streams)
        return sample(inpainter, gt, keep_mask, streams, **options)

    with patch.object(PixelInpainter, "sample", noted):
        case.finish()
    seed = case.config["seed"]
    assert seeds[:2] == [seed, seed + 2] and len(set(seeds)) == REGIONS  # a and c, then a again
    streams = [stream_of_view(stream, k) for stream in (5, 6, 2**62 + 2**52) for k in range(50)]
    assert len(set(streams)) == 150 and max(streams) < 2**63
    assert [stream_of_view(stream, 0) for stream in (5, 2**40)] == [5, 2**40]


@pytest.mark.parametrize("at", [3, EVALUATIONS, EVALUATIONS + 2])
def test_a_stopped_photo_goes_on_in_the_region_where_it_was(whole, tmp_path, at):
    case = photo_case(tmp_path, batch_size=3, log_every=2)
    interrupt(case, at)
    assert outputs(case) == {}
    with evaluations() as sizes:
        case.finish()
    assert sizes == ([2] * EVALUATIONS + [1] * EVALUATIONS)[at:]
    assert_equal(outputs(whole), case)
    assert process_files(case) == process_files(whole)


def test_finished_photos_are_skipped_and_their_regions_are_remembered(tmp_path):
    case = photo_case(tmp_path)
    case.finish()
    (case.out / "inpainted" / "c.png").unlink()
    with evaluations() as sizes:
        result = case.run()
    assert sizes == [1] * EVALUATIONS
    assert "5 network evaluations per region, 15 in all for 3 regions\n" in result.out
    assert "2 of 3 are finished and skipped" in result.out
    told = case.record()["evaluations"]
    case.run()
    assert case.record()["evaluations"] == told == EVALUATIONS * REGIONS


def test_the_bar_ends_at_its_total(tmp_path):
    case = photo_case(tmp_path, batch_size=3, show_progress=True)
    bar = case.run().err.split("\r")[-1]
    assert re.match(r"image 1-3 of 3: 100%\|.*\| 15/15 \[", bar), bar


def test_a_state_is_saved_in_time_and_where_more_is_to_come(tmp_path):
    with patch.object(worker, "save_state") as save:
        small_case(tmp_path / "crop", 2).finish()
        assert save.call_count == 0
        photo_case(tmp_path / "photos", batch_size=3).finish()
        assert save.call_count == 2  # after the first regions, and after the second


def test_samples_of_a_photo_differ(tmp_path):
    case = photo_case(tmp_path, samples_per_image=2)
    written = case.finish()
    assert sorted(written) == ["a_0.png", "a_1.png", "b_0.png", "b_1.png", "c_0.png", "c_1.png"]
    assert (written["a_0.png"] != written["a_1.png"]).any()
    np.testing.assert_array_equal(written["b_0.png"], written["b_1.png"])


# ---- The process ------------------------------------------------------------------------------


def process_files(case: Case) -> dict[str, bytes]:
    paths = [path for path in (case.out / "process").rglob("*") if path.is_file()]
    return {path.relative_to(case.out).as_posix(): path.read_bytes() for path in paths}


def test_the_process_of_each_region_is_shown(whole):
    # Times 2 1 2 1 0 1 0 -1: evaluations end after 1, 3, 4, 6 and 7 transitions.
    frames = [f"{number:06}_{kind}.png" for number in (3, 4, 6, 7) for kind in ("x0", "xt")]
    names = ("a_region1", "a_region2", "c")
    animations = {f"process/{name}.{kind}" for name in names for kind in ("gif", "webp")}
    files = process_files(whole)
    assert set(files) == {f"process/{name}/{f}" for name in names for f in frames} | animations
    last = np.asarray(Image.open(whole.out / "process" / "c" / "000007_x0.png"))
    assert last.shape == (32, 32, 3)


def test_the_process_changes_no_result(tmp_path):
    shown, plain = (small_case(tmp_path / name, 2) for name in ("shown", "plain"))
    shown.config["log_every"] = 1
    assert_same(shown.finish(), plain.finish())
    last = Image.open(shown.out / "process" / "000000" / "000007_xt.png")
    np.testing.assert_array_equal(np.asarray(last), shown.written()["000000.png"])


def fill_up(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stopped_animation_is_made_by_the_next_run(tmp_path):
    """What is recorded as finished is never looked at again, so the animation comes first."""
    case = small_case(tmp_path, 2, log_every=1)
    with patch.object(FilmLog, "finish", fill_up):
        assert "No space left on device" in assert_refused(case.run())
    assert not (case.out / "inpainted").exists()
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == EVALUATIONS  # of the second image; the first was all but written
    assert len(list((case.out / "process").glob("*.webp"))) == 2


def test_a_frame_that_cannot_be_written_costs_no_evaluation(tmp_path):
    case = small_case(tmp_path, 1, log_every=1)
    calls = iter([lambda *_: None, lambda *_: None, fill_up])
    with patch.object(FilmLog, "write", lambda *arguments: next(calls)(*arguments)):
        assert_refused(case.run())
    with evaluations() as sizes:
        case.finish()
    assert len(sizes) == EVALUATIONS - 3


def test_what_was_shown_of_earlier_results_goes_with_them(tmp_path):
    case = photo_case(tmp_path, log_every=2)
    case.finish()
    mask = Image.new("L", SIZES["a.png"], 255)
    mask.paste(0, HOLES["a.png"][0])
    mask.save(tmp_path / "masks" / "a.png")
    case.finish("--set", "log_every=3")
    shown = {path for path in process_files(case) if path.startswith("process/a")}
    frames = {f"process/a/{n:06}_{kind}.png" for n in (3, 6, 7) for kind in ("x0", "xt")}
    assert shown == frames | {"process/a.gif", "process/a.webp"}
    assert '"process/a.webp"' in (case.out / "report.html").read_text()


def test_a_picture_that_starts_afresh_is_shown_afresh(tmp_path):
    case = small_case(tmp_path, 1, log_every=1)
    case.finish()
    (case.out / "inpainted" / "000000.png").unlink()
    case.finish("--set", "log_every=3")
    names = {path.name for path in (case.out / "process" / "000000").iterdir()}
    assert {name[:6] for name in names} == {"000003", "000006", "000007"}


# ---- The report -------------------------------------------------------------------------------


def test_the_report_links_what_the_run_has_written(whole):
    page = (whole.out / "report.html").read_text()
    for name in HOLES:
        for kind in ("inpainted", "gt_masked", "gt"):
            assert f'"{kind}/{name}"' in page
    assert '"process/a_region1.webp"' in page and '"process/c.webp"' in page
    assert "process/b" not in page
    assert f">{whole.record()['seed']}<" in page


def test_the_report_is_written_when_it_is_missing_or_out_of_date(tmp_path):
    case = small_case(tmp_path, 2)
    case.finish()
    report = case.out / "report.html"
    page, time = report.read_bytes(), report.stat().st_mtime_ns
    case.finish()
    assert report.stat().st_mtime_ns == time
    report.unlink()
    case.finish()
    assert report.read_bytes() == page
    case.config["seed"] += 1000
    interrupt(case, 2)
    assert not report.exists()  # what it showed is not there any more
    case.finish()
    assert report.read_bytes() != page


# ---- What belongs to a photo ------------------------------------------------------------------


def test_what_belongs_to_photos_comes_back_and_counts_as_finished(tmp_path):
    case = photo_case(tmp_path)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "Pinhole"
    photo = noise(*SIZES["a.png"])
    photo.putalpha(100)
    photo.save(tmp_path / "gts" / "a.png", icc_profile=profile, exif=exif)
    (warning,) = case.run().lines("warning")
    assert "masks/b.png, keep everything" in warning
    for kind in ("inpainted", "gt", "gt_masked"):
        with Image.open(case.out / kind / "a.png") as written:
            assert written.info["icc_profile"] == profile, kind
    with Image.open(case.out / "inpainted" / "a.png") as result:
        hole = np.zeros((67, 101), bool)
        for left, top, right, bottom in HOLES["a.png"]:
            hole[top:bottom, left:right] = True
        pixels = np.asarray(result)
        np.testing.assert_array_equal(pixels[..., 3], np.where(hole, 255, 100))
        np.testing.assert_array_equal(pixels[~hole], np.asarray(photo)[~hole])
        assert result.getexif()[0x010F] == "Pinhole"
    with Image.open(case.out / "gt_keep_mask" / "a.png") as mask:
        assert (mask.mode, mask.info) == ("RGB", {})
    assert "all were finished before" in case.run().out
    assert "are done again" in case.run("--overwrite").out


def test_a_photo_with_damaged_exif_is_told_once(tmp_path):
    case = photo_case(tmp_path)
    photo = noise(*SIZES["a.png"])
    photo.save(tmp_path / "gts" / "a.png", exif=b"Exif\0\0" + bytes(30))
    (warning,) = (line for line in case.run().lines("warning") if "EXIF" in line)
    assert f"{tmp_path}/gts/a.png: its EXIF data are damaged" in warning
    np.testing.assert_array_equal(case.written("gt")["a.png"], np.asarray(photo))
