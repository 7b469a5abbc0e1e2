"""`test.py --preview`: what is drawn of each pair, and what is refused."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from guided_diffusion import factory
from guided_diffusion.run import preview
from tests.support.case import Case
from tests.support.small_runs import assert_refused

GAP, CELL = preview.GAP, preview.CELL
SIZE = 32  # of the network
RED = np.array(preview.FILL_IN)


@pytest.fixture
def case(tmp_path) -> Case:
    """One blue image of the network's size, whose left half is to be filled in."""
    case = Case(tmp_path, images=1)
    Image.new("RGB", (SIZE, SIZE), "blue").save(tmp_path / "gts" / "000000.png")
    mask = Image.new("L", (SIZE, SIZE), 255)
    mask.paste(0, (0, 0, SIZE // 2, SIZE))
    mask.save(tmp_path / "masks" / "000000.png")
    return case


def drawn(case: Case) -> np.ndarray:
    """The preview, (H, W, 3); nothing else may be written, nor a network be built."""
    out = case.folder / "preview.png"
    conf_path, before = case.conf_path(), set(case.tree())
    with patch.object(factory, "build_inpainter", pytest.fail):
        result = case.run("--preview", str(out))
    assert (result.status, result.lines("error")) == (0, [])
    assert set(case.tree()) - before == {str(out)} and conf_path in before
    assert result.out.startswith(f"written: {out} (")
    return np.asarray(Image.open(out))


def cell(sheet: np.ndarray, column: int) -> np.ndarray:
    left = GAP + column * (CELL + GAP)
    return sheet[GAP : GAP + CELL, left : left + CELL].astype(int)


def test_image_mask_over_image_and_what_the_network_sees(case):
    sheet = drawn(case)
    image, overlaid, seen = (cell(sheet, column) for column in range(3))
    half = CELL // 2
    assert (image == [0, 0, 255]).all()
    assert (overlaid[:, half:] == [0, 0, 255]).all()
    mixed = 0.4 * np.array([0, 0, 255]) + 0.6 * RED
    assert np.abs(overlaid[:, :half] - mixed).max() <= 1
    assert (seen[:, half:] == [0, 0, 255]).all()
    greys = np.unique(seen[:, :half].reshape(-1, 3), axis=0)
    assert len(greys) == 2 and (greys == greys[:, :1]).all()  # a chequered pattern
    assert 150 < greys.min() < 190 < 220 < greys.max()


def test_masks_whose_white_means_fill_in(case):
    case.dataset["mask_convention"] = "fill"
    overlaid = cell(drawn(case), 1)
    assert (overlaid[:, : CELL // 2] == [0, 0, 255]).all()
    assert (overlaid[:, CELL // 2 :, 0] > 100).all()


def test_a_photo_is_shown_whole_with_its_regions(case):
    size = (CELL, CELL // 2)
    Image.new("RGB", size, "blue").save(case.folder / "gts" / "000000.png")
    mask = Image.new("L", size, 255)
    mask.paste(0, (100, 60, 110, 70))
    mask.save(case.folder / "masks" / "000000.png")
    case.dataset["fit"] = "region"
    sheet = drawn(case)
    image, overlaid, seen = (cell(sheet, column) for column in range(3))
    top = CELL // 4  # where a picture that is half as high as wide begins
    assert (image[:top] == 255).all() and (image[top : 3 * top] == [0, 0, 255]).all()
    assert (overlaid[top + 61 : top + 69, 101:109, 0] > 100).all()
    outline = (overlaid[top : 3 * top] == 0).all(axis=2)
    rows, columns = np.nonzero(outline)
    assert (rows.max() - rows.min(), columns.max() - columns.min()) == (SIZE - 1, SIZE - 1)
    assert rows.min() <= 60 and rows.max() >= 69 and columns.min() <= 100 and columns.max() >= 109
    share = (seen != [0, 0, 255]).any(axis=2).mean()  # one region, as large as the cell allows
    assert share == pytest.approx((10 / SIZE) ** 2, rel=0.01)


def test_a_mask_of_another_size_is_drawn_as_the_network_gets_it(case):
    Image.new("RGB", (2 * SIZE, SIZE), "blue").save(case.folder / "gts" / "000000.png")
    sheet = drawn(case)
    assert (cell(sheet, 1)[:, CELL // 2 :] == [0, 0, 255]).all()
    assert cell(sheet, 1)[:, : CELL // 2, 0].min() > 100


@pytest.mark.parametrize(("width", "height"), [(100, 80), (1000, 500)])
def test_squares_lie_where_their_holes_are(case, width, height):
    Image.new("RGB", (width, height), "blue").save(case.folder / "gts" / "000000.png")
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (70, 40, 80, 50))
    mask.save(case.folder / "masks" / "000000.png")
    case.dataset["fit"] = "region"
    overlaid = cell(drawn(case), 1)
    times = CELL // width if width < CELL else CELL / width
    top, left = (CELL - round(height * times)) // 2, (CELL - round(width * times)) // 2
    rows, columns = np.nonzero((overlaid == 0).all(axis=2))
    assert abs(rows.max() - rows.min() - SIZE * times) <= 3
    centre = (rows.max() + rows.min()) / 2 - top, (columns.max() + columns.min()) / 2 - left
    assert np.abs(np.array(centre) - [45 * times, 75 * times]).max() <= 3


def test_a_photo_without_a_hole_is_what_the_network_would_see(case):
    Image.new("L", (SIZE, SIZE), 255).save(case.folder / "masks" / "000000.png")
    case.dataset["fit"] = "region"
    assert (cell(drawn(case), 2) == [0, 0, 255]).all()


def test_pairs_go_down_the_columns(tmp_path):
    case = Case(tmp_path, images=4)
    for i, colour in enumerate(("red", "lime", "blue", "yellow")):
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / "gts" / f"{i:06}.png")
    with patch.object(preview, "TEXT", 2 * CELL):  # as high as three cells are wide
        sheet = Image.fromarray(drawn(case))
    places = [(x, y) for x in (20, sheet.width // 2 + 20) for y in (20, sheet.height // 2 + 20)]
    red, lime, blue, yellow = (sheet.getpixel(place) for place in places)
    assert (red, lime) == ((255, 0, 0), (0, 255, 0))
    assert (blue, yellow) == ((0, 0, 255), (255, 255, 0))


def test_many_pairs_are_shown_in_part(tmp_path):
    case = Case(tmp_path, images=3)
    with patch.object(preview, "MOST", 2):
        result = case.run("--preview", str(tmp_path / "p.png"))
    assert "p.png (the first 2 of 3: image | mask over image | what the network will see)" in (
        result.out
    )
    rows = 2
    assert Image.open(tmp_path / "p.png").height == rows * (CELL + preview.TEXT + GAP) + GAP


def test_any_name_can_be_drawn(case):
    for kind in ("gts", "masks"):
        folder = case.folder / kind
        (folder / "000000.png").rename(folder / f"{'й' * 60}.ü.png")
    assert drawn(case).shape[1] == 3 * (CELL + GAP) + GAP


def test_a_preview_is_a_png(case):
    assert "accepted: the path of a PNG" in assert_refused(case.run("--preview", "preview.jpg"))


@pytest.mark.parametrize("kind", ["gts", "masks"])
def test_a_preview_does_not_overwrite_an_input(case, kind):
    before = case.conf_path() and case.tree()
    result = case.run("--preview", str(case.folder / kind / ".." / kind / "000000.png"))
    assert "this is one of the inputs" in assert_refused(result)
    assert case.tree() == before


@pytest.mark.parametrize("kind", ["inpainted", "gt", "gt_masked", "gt_keep_mask"])
def test_a_preview_does_not_go_among_results(case, kind):
    line = assert_refused(case.run("--preview", str(case.out / kind / "sub" / "p.png")))
    assert "results go to this folder" in line and not case.out.exists()


def test_an_empty_path_does_not_start_a_run(case):
    with patch.object(factory, "build_inpainter", pytest.fail):
        assert "accepted: the path of a PNG" in assert_refused(case.run("--preview", ""))


def test_a_square_beyond_the_photo_is_drawn_along_its_edge(case):
    size = (CELL, SIZE // 2)
    Image.new("RGB", size, "blue").save(case.folder / "gts" / "000000.png")
    mask = Image.new("L", size, 255)
    mask.paste(0, (100, 2, 110, 8))
    mask.save(case.folder / "masks" / "000000.png")
    case.dataset["fit"] = "region"
    rows, columns = np.nonzero((cell(drawn(case), 1) == 0).all(axis=2))
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (SIZE // 2, SIZE)


def test_a_preview_that_cannot_be_written_is_told(case):
    path = case.folder / "file"
    path.write_text("in the way")
    line = assert_refused(case.run("--preview", str(path / "p.png")))
    assert line.startswith(f"error: cannot write {path}/p.png: ")


def test_what_a_run_would_warn_of_a_preview_warns_of(case):
    Image.new("L", (SIZE, SIZE), 0).save(case.folder / "masks" / "000000.png")
    (line,) = case.run("--preview", str(case.folder / "p.png")).lines("warning")
    assert "keep nothing" in line


def test_what_a_run_would_refuse_a_preview_refuses(case):
    Path(case.folder / "masks" / "000000.png").write_bytes(b"no picture")
    before = json.dumps(sorted(case.conf_path() and case.tree()))
    line = assert_refused(case.run("--preview", str(case.folder / "p.png")))
    assert "cannot read image" in line
    assert json.dumps(sorted(case.tree())) == before
