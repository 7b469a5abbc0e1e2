"""evaluate.py: which pictures belong together, figures, means, tables, and every mistake."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as command
from guided_diffusion.config import UserError
from guided_diffusion.evaluation import distortion, lpips_files, paper
from guided_diffusion.evaluation.table import Row, Scores, find_pairs, measure

ROOT = Path(__file__).parents[2]
SIZE = 16


def save(path: Path, value: int | np.ndarray, size: int = SIZE) -> None:
    """A grey picture of one value, or of an array."""
    values = np.full((size, size), value, np.uint8) if isinstance(value, int) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def half(left: int, right: int) -> np.ndarray:
    return np.array([[left] * 8 + [right] * 8] * SIZE, np.uint8)


class Case:
    """A folder with results, gt and masks, and the command started in it."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, patch

    def run(self, *arguments: str) -> SimpleNamespace:
        """Status, out and err."""
        self._patch.setattr(sys, "argv", ["evaluate.py", *arguments])
        try:
            status = command.main()
        except SystemExit as stop:
            status = stop.code
        return SimpleNamespace(status=status, **self._capsys.readouterr()._asdict())

    def measure(self, *arguments: str) -> SimpleNamespace:
        return self.run("--results", "results", "--gt", "gt", *arguments)

    def refuse(self, *arguments: str) -> str:
        """The message of a command that must fail, and write nothing."""
        ran = self.measure("--out", "metrics.csv", *arguments)
        errors = [line for line in ran.err.splitlines() if not line.startswith("LPIPS (")]
        assert (ran.status, ran.out, len(errors)) == (2, "", 1)
        assert not Path("metrics.csv").exists()
        return errors[0].removeprefix("error: ")


@pytest.fixture
def case(tmp_path, monkeypatch, capsys) -> Case:
    monkeypatch.chdir(tmp_path)
    return Case(capsys, monkeypatch)


@pytest.fixture
def two(case) -> Case:
    """The truth is 100; `a` is 10 above it in its hole, the right half, and `b` 30."""
    for name, error in (("a", 10), ("sub/b", 30)):
        save(Path(f"gt/{name}.png"), 100)
        save(Path(f"results/{name}.png"), half(100, 100 + error))
        save(Path(f"masks/{name}.png"), half(255, 0))
    return case


def read_csv(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- What the command prints and writes ----


def test_the_table_has_means_and_intervals(two):
    """Of two images every resample has mean a, (a + b) / 2 or b; a and b come in a quarter each."""
    ran = two.measure("--masks", "masks")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        *("", "", "better", "whole image", "hole", "")
    ]
    assert set(lines[1]) == set("| -")
    assert lines[2].split("|")[1].strip() == "L1 (grey levels of 255)"
    assert lines[2].split("|")[3].strip() == "10.00 [5.00, 15.00]"
    assert lines[2].split("|")[4].strip() == "20.00 [10.00, 30.00]"
    assert lines[3].split("|")[1].strip() == "PSNR (dB)"
    # 20 log10(255 / 10) = 28.13 and 20 log10(255 / 30) = 18.59; half of the pixels: 3.01 more.
    assert lines[3].split("|")[3].strip() == "26.37 [21.60, 31.14]"
    assert lines[3].split("|")[4].strip() == "23.36 [18.59, 28.13]"
    assert lines[4].split("|")[1].strip() == "SSIM"
    assert lines[6:] == ["2 images: mean [95 % bootstrap interval over images]."]
    assert len({len(line) for line in lines[:5]}) == 1


def test_absent_weights_are_said_in_one_line(two):
    ran = two.measure()
    assert ran.err == (
        "LPIPS (AlexNet and VGG) is left out: data/pretrained/lpips/alexnet-owt-7be5be79.pth is "
        "not there; to get it, run: bash download.sh lpips\n"
    )
    assert "LPIPS" not in ran.out and "diversity" not in ran.out and "| hole" not in ran.out


