"""The portraits are repeatable, symmetric to the byte, distinct and varied."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "data" / "make_portraits.py"


def load_script():
    """Import the stand-alone script, which lies outside every package."""
    spec = importlib.util.spec_from_file_location("make_portraits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


make_portraits = load_script()


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """500 portraits, shape [500, 64, 64, 3], int16 so that differences do not wrap."""
    return np.stack([np.asarray(p) for p in make_portraits.portraits(0, 500)]).astype(np.int16)


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_portrait_is_rgb_of_the_asked_size():
    for size in (8, 64, 66):
        portrait = make_portraits.draw_portrait(0, 0, size)
        assert (portrait.mode, portrait.size) == ("RGB", (size, size))


@pytest.mark.parametrize("size", [0, 6, 63, -64])
def test_a_size_that_cannot_be_mirrored_is_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        make_portraits.draw_portrait(0, 0, size)


def test_seed_and_index_alone_fix_every_byte(many):
    again = [np.asarray(p) for p in make_portraits.portraits(0, 3, start=7)]
    assert np.array_equal(np.stack(again), many[7:10])
    other_seed = np.asarray(make_portraits.draw_portrait(1, 7))
    assert not np.array_equal(other_seed, many[7])


def test_left_half_mirrors_the_right_half_to_the_byte(many):
    assert np.array_equal(many, many[:, :, ::-1])


def test_portraits_are_distinct(many):
    assert len({portrait.tobytes() for portrait in many}) == len(many)
    neighbours = np.abs(many[1:] - many[:-1]).mean(axis=(1, 2, 3))
    assert neighbours.min() > 5 and neighbours.mean() > 40  # levels of 255


@pytest.mark.parametrize(
    ("rows", "columns", "floor"),
    [
        pytest.param(slice(38, 41), slice(36, 39), 30, id="skin: beside the nose"),
        pytest.param(slice(10, 13), slice(28, 36), 40, id="hair: above the forehead"),
        pytest.param(slice(60, 64), slice(46, 54), 40, id="clothes: the shoulder"),
        pytest.param(slice(0, 3), slice(0, 4), 15, id="background: the corner"),
    ],
)
def test_every_region_varies_in_colour(many, rows, columns, floor):
    colours = many[:, rows, columns].mean(axis=(1, 2))  # [500, 3]
    assert (colours.std(axis=0) > floor).all()


def test_every_option_of_every_trait_appears():
    rng = np.random.default_rng(0)
    traits = [make_portraits.choose_traits(rng) for _ in range(600)]
    seen = {
        name: {getattr(t, name) for t in traits}
        for name in ("cut", "fringe", "beard", "mouth", "glasses", "hat", "outfit", "backdrop")
    }
    assert seen["cut"] == set(make_portraits.CUTS)
    sizes = {name: len(values) for name, values in seen.items() if name != "cut"}
    assert sizes == {
        "fringe": 5,
        "beard": 5,
        "mouth": 4,
        "glasses": 3,
        "hat": 5,
        "outfit": 6,
        "backdrop": 3,
    }


def test_neighbouring_colours_stand_clear():
    rng = np.random.default_rng(0)
    palette = [(0, 0, 0), (100, 0, 0), (200, 0, 0)]
    chosen = {make_portraits.pick_apart(rng, palette, [(10, 0, 0)], 80) for _ in range(50)}
    assert chosen == set(palette[1:])
    assert make_portraits.pick_apart(rng, palette, [(10, 0, 0)], 500) == palette[2]


@pytest.mark.slow
def test_the_command_writes_what_the_function_draws(tmp_path):
    folder = tmp_path / "deep" / "folder"
    done = run_script(folder, "--number", 3, "--seed", 5, "--start", 2, "--size", 32)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["000002.png", "000003.png", "000004.png"]
    expected = make_portraits.draw_portrait(5, 3, 32)
    with Image.open(folder / "000003.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--number", -1), ("--seed", -1), ("--start", -1), ("--size", 63)]
)
def test_the_command_refuses_bad_numbers_in_one_line(tmp_path, options):
    done = run_script(tmp_path / "out", *options)
    assert done.returncode == 2
    assert str(options[1]) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_the_command_refuses_a_folder_it_cannot_write(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    done = run_script(file, "--number", 1)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1
