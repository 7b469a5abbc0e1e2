"""The process of a picture: which frames, their files, and the animations made of them."""

import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from guided_diffusion.config import ScheduleConfig
from guided_diffusion.output import film
from guided_diffusion.output.film import (
    AHEAD,
    MARK,
    WALKED,
    FilmLog,
    Stage,
    due_positions,
    durations,
    encode_gif,
    spread,
)
from guided_diffusion.scheduler import PAPER_SCHEDULE, jump_times, plain_times
from tests.support.cloud_emulation import Cloud
from tests.support.films import JUMP, LEVELS, frames_of, log

ENDS = [1, 2, 3, 6, 7, 8]


def grey(level: float, images: int = 1, side: int = 8) -> torch.Tensor:
    """Plain pictures; level -1 is black, 1 white."""
    return torch.full((images, 3, side, side), level)


def write(process: FilmLog, name: str = "x.png", ends: list[int] = ENDS, side: int = 8) -> None:
    """Evaluations of a picture; the estimates get darker, the noisy pictures lighter."""
    for end in ends:
        level = end / 10
        process.write([name], end, x_t=grey(level, side=side), pred_x0=grey(-level, side=side))


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- Which pictures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (1, [1, 2, 3, 6, 7, 8]),
        (2, [2, 6, 8]),  # 4 is on the way up, so that 6 stands for both
        (3, [3, 6, 8]),  # 8: the last one, always
        (4, [6, 8]),
        (5, [6, 8]),
        (7, [7, 8]),
        (8, [8]),
        (100, [8]),
    ],
)
def test_due_are_the_first_evaluations_after_each_multiple_and_the_last(every, due):
    assert due_positions(JUMP, every) == due


def test_the_papers_setting_every_50_transitions_gives_92_frames():
    due = due_positions(jump_times(PAPER_SCHEDULE), 50)
    assert (len(due), due[0], due[-2:]) == (92, 50, [4560, 4570])


def test_plain_sampling_is_shown_at_the_multiples_themselves():
    assert due_positions(plain_times(10), 4) == [4, 8, 10]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 3), st.integers(1, 40))
def test_due_positions_are_what_their_description_says(t_T, length, count, every):
    params = ScheduleConfig(t_T=t_T, n_sample=1, jump_length=length, jump_n_sample=count)
    times = jump_times(params)
    ends = [i + 1 for i, (t, u) in enumerate(pairwise(times)) if u < t]
    first_after = {
        min(end for end in ends if end >= multiple)  # there is one: the last transition is down
        for multiple in range(every, len(times), every)
    }
    assert due_positions(times, every) == sorted(first_after | {ends[-1]})


def test_only_what_is_due_is_written(tmp_path):
    process = log(tmp_path, every=2)
    assert [end for end in range(10) if process.is_due(end)] == [2, 6, 8]
    write(process)
    frames = {f"x/{end}_{kind}.png" for end in ("000002", "000006", "000008") for kind in KINDS}
    assert files(tmp_path).keys() == frames


# ---- Frames ----------------------------------------------------------------------------------

KINDS = ("x0", "xt")


def test_frames_hold_the_bytes_that_a_result_would(tmp_path):
    # Truncated, as results are: -1 -> 0, 0 -> 127, 1 -> 255; beyond, clamped.
    x_t, pred_x0 = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    x_t[0, 0], x_t[0, 1] = -1, 3
    pred_x0[1, 2] = 1
    log(tmp_path).write(["a.png", "sub/b.png"], 7, x_t, pred_x0)
    pixels = {name: np.asarray(Image.open(tmp_path / name)) for name in files(tmp_path)}
    assert all(array.shape == (8, 8, 3) for array in pixels.values())
    assert {name: array[3, 5].tolist() for name, array in pixels.items()} == {
        "a/000007_x0.png": [127, 127, 127],
        "a/000007_xt.png": [0, 255, 127],
        "sub/b/000007_x0.png": [127, 127, 255],
        "sub/b/000007_xt.png": [127, 127, 127],
    }