def test_the_csv_has_a_line_an_image(two):
    assert two.measure("--masks", "masks", "--out", "new/metrics.csv").status == 0
    first, second = read_csv("new/metrics.csv")
    assert list(first) == [
        *("image", "samples", "l1", "psnr", "ssim", "hole_l1", "hole_psnr", "hole_ssim")
    ]
    assert (first["image"], second["image"]) == ("a", "sub/b")
    assert (first["samples"], first["l1"], first["hole_l1"]) == ("1", "5", "10")
    assert (second["l1"], second["hole_l1"]) == ("15", "30")
    assert float(first["hole_psnr"]) == pytest.approx(28.1308, abs=1e-4)
    assert os.listdir("new") == ["metrics.csv"]
    assert float(first["hole_ssim"]) < float(first["ssim"]) < 1


def test_without_masks_the_same_but_no_hole(two):
    two.measure("--masks", "masks", "--out", "with.csv")
    two.measure("--out", "without.csv")
    for row, longer in zip(read_csv("without.csv"), read_csv("with.csv"), strict=True):
        assert row == {key: cell for key, cell in longer.items() if not key.startswith("hole_")}


def test_names_that_spreadsheets_would_break_on(case):
    save(Path('gt/a, "b".png'), 100)
    save(Path('results/a, "b".png'), 101)
    assert case.measure("--out", "metrics.csv").status == 0
    assert read_csv("metrics.csv")[0]["image"] == 'a, "b"'


def test_equal_images_are_left_out_of_the_mean_of_psnr(two):
    save(Path("results/a.png"), 100)
    ran = two.measure("--masks", "masks", "--out", "metrics.csv")
    psnr = ran.out.splitlines()[3]
    assert "| 21.60 " in psnr and "| 18.59 " in psnr
    assert "1 equal to the truth over the whole image: its PSNR is infinite, and left" in ran.out
    assert "1 equal to the truth over the hole: its PSNR is infinite, and left" in ran.out
    assert read_csv("metrics.csv")[0]["psnr"] == "inf"


def test_a_single_image_has_no_interval(case):
    save(Path("gt/a.png"), 100)
    save(Path("results/a.png"), 103)
    out = case.measure().out
    assert "| 3.00 " in out and "[" not in out and "\n1 image: mean.\n" in out


@pytest.mark.slow
def test_torch_is_not_imported_without_weights(two):
    code = (
        "import sys, evaluate; sys.argv = ['x', '--results', 'results', '--gt', 'gt']\n"
        "evaluate.main(); print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "False"


def test_half_kept_is_known_and_less_is_hole(case):
    save(Path("gt/a.png"), 100)
    save(Path("results/a.png"), half(100, 110))
    save(Path("masks/a.png"), half(128, 127))
    (row,) = measure("results", "gt", "masks").rows
    assert row.figures["hole_l1"] == 10


def test_ssim_of_a_hole_that_is_everything_is_that_of_the_image(case):
    rng = np.random.default_rng(0)
    for folder in ("gt", "results"):
        save(Path(f"{folder}/a.png"), rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8))
    save(Path("masks/a.png"), 0)
    (row,) = measure("results", "gt", "masks").rows
    for key in ("l1", "psnr", "ssim"):
        assert row.figures[f"hole_{key}"] == pytest.approx(row.figures[key], rel=1e-12)


def test_ssim_over_the_hole_is_the_mean_of_its_part_of_the_map(case):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 16, 20)).astype(np.uint8)
    hole = np.zeros((16, 20), bool)
    hole[3:7, 9:13] = hole[15, 19] = True
    save(Path("results/a.png"), pictures[0])
    save(Path("gt/a.png"), pictures[1])
    save(Path("masks/a.png"), np.where(hole, 0, 255).astype(np.uint8))
    (row,) = measure("results", "gt", "masks").rows
    rgb = [picture[..., None].repeat(3, axis=2) for picture in pictures]
    # The map begins at pixel (5, 5): of the hole's rows 3 to 6 the last two are in it.
    part = distortion.ssim_map(*rgb)[0:2, 4:8]
    assert row.figures["hole_ssim"] == pytest.approx(part.mean(), rel=1e-12)


