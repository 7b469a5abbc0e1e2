"""Masks: the fixed kinds to the pixel, the random ones in distribution, those from pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from guided_diffusion.config import UserError
from guided_diffusion.masks import __main__ as masks_command
from guided_diffusion.masks import edits
from guided_diffusion.masks.kinds import KINDS, draw_mask, mask_rng

ROOT = Path(__file__).parents[2]
RANDOM = ("thick", "thin", "box", "lines")
W, B = 255, 0  # white: keep; black: fill in


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The command, run in an empty folder: words -> exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["masks", *map(str, words)])
        try:
            status = masks_command.main()
        except SystemExit as end:  # by argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


def drawn(kind: str, size: tuple[int, int] = (256, 256), index: int = 0, **options) -> np.ndarray:
    mask = draw_mask(kind, size, mask_rng(0, index), **options)
    assert mask.dtype == np.uint8 and mask.shape == size[::-1]
    assert set(np.unique(mask)) <= {B, W}
    return mask


def read(path: str) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.array(image)


def save(path: str, values: object, mode: str = "L", **settings) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8), mode).save(path, **settings)


def names(folder: str = ".") -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# ---- Fixed kinds ----


def kept(mask: np.ndarray) -> tuple[set[int], set[int]]:
    """The rows and the columns of what is kept; it must be all of where they cross."""
    rows, columns = (set(np.flatnonzero((mask == W).any(axis))) for axis in (1, 0))
    assert (mask == W).sum() == len(rows) * len(columns)
    return rows, columns


def test_the_published_fixed_kinds_to_the_pixel():
    every, odd, middle = set(range(256)), set(range(1, 256, 2)), set(range(96, 160))
    assert kept(drawn("ev2li")) == (odd, every)
    assert kept(drawn("nn2")) == (odd, odd)
    assert kept(drawn("genhalf")) == (every, set(range(128)))
    assert kept(drawn("ex64")) == (middle, middle)


def test_fixed_kinds_at_other_sizes():
    rows, columns = set(range(64)), set(range(100))  # 100 wide, 64 high
    assert kept(drawn("ev2li", (100, 64))) == (set(range(1, 64, 2)), columns)
    assert kept(drawn("nn2", (100, 64))) == (set(range(1, 64, 2)), set(range(1, 100, 2)))
    assert kept(drawn("genhalf", (100, 64))) == (rows, set(range(50)))
    assert kept(drawn("ex64", (100, 64))) == (set(range(24, 40)), set(range(37, 62)))


def test_a_half_is_filled_in_on_the_side_that_is_named():
    def halves(side: str) -> tuple[set[int], set[int]]:
        return kept(drawn("half", (20, 16), side=side))

    assert halves("left") == (set(range(16)), set(range(10, 20)))
    assert halves("right") == (set(range(16)), set(range(10)))
    assert halves("top") == (set(range(8, 16)), set(range(20)))
    assert halves("bottom") == (set(range(8)), set(range(20)))
    assert (drawn("half") == drawn("genhalf")).all()


def test_expand_keeps_a_share_of_each_side_in_the_centre():
    assert (drawn("expand") == drawn("ex64")).all()
    assert kept(drawn("expand", (40, 20), keep=0.5)) == (set(range(5, 15)), set(range(10, 30)))
    assert kept(drawn("expand", (17, 17), keep=0.001)) == ({8}, {8})


# ---- Random kinds ----


@pytest.mark.parametrize("kind", RANDOM)
def test_a_mask_follows_from_seed_and_index_alone(kind):
    first = draw_mask(kind, (64, 48), mask_rng(3, 7))
    assert (first == draw_mask(kind, (64, 48), mask_rng(3, 7))).all()
    for other in ((3, 8), (4, 7), (7, 3)):
        assert (first != draw_mask(kind, (64, 48), mask_rng(*other))).any()


@pytest.fixture(scope="module")
def samples() -> dict[str, list[np.ndarray]]:
    """300 masks of each published random kind, as bool, True = keep."""
    return {kind: [drawn(kind, index=i) == W for i in range(300)] for kind in ("thick", "thin")}


# The published 100 of each: mean and quartiles of the kept share; mean number of connected parts
# of the hole and of what is kept; share of the border that is hidden. Tolerances are about three
# standard errors of the published figure.
PUBLISHED = {
    "thick": ((0.751, 0.643, 0.759, 0.845), 1.30, 1.40, 0.135),
    "thin": ((0.703, 0.606, 0.692, 0.793), 6.74, 11.92, 0.272),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_kept_shares_are_those_published(kind, samples):
    shares = [mask.mean() for mask in samples[kind]]
    assert min(shares) >= 0.5
    found = (np.mean(shares), *np.quantile(shares, (0.25, 0.5, 0.75)))
    assert found == pytest.approx(PUBLISHED[kind][0], abs=0.04)
    border = [1 - np.r_[m[0], m[-1], m[:, 0], m[:, -1]].mean() for m in samples[kind]]
    assert np.mean(border) == pytest.approx(PUBLISHED[kind][3], abs=0.04)


@pytest.mark.parametrize(("kind", "tolerances"), [("thick", (0.2, 0.2)), ("thin", (0.8, 3))])
def test_holes_have_as_many_parts_as_published(kind, tolerances, samples):
    ndimage = pytest.importorskip("scipy.ndimage", reason="counting parts needs scipy")

    def parts(inside: np.ndarray) -> int:
        return ndimage.label(inside, np.ones((3, 3)))[1]

    _, of_hole, of_kept, _ = PUBLISHED[kind]
    assert np.mean([parts(~m) for m in samples[kind]]) == pytest.approx(of_hole, abs=tolerances[0])
    assert np.mean([parts(m) for m in samples[kind]]) == pytest.approx(of_kept, abs=tolerances[1])


def test_upright_thin_strokes_are_as_wide_as_published(samples):
    """Among the published, 517 of 534 straight stretches have 7, 9, 11, 13 or 15 pixels."""
    widths = np.bincount(
        [w for mask in samples["thin"][:120] for w in stretches(~mask)], minlength=60
    )
    usual = widths[[7, 9, 11, 13, 15]]
    assert usual.sum() > 0.9 * widths.sum()  # the others: strokes that overlap
    assert usual.min() > 0.7 * usual.mean()  # equally often: 105, 96, 103, 107, 106


def stretches(hole: np.ndarray) -> list[int]:
    """Widths of runs in a row that stay the same, off the border, for 12 rows or more."""
    widths, age = [], {}
    for row in [*hole, np.zeros(hole.shape[1], bool)]:
        steps = np.diff(np.r_[0, row.astype(np.int8), 0])
        runs = zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True)
        now = {run: age.get(run, 0) + 1 for run in runs if run[0] > 0 and run[1] < len(row)}
        widths += [
            right - left for (left, right), n in age.items() if n >= 12 and (left, right) not in now
        ]
        age = now
    return widths


def box_masks(samples) -> list[np.ndarray]:
    """Thick masks of boxes alone: 51 of the 100 published have at most six rows of edges."""

    def edges(keep: np.ndarray) -> int:
        return (keep[1:] != keep[:-1]).any(axis=1).sum()

    return [m for m in samples["thick"] if max(edges(m), edges(m.T)) <= 6]


def test_half_of_the_thick_masks_have_boxes_of_the_published_sides_and_margins(samples):
    boxes = box_masks(samples)
    assert 0.41 < len(boxes) / len(samples["thick"]) < 0.61
    spans = [np.flatnonzero((~mask).any(axis)) for mask in boxes for axis in (0, 1)]
    assert min(span[0] for span in spans) >= 10 and max(span[-1] for span in spans) <= 245
    lone = [len(s) for s in spans if len(s) == s[-1] - s[0] + 1]
    assert min(lone) >= 30 and any(30 <= length <= 34 for length in lone)
    assert any(len(s) > 150 for s in spans)  # several boxes


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (700, 300)])
def test_at_other_sizes_as_much_is_kept(size):
    for kind, share, tolerance in (("thick", 0.75, 0.05), ("thin", 0.71, 0.06)):
        shares = [(drawn(kind, size, index) == W).mean() for index in range(50)]
        assert min(shares) >= 0.5 and np.mean(shares) == pytest.approx(share, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (16, 300), (301, 17)])
def test_every_kind_hides_something_and_keeps_something_at_odd_sizes(kind, size):
    assert all(set(np.unique(drawn(kind, size, index))) == {B, W} for index in range(5))


def test_strokes_grow_with_the_picture():
    widths = [w for i in range(10) for w in stretches(drawn("thin", (512, 512), i) == B)]
    assert np.median(widths) == pytest.approx(22, abs=4)  # 11 at 256


def test_a_box_has_sides_of_a_quarter_to_a_half():
    spans = {0: [], 1: []}
    for index in range(60):
        hole = drawn("box", (64, 100), index) == B
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns)
        spans[0].append(len(columns))
        spans[1].append(len(rows))
    assert 16 <= min(spans[0]) <= 18 and 30 <= max(spans[0]) <= 32
    assert 25 <= min(spans[1]) <= 28 and 47 <= max(spans[1]) <= 50


def test_lines_go_from_edge_to_edge_and_leave_most():
    for index in range(30):
        mask = drawn("lines", (128, 96), index)
        assert 0.5 < (mask == W).mean() < 0.99
        border = np.r_[mask[0], mask[-1], mask[:, 0], mask[:, -1]]
        assert (border == B).sum() >= 4


def test_mistakes_in_draw_mask():
    def message(*arguments, **options) -> str:
        with pytest.raises(UserError) as error:
            draw_mask(*arguments, mask_rng(0, 0), **options)
        return str(error.value)

    assert message("tick", (64, 64)).startswith("no such kind of mask: tick; did you mean thick?")
    assert "15x64 pixels; accepted: 16 to 16384" in message("thick", (15, 64))
    assert "16x16385" in message("ex64", (16, 16385))
    assert "did you mean bottom?" in message("half", (64, 64), side="botom")
    for keep in (0, 1, -0.5, float("nan")):
        assert "above 0 and below 1" in message("expand", (64, 64), keep=keep)


# ---- Masks from pictures, on arrays worked by hand ----


def test_what_is_not_fully_opaque_is_filled_in():
    alpha = np.array([[255, 254], [128, 0]])
    picture = np.dstack([np.full((2, 2, 3), 9), alpha]).astype(np.uint8)
    expected = [[W, B], [B, B]]
    assert edits.from_alpha(Image.fromarray(picture)).tolist() == expected
    grey = Image.fromarray(picture[..., 2:])  # LA
    assert edits.from_alpha(grey).tolist() == expected


def test_the_transparent_colour_of_a_palette_or_a_grey_picture_is_filled_in(tmp_path):
    save(tmp_path / "grey.png", [[7, 8], [8, 7]], transparency=7)
    palette = Image.fromarray(np.array([[0, 1], [1, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "palette.png", transparency=0)
    for name, expected in (("grey", [[B, W], [W, B]]), ("palette", [[B, W], [W, W]])):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert edits.from_alpha(image).tolist() == expected


def test_what_has_a_colour_is_filled_in():
    magenta, near, far, other = (255, 0, 255), (250, 4, 255), (239, 0, 255), (255, 17, 255)
    picture = Image.fromarray(np.array([[magenta, near], [far, other]], np.uint8))
    assert edits.from_colour(picture, magenta).tolist() == [[B, W], [W, W]]
    assert edits.from_colour(picture, magenta, 4).tolist() == [[B, W], [W, W]]
    assert edits.from_colour(picture, magenta, 5).tolist() == [[B, B], [W, W]]
    assert edits.from_colour(picture, magenta, 16).tolist() == [[B, B], [B, W]]


def test_a_threshold():
    picture = Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).convert("RGB")
    assert edits.threshold(picture).tolist() == [[B, B], [W, W]]
    assert edits.threshold(picture, 1).tolist() == [[B, W], [W, W]]
    assert edits.threshold(picture, 255).tolist() == [[B, B], [B, W]]


def as_mask(*rows: str) -> np.ndarray:
    return np.array([[W if sign == "." else B for sign in row] for row in rows], np.uint8)


def test_a_pixel_grows_to_a_round_hole():
    point = as_mask(".......", ".......", ".......", "...#...", ".......", ".......", ".......")
    one = as_mask(".......", ".......", "...#...", "..###..", "...#...", ".......", ".......")
    three = as_mask("...#...", ".#####.", ".#####.", "#######", ".#####.", ".#####.", "...#...")
    assert (edits.grow(point, 1) == one).all()
    assert (edits.grow(point, 3) == three).all()
    assert (edits.shrink(one, 1) == point).all()


def test_the_edge_of_the_picture_is_no_edge_of_the_hole():
    assert (edits.shrink(as_mask("###..", "###.."), 1) == as_mask("##...", "##...")).all()
    assert (edits.grow(as_mask("#....", "....."), 2) == as_mask("###..", "##...")).all()


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(1, 8))
def test_growing_reaches_all_within_the_distance_and_shrinking_is_its_mirror(hole, by):
    if by >= max(hole.shape) or not hole.any():
        return
    y, x = np.indices(hole.shape)
    near = [(y - r) ** 2 + (x - c) ** 2 <= by**2 for r, c in np.argwhere(hole)]
    expected = np.any(near, axis=0)
    mask = np.where(hole, B, W).astype(np.uint8)
    if expected.all():
        with pytest.raises(UserError, match="would cover the whole mask"):
            edits.grow(mask, by)
        return
    assert ((edits.grow(mask, by) == B) == expected).all()
    assert ((edits.shrink(255 - mask, by) == W) == expected).all()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda: edits.grow(as_mask("..#."), 4), "4 pixels is beyond the mask, which is 4x1"),
        (lambda: edits.grow(as_mask("..#."), 2), "grown by 2 pixels, .* cover the whole"),
        (lambda: edits.grow(as_mask("...."), 1), "has no hole"),
        (lambda: edits.shrink(as_mask(".##."), 1), "shrunk by 1 pixels, no hole"),
        (lambda: edits.shrink(as_mask("...."), 1), "no hole would be left"),
        (lambda: edits.shrink(as_mask("####"), 1), "keeps nothing"),
        (lambda: edits.shrink(as_mask("###."), 9), "9 pixels is beyond the mask"),
        (lambda: edits.grow(as_mask("..#.") // 2, 1), "has grey values; .* threshold"),
    ],
)
def test_growing_and_shrinking_that_make_no_sense(edit, words):
    with pytest.raises(UserError, match=words):
        edit()


# ---- The command: what it writes ----


@pytest.mark.parametrize(("opaque", "little"), [(1, True), (4, False)])
def test_from_alpha_says_which_way_round_it_went_where_little_is_kept(command, opaque, little):
    layer = np.zeros((8, 8, 4), np.uint8)
    layer[:, :opaque, 3] = 255  # black strokes on nothing
    Image.fromarray(layer).save("strokes.png")
    status, out, errors = command("from-alpha", "strokes.png", "mask.png")
    assert (status, errors) == (0, "")
    kept, *told = out.splitlines()
    assert kept.endswith(f"{opaque / 8:.1%} of the pixels are kept")
    assert (
        "1 of 1, first mask.png, keep little: what is opaque is kept" in "".join(told)
    ) == little
    assert ("masks invert mask.png ANOTHER" in "".join(told)) == little


def test_numbered_masks_in_a_folder(command):
    status, out, errors = command(
        "thick", "out/deep", "--number", 3, "--seed", 5, "--size", "40x32"
    )
    assert (status, errors) == (0, "") and out.startswith("written: out/deep, 3 masks; ")
    assert names("out/deep") == ["000000.png", "000001.png", "000002.png"]
    for index in range(3):
        expected = draw_mask("thick", (40, 32), mask_rng(5, index))
        assert (read(f"out/deep/{index:06d}.png") == expected).all()


def test_one_mask_in_a_file_and_the_share_that_it_keeps(command):
    status, out, _ = command("ex64", "mask.png")
    assert (status, names()) == (0, ["mask.png"])
    assert out == "written: mask.png, 1 mask; 6.2% of the pixels are kept\n"
    assert (read("mask.png") == drawn("ex64")).all()


def test_options_of_single_kinds(command):
    assert command("half", "a.png", "--side", "top", "--size", 20)[0] == 0
    assert (read("a.png") == drawn("half", (20, 20), side="top")).all()
    assert command("expand", "b.png", "--keep", "0.5", "--size", 20)[0] == 0
    assert (read("b.png") == drawn("expand", (20, 20), keep=0.5)).all()


def test_one_mask_like_each_image_upright(command):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    save("photos/b.v2.jpg", np.zeros((20, 30)), exif=exif)
    save("photos/sub/a.PNG", np.zeros((16, 50)))
    Path("photos/notes.txt").write_text("no picture")
    assert command("thin", "out", "--like", "photos/", "--seed", 2)[0] == 0
    assert names("out") == ["b.v2.png", "sub/a.png"]
    assert (read("out/b.v2.png") == draw_mask("thin", (20, 30), mask_rng(2, 0))).all()
    assert (read("out/sub/a.png") == draw_mask("thin", (50, 16), mask_rng(2, 1))).all()


def test_masks_from_a_folder_of_pictures_and_from_one(command):
    painted = np.full((16, 16, 3), 90)
    painted[4:8, 4:8] = 255, 0, 255
    save("photos/x.png", painted, "RGB")
    save("photos/sub/y.jpg", painted, "RGB", quality=95, subsampling=0)
    assert command("from-colour", "photos", "out", "--colour", "#ff00ff")[0] == 0
    assert names("out") == ["sub/y.png", "x.png"]
    expected = np.full((16, 16), W)
    expected[4:8, 4:8] = B
    assert (read("out/x.png") == expected).all() and (read("out/sub/y.png") == expected).all()
    for colour in ("ff00ff", "Magenta"):
        assert command("from-colour", "photos/x.png", f"{colour}.png", "--colour", colour)[0] == 0
        assert (read(f"{colour}.png") == expected).all()


def test_the_other_commands(command):
    save("m.png", as_mask("..#.", "...."))
    save("grey.png", [[100, 200]])
    save("alpha.png", [[[1, 2, 3, 255], [1, 2, 3, 0]]], "RGBA")
    for words, expected in {
        ("invert", "m.png"): as_mask("##.#", "####"),
        ("grow", "m.png", "--by", 1): as_mask(".###", "..#."),
        ("threshold", "grey.png"): as_mask("#."),
        ("threshold", "grey.png", "--at", 99): None,
        ("threshold", "grey.png", "--at", 200): as_mask("#."),
        ("from-alpha", "alpha.png"): as_mask(".#"),
        ("invert", "grey.png"): np.array([[155, 55]]),
    }.items():
        status, _, errors = command(*words[:2], "out", *words[2:], "--overwrite")
        if expected is None:
            assert (status, "nothing is darker than 99" in errors) == (2, True)
        else:
            assert (status, errors) == (0, "")
            assert (read(f"out/{words[1]}") == expected).all()
    save("hole.png", as_mask("###.", "###."))
    assert command("shrink", "hole.png", "less.png", "--by", 2)[0] == 0
    assert (read("less.png") == as_mask("#...", "#...")).all()


def test_what_keeps_everything_is_not_inverted(command):
    save("white.png", as_mask("..", ".."))
    status, _, errors = command("invert", "white.png", "black.png")
    assert status == 2 and "the mask keeps everything: nothing would be kept" in errors
    assert names() == ["white.png"]


def test_a_file_is_replaced_only_if_one_says_so(command):
    assert command("box", "out", "--number", 2)[0] == 0
    before = read("out/000001.png")
    status, _, errors = command("thin", "out", "--number", 3)
    assert status == 2 and names("out") == ["000000.png", "000001.png"]
    assert "out/000000.png (and 1 more) exists: add --overwrite" in errors
    assert (read("out/000001.png") == before).all()
    assert command("thin", "out", "--number", 3, "--overwrite")[0] == 0
    assert (read("out/000001.png") != before).any()


@pytest.mark.slow
def test_help_needs_no_torch_and_names_every_kind():
    code = "import sys; import guided_diffusion.masks.__main__; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"
    assert (
        masks_command.KIND_HELP.keys() == KINDS.keys()
        and masks_command.EDIT_HELP.keys() == masks_command.EDITS.keys()
    )


# ---- The command: mistakes ----


@pytest.fixture
def pictures(command) -> None:
    """What there is to make mistakes with."""
    save("photos/x.png", np.full((20, 20, 3), 90), "RGB")
    save("twice/x.png", np.zeros((20, 20)))
    save("twice/x.bmp", np.zeros((20, 20)))
    save("small/x.png", np.zeros((20, 8)))
    save("mask.png", as_mask("..#.", "...."))
    save("coloured.png", [[[1, 2, 3], [4, 5, 6]]], "RGB")
    save("opaque.png", [[[1, 2, 3, 255]]], "RGBA")
    save("faint.png", [[[1, 2, 3, 100]]], "RGBA")
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_bytes(Path("photos/x.png").read_bytes())
    Path("bad/b.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("thik out", "no such kind: thik; did you mean thick?"),
        ("form-alpha x out", "did you mean from-alpha?"),
        ("half out --side lef", "no such side: lef; did you mean left?"),
        ("expand out --keep 1", "keep: found 1; accepted: a share of each side"),
        ("expand out --keep all", "--keep: found all; accepted: a number such as 0.25"),
        ("box out --size 8", "--size: 8x8 pixels; accepted: 16 to 16384"),
        ("box out --size big", "--size: found big; accepted: a number such as 256, or 640x480"),
        ("box out --size 20x30x40", "--size: found 20x30x40"),
        ("box out --size -5", "--size"),
        ("box out --number 0", "--number: found 0; accepted: a whole number >= 1"),
        ("box out --seed 1.5", "--seed: found 1.5; accepted: a whole number >= 0"),
        ("box out --size 64 --like photos", "not allowed with"),
        ("box out --like photos --number 2", "--number: there is one mask for each image"),
        ("box out --like empty", "--like: no images in folder empty"),
        ("box out --like nowhere", "--like: no such file or folder: nowhere"),
        ("box out --like bad", "cannot read image bad/b.png: empty, damaged, or not an image"),
        ("box out --like small", "--like: small/x.png: 8x20 pixels; accepted: 16"),
        ("box out --like twice", "twice/x.bmp and twice/x.png would both have the mask out/x.png"),
        ("box photos --like photos", "photos/x.png would be written over or among photos"),
        ("box photos/masks --like photos --overwrite", "would be written over or among photos"),
        ("box x.png --like photos", "x.png is a file, but --like photos is a folder"),
        ("box x.png --number 2", "2 masks do not fit in a file, x.png; give a folder"),
        ("box x.jpg", "x.jpg: masks are PNG files"),
        ("box mask.png", "OUT: mask.png exists: add --overwrite"),
        ("box mask.png/sub", "OUT: cannot write"),
        ("from-alpha photos out", "photos/x.png: has no transparency (no alpha channel)"),
        ("from-alpha opaque.png out", "opaque.png: is opaque everywhere"),
        ("from-alpha faint.png out", "faint.png: is nowhere fully opaque"),
        ("from-alpha bad out", "bad/a.png: has no transparency"),
        ("from-alpha empty out", "IMAGE: no images in folder empty"),
        ("from-colour photos out", "required: --colour"),
        ("from-colour photos out --colour #ff00f", "--colour: found #ff00f; accepted:"),
        ("from-colour photos out --colour #ff00ff80", "--colour: found #ff00ff80; accepted:"),
        ("from-colour photos out --colour pinkish", "--colour: found pinkish; accepted:"),
        (
            "from-colour photos out --colour #5a5a78",
            "no pixel has the colour #5a5a78; the nearest is #5a5a5a: use that one, or "
            "--tolerance 30",
        ),
        ("from-colour photos out --colour #5a5a5a", "all pixels have the colour #5a5a5a"),
        ("from-colour bad out --colour red --tolerance 256", "a whole number from 0 to 255"),
        ("invert coloured.png out", "coloured.png: is a picture in colour, not a mask"),
        ("invert bad out", "cannot read image bad/b.png"),
        ("invert mask.png mask.png --overwrite", "mask.png would be written over or among mask"),
        ("grow mask.png out", "required: --by"),
        ("grow mask.png out --by 0", "--by: found 0; accepted: a whole number >= 1"),
        ("grow mask.png out --by 3", "mask.png: grown by 3 pixels, the hole would cover"),
        ("grow mask.png out --by 4", "mask.png: 4 pixels is beyond the mask, which is 4x2"),
        ("shrink mask.png out --by 1", "mask.png: shrunk by 1 pixels, no hole would be left"),
        ("threshold mask.png out --at 0", "--at: found 0; accepted: a whole number from 1 to 255"),
        ("threshold coloured.png out", "nothing is as bright as 128"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(command, pictures, words, message):
    before = {name: Path(name).read_bytes() for name in names()}
    status, out, errors = command(*words.split())
    assert (status, out) == (2, "")
    assert message in errors.splitlines()[-1] and "Traceback" not in errors
    assert {name: Path(name).read_bytes() for name in names()} == before
    assert not Path("out").exists()


def test_a_full_disk_is_named(command, monkeypatch):
    def fail(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(masks_command.storage, "write_atomically", fail)
    status, _, errors = command("box", "out")
    assert (status, errors) == (
        2,
        "error: OUT: cannot write out: No space left on device\n",
    )