@pytest.mark.parametrize("stopped", [1, 3, 6, 7])
def test_a_run_that_was_stopped_writes_what_an_undisturbed_one_writes(tmp_path, stopped):
    """Also where it goes on from a state that is older than the last frame."""
    for folder, parts in (
        ("undisturbed", [ENDS]),
        ("stopped", [range(1, stopped + 1), range(max(stopped - 2, 1), 9)]),
    ):
        log(tmp_path / folder, every=2).begin("x.png")
        for part in parts:
            process = log(tmp_path / folder, every=2)  # of another run
            write(process, ends=[end for end in ENDS if end in part])
        process.finish("x.png")
    assert files(tmp_path / "undisturbed") == files(tmp_path / "stopped")
    assert len(files(tmp_path / "stopped")) == 2 * 3 + 2


def test_what_an_earlier_run_wrote_of_a_picture_is_removed_when_it_begins_afresh(tmp_path):
    for name in ("x.png", "x/y.png", "x2.png"):
        write(log(tmp_path), name)
        log(tmp_path).finish(name)
    (tmp_path / "x" / "notes.txt").write_text("somebody's own")
    before = files(tmp_path)
    log(tmp_path, every=5).begin("x.png")
    frames = {f"x/{end:06}_{kind}.png" for end in ENDS for kind in KINDS}
    assert before.keys() - files(tmp_path).keys() == frames | {"x.gif", "x.webp"}
    log(tmp_path).begin("x.png")
    log(tmp_path / "not there").begin("x.png")


NAMES = (
    *("x.png", "sub/x.png", "a.b.c.png", "x.gif.png", "x.webp.png", "x.GIF.png", "x=2Egif.png"),
    *("x/y.png", "x/000001_x0.png", "x/000001_x0.png.png", "x.gif/y.png", "x y [1]?.png"),
)


def test_no_name_gets_in_the_way_of_another(tmp_path):
    process = FilmLog(str(tmp_path), 1, [0, -1], LEVELS)
    levels = {name: i / 20 for i, name in enumerate(NAMES)}
    for name, level in levels.items():
        process.begin(name)
        process.write([name], 1, x_t=grey(level), pred_x0=grey(0))
    for name in NAMES:
        process.finish(name)
    assert len(files(tmp_path)) == 4 * len(NAMES)
    for name, level in levels.items():
        with Image.open(process.animation(name)) as animation:
            pixel = animation.convert("RGB").getpixel((280, 100))
        assert pixel == pytest.approx([127.5 * (1 + level)] * 3, abs=3)


def test_files_go_by_the_pictures_name(tmp_path):
    process = log(tmp_path)
    for name in ("sub/x.png", "a.b.c.png", "x.gif.png", "y.WebP.png"):
        write(process, name, ends=[8])
        process.finish(name)
    stems = {path.removesuffix(".webp") for path in files(tmp_path) if path.endswith(".webp")}
    assert stems == {"sub/x", "a.b.c", "x=2Egif", "y=2EWebP"}
    assert process.animation("sub/x.png") == f"{tmp_path}/sub/x.webp"


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "x").write_text("a file in the way")
    with pytest.raises(OSError):
        write(log(tmp_path))


def test_in_a_store_all_is_as_on_this_machine(cloud: Cloud, tmp_path):
    for folder in ("gs://bucket/log/process/", str(tmp_path)):
        process = log(folder, every=5)
        for _ in range(2):  # the second time there is something to remove
            process.begin("sub/x [1].png")
            write(process, "sub/x [1].png")
            process.finish("sub/x [1].png")
    blobs = {name: cloud.blobs[f"gs://bucket/{name}"].data for name in cloud.names("gs://bucket")}
    assert blobs == {f"log/process/{name}": data for name, data in files(tmp_path).items()}
    assert len(blobs) == 2 * 2 + 2


# ---- Animations ------------------------------------------------------------------------------