# ---- Pairs ----


def pairs_of(results: str, truths: str) -> dict[str, list[str]]:
    """Truth -> names of its results."""
    for folder, names in (("results", results), ("gt", truths)):
        for name in names.split():
            save(Path(f"{folder}/{name}"), 100)
    return {
        pair.name: [str(Path(path).relative_to("results")) for path in pair.results]
        for pair in find_pairs("results/", "gt")
    }


@pytest.mark.parametrize(
    ("results", "truths", "pairs"),
    [
        ("a.png", "a.jpg", {"a": ["a.png"]}),
        ("a.b.png", "a.b.png", {"a.b": ["a.b.png"]}),
        ("s/a.png a.png", "a.png s/a.png", {"a": ["a.png"], "s/a": ["s/a.png"]}),
        ("a_0.png a_1.png", "a.png", {"a": ["a_0.png", "a_1.png"]}),
        ("a_10.png a_9.png", "a.png", {"a": ["a_9.png", "a_10.png"]}),
        ("a_0.png b_0.png b_1.png", "a.png b.png", {"a": ["a_0.png"], "b": ["b_0.png", "b_1.png"]}),
        ("s/a_0.png s/a_1.png", "s/a.png", {"s/a": ["s/a_0.png", "s/a_1.png"]}),
        # Names that end in numbers, of one sample each and of two.
        ("a_0.png a.png", "a.png a_0.png", {"a": ["a.png"], "a_0": ["a_0.png"]}),
        (
            "a_0.png a_1.png a_0_0.png a_0_1.png",
            "a.png a_0.png",
            {"a": ["a_0.png", "a_1.png"], "a_0": ["a_0_0.png", "a_0_1.png"]},
        ),
    ],
)
def test_names_tell_what_belongs_together(case, results, truths, pairs):
    assert pairs_of(results, truths) == pairs


@pytest.mark.parametrize(
    ("results", "truths", "message"),
    [
        ("a.png b.png", "a.png", "results: 1 picture has no truth in gt: b (in results/)"),
        (
            "a.png",
            "a.png b.png c.png",
            "truth: 2 pictures have no result in results/: b, c (in gt)",
        ),
        ("a.png a_0.png a_1.png", "a.png", "results: 1 picture has no truth in gt: a (in"),
        ("x_0.png", "x.png x_0.png", "truth: 1 picture has no result in results/: x (in gt)"),
        ("a.png a_x.png", "a.png", "results: 1 picture has no truth in gt: a_x (in"),
        (
            "a.png b.png c.png d.png e.png f.png",
            "f.png",
            "results: 5 pictures have no truth in gt: a, b, c and 2 more (in results/); partners",
        ),
        ("a.png a.jpg", "a.png", "results: results/a.jpg and results/a.png have the same name"),
    ],
)
def test_pictures_without_partner_are_counted_and_named(case, results, truths, message):
    with pytest.raises(UserError) as error:
        pairs_of(results, truths)
    assert str(error.value).startswith(message)


def test_slashes_behind_a_folder_do_not_count(case):
    save(Path("gt/s/a.png"), 100)
    save(Path("results/s/a.png"), 100)
    assert [pair.name for pair in find_pairs("results//", "gt/")] == ["s/a"]


AFFIXES = ["{}_mask", "mask-{}", "{}_mask001"]


@pytest.mark.parametrize("affix", AFFIXES)
def test_masks_pair_by_the_same_rule_as_in_a_run(case, affix):
    names = [str(number) for number in range(12)]
    for name in names:
        save(Path(f"gt/{name}.jpg"), 100)
        save(Path(f"results/{name}.png"), 100)
        save(Path(f"masks/{affix.format(name)}.png"), 100)
        save(Path(f"both/{name}.png"), 100)
        save(Path(f"both/{affix.format(name)}.png"), 100)
    for truths, masks in (("gt", "masks"), ("both", "both"), ("both", "both/")):
        pairs = find_pairs("results", truths, masks)
        assert {pair.name: Path(pair.mask).stem for pair in pairs} == {
            name: affix.format(name) for name in names
        }
        assert all(Path(pair.results[0]).stem == pair.name for pair in pairs)
        assert all(Path(pair.truth).stem == pair.name for pair in pairs)


def test_accents_and_capital_letters_of_other_systems_do_not_part_pairs(case):
    for folder, name in (("gt", "e\u0301"), ("results", "\u00e9"), ("masks", "\u00c9")):
        save(Path(f"{folder}/{name}.png"), 100)
        save(Path(f"{folder}/z.png"), 100)
    pairs = find_pairs("results", "gt", "masks")
    assert [(Path(p.results[0]).stem, Path(p.mask).stem) for p in pairs][0] == ("\u00e9", "\u00c9")


def test_a_folder_without_masks_is_none_of_masks(case):
    save(Path("gt/a.png"), 100)
    save(Path("results/a.png"), 100)
    with pytest.raises(UserError, match="no picture there is called after another"):
        find_pairs("results", "gt", "gt")
    save(Path("gt/a_mask.png"), 100)
    save(Path("gt/b.png"), 100)
    with pytest.raises(UserError, match="1 picture has no partner in gt: b"):
        find_pairs("results", "gt", "gt")


# ---- LPIPS and diversity, with a network that sees grey levels ----


class Grey:
    """Takes the mean grey level for a picture's features, and their difference for distance."""

    name = "alex"

    def features(self, picture: np.ndarray) -> list[np.ndarray]:
        return [picture[..., 0].astype(float)]

    def distance(self, a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return abs(a[0].mean() - b[0].mean())

    def distance_map(self, a: list, b: list, size: tuple[int, int]) -> np.ndarray:
        assert a[0].shape == size
        return np.abs(a[0] - b[0])


def test_diversity_is_the_mean_over_pairs_of_samples(case):
    """Samples 10, 20 and 40 above the truth, in the right half."""
    save(Path("gt/a.png"), 100)
    save(Path("masks/a.png"), half(255, 0))
    for sample, error in enumerate((10, 20, 40)):
        save(Path(f"results/a_{sample}.png"), half(100, 100 + error))
    scores = measure("results", "gt", "masks", networks=[Grey()])
    (row,) = scores.rows
    assert row.samples == 3
    assert row.figures["lpips_alex"] == pytest.approx((5 + 10 + 20) / 3)
    assert row.figures["hole_lpips_alex"] == pytest.approx((10 + 20 + 40) / 3)
    assert row.figures["diversity_alex"] == pytest.approx((5 + 15 + 10) / 3)
    assert row.figures["hole_diversity_alex"] == pytest.approx((10 + 30 + 20) / 3)
    assert row.figures["hole_l1"] == pytest.approx((10 + 20 + 40) / 3)
    text = scores.to_markdown()
    assert "| diversity (LPIPS between samples, AlexNet) | higher | 10.0000 " in text
    assert text.endswith("\n1 image, 3 samples of each: mean.")


def test_images_with_one_sample_have_no_diversity(case):
    save(Path("gt/a.png"), 100)
    save(Path("gt/b.png"), 100)
    for name in ("a_0", "b_0", "b_1"):
        save(Path(f"results/{name}.png"), 110)
    scores = measure("results", "gt", networks=[Grey()])
    assert scores.summary()["diversity_alex"].number == 1
    rows = list(csv.DictReader(io.StringIO(scores.to_csv())))
    assert [row["diversity_alex"] for row in rows] == ["", "0"]
    assert [row["samples"] for row in rows] == ["1", "2"]
    assert "2 images, 1 or 2 samples of each: mean [" in scores.to_markdown()


def test_the_summary_is_by_column():
    rows = [Row("a", 1, {"l1": 1.0, "psnr": math.inf}), Row("b", 1, {"l1": 3.0, "psnr": 20.0})]
    summary = Scores(rows).summary()
    assert (summary["l1"].mean, summary["l1"].low, summary["l1"].high) == (2, 1, 3)
    assert (summary["psnr"].mean, summary["psnr"].number) == (20, 1)
    assert list(summary) == ["l1", "psnr"]


# ---- With weights ----


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """A folder with random weights of AlexNet, in the form of the published ones."""
    from guided_diffusion.evaluation import lpips

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    layers, compared, _ = lpips.NETWORKS["alex"]
    network = layers()
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, network[number - 1].out_channels, 1, 1)
        for i, number in enumerate(compared)
    }
    for path, state in zip(
        lpips_files.paths("alex", str(folder)),
        (network.state_dict(prefix="features."), heads),
        strict=True,
    ):
        torch.save(state, path)
    return folder