def shown_for(path: Path) -> list[int]:
    """For how many ms each frame is shown."""
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0  # again and again
        return [f.info["duration"] for f in ImageSequence.Iterator(animation) if f.load()]


def mark_of(frame: np.ndarray) -> np.ndarray:
    """The centre of the mark's colour below pictures of 64x64, x and y."""
    rows, columns = np.nonzero(abs(frame[235:] - MARK).sum(axis=2) < 100)
    assert 60 < len(rows) < 130  # a disc of radius 5.5 has 95
    return np.array([columns.mean(), rows.mean() + 235])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A picture's process of six frames of 64x64, with its animations."""
    folder = tmp_path_factory.mktemp("made")
    write(log(folder), side=64)
    log(folder).finish("x.png")
    return folder


both = pytest.mark.parametrize("kind", ["gif", "webp"])


@both
def test_an_animation_has_all_frames_and_rests_at_its_end(made, kind):
    path = made / f"x.{kind}"
    assert shown_for(path) == [1000] * 5 + [4000]
    assert {frame.shape for frame in frames_of(path)} == {(358, 432, 3)}


@both
def test_the_mark_is_on_the_curve_at_the_time_that_is_shown(made, kind):
    # The curve goes from (16, 246), time 3, to (416, 342), time -1, in 8 transitions:
    # 50 pixels to the right with each, 24 down with each time.
    expected = [(66, 270), (116, 294), (166, 318), (316, 294), (366, 318), (416, 342)]
    marks = [mark_of(frame) for frame in frames_of(made / f"x.{kind}")]
    assert np.abs(np.array(marks) - expected).max() < 1


@both
def test_left_is_the_estimate_and_right_the_noisy_picture(made, kind):
    for end, frame in zip(ENDS, frames_of(made / f"x.{kind}"), strict=True):
        left, right = frame[38:230, 16:208], frame[38:230, 224:416]
        for part, level in ((left, 127.5 - 12.75 * end), (right, 127.5 + 12.75 * end)):
            assert abs(part[2:-2, 2:-2] - level).max() < 6


@pytest.mark.parametrize(("position", "mark"), [(1, 116), (2, 216), (3, 316)])
def test_the_curve_is_darker_where_it_is_walked(position, mark):
    blank = Image.new("RGB", (64, 64))
    frame = np.asarray(Stage(plain_times(4), LEVELS, (64, 64)).draw(position, blank, blank))
    # Plain sampling is a straight line, here from (16, 246) to (416, 342).
    heights = {x: round(246 + 0.24 * (x - 16)) for x in range(20, 412)}
    darkest = {x: frame[y - 1 : y + 2, x].min(axis=0) for x, y in heights.items()}
    walked = [colour for x, colour in darkest.items() if x < mark - 7]
    ahead = [colour for x, colour in darkest.items() if x > mark + 7]
    assert abs(np.min(walked, axis=0) - WALKED).max() < 10 and np.max(walked, axis=0)[0] < 150
    assert abs(np.min(ahead, axis=0) - AHEAD).max() < 10


@pytest.mark.parametrize(
    ("image_size", "side"), [(32, 160), (64, 192), (128, 256), (160, 160), (256, 256), (512, 256)]
)
def test_pictures_are_shown_at_a_size_for_eyes(image_size, side):
    noise = Image.effect_noise((image_size, image_size), 80).convert("RGB")
    white = Image.new("RGB", noise.size, "white")
    frame = Stage([0, -1], LEVELS, (image_size, image_size)).draw(1, noise, white)
    assert frame.size == (2 * side + 48, side + 166)
    pixels = np.asarray(frame)[38 : 38 + side]
    expected = noise if image_size == side else noise.resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[:, 16 : 16 + side], np.asarray(expected))
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16 + side :] == 255).all()


def test_the_caption_gives_time_and_noise_of_the_noisy_picture():
    stage = Stage(JUMP, LEVELS, (64, 64))
    assert [stage.caption(end) for end in ENDS] == [
        "t = 2 · noise 83 %",
        "t = 1 · noise 50 %",
        "t = 0 · noise 10 %",
        "t = 1 · noise 50 %",
        "t = 0 · noise 10 %",
        "finished",
    ]