@pytest.fixture
def with_alexnet(case, alexnet) -> Case:
    Path("data/pretrained").mkdir(parents=True)
    Path(lpips_files.FOLDER).symlink_to(alexnet)
    return case


def save_random(path: Path, seed: int) -> None:
    save(path, np.random.default_rng(seed).integers(0, 256, (40, 40)).astype(np.uint8))


def test_weights_that_are_there_are_used(with_alexnet):
    save_random(Path("gt/a.png"), 0)
    save_random(Path("gt/b.png"), 1)
    save_random(Path("results/a.png"), 0)
    save_random(Path("results/b.png"), 2)
    ran = with_alexnet.measure("--out", "metrics.csv")
    assert (ran.status, ran.err.count("\n")) == (0, 1)
    assert ran.err.startswith("LPIPS (VGG) is left out: data/pretrained/lpips/vgg16-397923af.pth ")
    assert "| LPIPS (AlexNet) " in ran.out and "LPIPS (VGG)" not in ran.out
    equal, different = (float(row["lpips_alex"]) for row in read_csv("metrics.csv"))
    assert equal == 0 and different > 0.01


def test_pictures_too_small_for_lpips_are_refused(with_alexnet):
    save(Path("gt/a.png"), 100, size=30)
    save(Path("results/a.png"), 101, size=30)
    assert "LPIPS (AlexNet) needs 31 or more pixels on each side" in with_alexnet.refuse()


# ---- The paper's table ----


def save_run(name: str, seeds: list[tuple[int, int]], finished: object = True) -> str:
    """A run's folder: for each image the random pictures of the result and of the truth."""
    for i, (result, truth) in enumerate(seeds):
        save_random(Path(f"{name}/inpainted/{i}.png"), result)
        save_random(Path(f"{name}/gt/{i}.png"), truth)
    Path(name, "run.json").write_text(json.dumps({"finished": finished}))
    return name


def test_the_papers_table(with_alexnet):
    wide = save_run("log/test_c256_thick", [(0, 1), (2, 3)])
    expand = save_run("log/test_p256_ex64", [(0, 0)])
    ran = with_alexnet.run("--paper", wide, f"{expand}/", "--out", "paper.csv")
    assert (ran.status, ran.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.out.splitlines()[:8]]
    assert rows[0][1:] == [
        *("Wide", "Narrow", "Super-resolve 2×", "Alternating lines", "Half", "Expand")
    ]
    assert rows[2] == ["CelebA-HQ, paper", "0.059", "0.028", "0.029", "0.009", "0.165", "0.435"]
    assert rows[4] == ["ImageNet, paper", "0.134", "0.064", "0.183", "0.089", "0.304", "0.629"]
    assert rows[6] == ["Places2, paper", "0.105", "0.044", "0.099", "0.051", "0.286", "0.615"]
    assert rows[5] == ["ImageNet, ours", *[""] * 6]
    assert rows[7] == ["Places2, ours", *[""] * 5, "0.000"]
    assert rows[3][2:] == [""] * 5
    assert ran.out.splitlines()[9:] == [
        "Means over 100 images; ours with [95 % bootstrap interval over images].",
        "CelebA-HQ, Wide: ours is the mean over 2.",
        "Places2, Expand: ours is the mean over 1.",
    ]
    lines = read_csv("paper.csv")
    assert len(lines) == 18
    assert lines[1] == {
        **{"dataset": "CelebA-HQ", "mask": "Narrow", "paper": "0.028"},
        **{"ours": "", "low": "", "high": "", "images": ""},
    }
    with_alexnet.run(
        *("--results", f"{wide}/inpainted", "--gt", f"{wide}/gt", "--out", "metrics.csv")
    )
    each = [float(row["lpips_alex"]) for row in read_csv("metrics.csv")]
    assert float(lines[0]["ours"]) == pytest.approx(sum(each) / 2, rel=1e-4)
    assert float(lines[0]["low"]) == pytest.approx(min(each), rel=1e-4)
    assert (lines[0]["images"], lines[17]["ours"], lines[17]["images"]) == ("2", "0", "1")
    assert rows[3][1].startswith(f"{float(lines[0]['ours']):.3f} [")


def test_the_papers_cells_are_those_of_the_configs():
    configs = {path.stem for path in ROOT.glob("confs/test_*.yml")}
    cells = {f"test_{d}_{k}" for d in paper.DATASETS for k in paper.KINDS}
    assert cells == configs and len(cells) == 18


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["log/demo"], "--paper: log/demo is not the folder of a run of confs/test_*.yml"),
        (["log/test_c256_thick_2"], "--paper: log/test_c256_thick_2 is not the folder"),
        (["log/test_c256_thin"], "cannot read log/test_c256_thin/run.json, which test.py writes:"),
        (["log/test_c256_nn2"], "--paper: the run in log/test_c256_nn2 is not finished; run test"),
        (["log/test_c256_ex64"], "log/test_c256_ex64/run.json is not as test.py writes it"),
        (["log/test_c256_thick", "old/test_c256_thick"], "are for the same cell; give one"),
        (
            ["log/test_c256_thick"],
            "LPIPS (AlexNet): data/pretrained/lpips/alexnet-owt-7be5be79.pth",
        ),
    ],
)
def test_folders_that_are_no_cells_are_refused(case, folders, message):
    save_run("log/test_c256_thick", [(0, 1)])
    save_run("old/test_c256_thick", [(0, 1)])
    save_run("log/test_c256_nn2", [(0, 1)], finished=False)
    save_run("log/test_c256_ex64", [(0, 1)])
    Path("log/test_c256_ex64/run.json").write_text("[]")
    ran = case.run("--paper", *folders, "--out", "paper.csv")
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("error: ") and message in ran.err
    assert not Path("paper.csv").exists()


# ---- Mistakes ----


def test_sizes_that_differ(two):
    save(Path("results/sub/b.png"), 100, size=20)
    message = two.refuse()
    assert message.startswith(
        "results/sub/b.png is 20x20, but the truth gt/sub/b.png is 16x16; compare with"
    )
    save(Path("results/sub/b.png"), 100)
    save(Path("masks/a.png"), np.zeros((16, 17), np.uint8))
    assert two.refuse("--masks", "masks").startswith("masks/a.png is 17x16, but the truth gt/a.png")


@pytest.mark.parametrize("folder", ["results", "gt", "masks"])
def test_folders_that_are_empty_missing_or_files(two, folder):
    what = {"gt": "truth"}.get(folder, folder)
    arguments = ["--masks", "masks"]
    os.rename(folder, "elsewhere")
    assert two.refuse(*arguments).startswith(f"{what}: no such file or folder: {folder}")
    Path(folder).mkdir()
    assert two.refuse(*arguments).startswith(f"{what}: no images in folder {folder} ")
    Path(folder).rmdir()
    Path(folder).touch()
    assert two.refuse(*arguments) == f"{what}: {folder} is a file; give the folder that it is in"