def test_a_frame_leaves_no_trace_on_the_next():
    stage = Stage(JUMP, LEVELS, (64, 64))
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first = stage.draw(1, red, blue).tobytes()
    stage.draw(8, blue, red)
    assert stage.draw(1, red, blue).tobytes() == first


@pytest.mark.parametrize("lost", ["000002_x0.png", "000008_xt.png"])
def test_a_moment_that_is_not_complete_is_left_out(tmp_path, lost):
    write(log(tmp_path))
    os.remove(tmp_path / "x" / lost)
    log(tmp_path).finish("x.png")
    assert len(frames_of(tmp_path / "x.webp")) == len(frames_of(tmp_path / "x.gif")) == 5


def test_without_frames_there_is_no_animation(tmp_path):
    log(tmp_path).finish("x.png")
    assert files(tmp_path) == {}


def test_a_damaged_frame_is_named_and_left_out(tmp_path):
    write(log(tmp_path))
    (tmp_path / "x" / "000003_x0.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="x/000003_x0.png.* damaged"):
        log(tmp_path).finish("x.png")
    assert len(frames_of(tmp_path / "x.webp")) == len(frames_of(tmp_path / "x.gif")) == 5


@pytest.mark.parametrize("number", [2, 3, 9, 40, 92, 100])
def test_an_animation_lasts_5_to_15_seconds_whatever_its_frames(number):
    times = durations(number)
    assert len(times) == number and 5000 <= sum(times) <= 15000
    assert times[-1] >= 3000 and min(times) >= 20  # browsers slow down what is faster
    assert all(each % 10 == 0 for each in times)  # GIF counts hundredths of a second


def test_of_too_many_frames_some_are_taken_at_equal_distances():
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread([1, 2, 3, 4, 5, 6, 7, 8], 4) == [2, 4, 6, 8]
    assert spread("abcde", 2) == ["b", "e"]
    taken = spread(range(2410), 100)
    assert len(taken) == 100 and taken[-1] == 2409
    assert {b - a for a, b in pairwise(taken)} == {24, 25}


def test_a_long_process_is_shown_in_fewer_frames_and_fewest_as_gif(tmp_path, monkeypatch):
    monkeypatch.setattr(film, "WEBP_FRAMES", 6)
    monkeypatch.setattr(film, "GIF_FRAMES", 3)
    process = FilmLog(str(tmp_path), 1, plain_times(12), [0.5] * 12)
    for position in range(1, 13):
        process.write(["x.png"], position, grey(0, side=64), grey(0, side=64))
    process.finish("x.png")
    for kind, shown in (("webp", [2, 4, 6, 8, 10, 12]), ("gif", [4, 8, 12])):
        columns = [mark_of(frame)[0] for frame in frames_of(tmp_path / f"x.{kind}")]
        assert columns == pytest.approx([16 + 400 / 12 * position for position in shown], abs=1)


def test_the_colours_of_a_gif_are_for_the_mark_and_for_smooth_pictures_not_for_noise():
    """Of 160 colours, a slope of 256 greys should get enough to be off by a level or two."""
    slope = Image.linear_gradient("L").convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    stage = Stage(plain_times(4), LEVELS, (256, 256))
    frames = [stage.draw(position, slope, Image.fromarray(noise)) for position in (1, 2, 3, 4)]
    with Image.open(io.BytesIO(encode_gif(frames))) as gif:
        shown = [np.asarray(f.convert("RGB"), int) for f in ImageSequence.Iterator(gif)]
    # 528 pixels and 96 from (16, 310) on
    for frame, (x, y) in zip(shown, [(148, 334), (280, 358), (412, 382), (544, 406)], strict=True):
        assert frame[y, x].tolist() == list(MARK)
        assert abs(frame[38:294, 16:272] - np.asarray(slope, int)).mean() < 1.5