@pytest.mark.parametrize("path", ["results/sub/b.png", "gt/a.png", "masks/sub/b.png"])
def test_an_unreadable_picture(two, path):
    Path(path).write_bytes(Path(path).read_bytes()[:50])
    assert two.refuse("--masks", "masks").startswith(f"cannot read image {path}: ")


def test_masks_without_partner(two):
    save(Path("masks/c.png"), 0)
    assert two.refuse("--masks", "masks").startswith("masks: 1 picture has no truth in gt: c (in")
    os.remove("masks/a.png")
    assert two.refuse("--masks", "masks").startswith("truth: 1 picture has no mask in masks: a (in")


def test_a_mask_without_a_hole(two):
    save(Path("masks/a.png"), 255)
    assert two.refuse("--masks", "masks").startswith("masks/a.png hides nothing, so there is no")


def test_a_hole_where_no_window_of_ssim_fits(two):
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:5] = 0
    for name in ("a", "sub/b"):
        save(Path(f"masks/{name}.png"), mask)
    message = "SSIM has no value for the hole of masks/a.png, which lies within 5 pixels of the"
    assert two.refuse("--masks", "masks").startswith(message)
    mask[5] = 0
    save(Path("masks/sub/b.png"), mask)
    ran = two.measure("--masks", "masks", "--out", "m.csv")
    assert "SSIM over the hole leaves out 1, first a: there the hole lies within 5" in ran.out
    cells = {row["image"]: row["hole_ssim"] for row in read_csv("m.csv")}
    assert cells["a"] == "" and 0 <= float(cells["sub/b"]) <= 1
    save(Path("masks/a.png"), mask)
    assert "leaves out" not in two.measure("--masks", "masks").out


def test_pictures_too_small_for_ssim(case):
    for size, status in ((11, 0), (10, 2)):
        save(Path("gt/a.png"), 100, size=size)
        save(Path("results/a.png"), 101, size=size)
        assert case.measure().status == status
    assert case.refuse().startswith("gt/a.png is too small: SSIM needs 11 or more pixels on each")


def test_out_that_cannot_be_written_is_said_before_anything_is_read(two):
    Path("results/a.png").write_bytes(b"damaged")
    Path("file").touch()
    for out, message in (
        ("results", "--out: results is a folder; give a file, such as results/metrics.csv"),
        ("results/a.png", "--out: results/a.png; accepted: a CSV file, such as metrics.csv"),
        ("file/metrics.csv", "--out: cannot write file/metrics.csv: Not a directory"),
    ):
        ran = two.measure("--out", out)
        assert (ran.status, ran.out, ran.err) == (2, "", f"error: {message}\n")


def test_a_disk_that_is_full_in_the_end_leaves_an_older_file_alone(two, monkeypatch):
    Path("metrics.csv").write_text("older")

    def full(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("guided_diffusion.machine.storage.write_atomically", full)
    ran = two.measure("--out", "metrics.csv")
    assert ran.status == 2
    assert ran.err.endswith("error: --out: cannot write metrics.csv: No space left on device\n")
    assert Path("metrics.csv").read_text() == "older"


def test_absent_scikit_image(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert two.refuse() == "SSIM needs scikit-image: pip install -r requirements-eval.txt"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--results results",
        "--gt gt",
        "--masks masks",
        "--paper log/test_c256_thick --gt gt",
        "--paper log/test_c256_thick --masks masks",
        "--paper",
    ],
)
def test_wrong_usage(case, arguments):
    ran = case.run(*arguments.split())
    assert (ran.status, ran.out) == (2, "") and ran.err.startswith("usage: ")


def test_interrupted(two, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("guided_diffusion.evaluation.distortion.l1", interrupt)
    ran = two.measure()
    assert (ran.status, ran.out) == (130, "") and ran.err.endswith("\nstopped\n")
