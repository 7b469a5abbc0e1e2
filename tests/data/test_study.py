"""The study of the embedded model: what it runs, and the page and plots that it writes."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from data import study
from guided_diffusion.config import UserError, load_config
from guided_diffusion.scheduler import count_evaluations, jump_times
from tests.support.case import ROOT


class Sampler:
    """Stands in for the scripts that the study runs: results miss the truth in the hole by r."""

    def __init__(self):
        self.commands: list[tuple[str, list[str]]] = []

    def __call__(self, script: str, *arguments: object) -> None:
        words = [str(word) for word in arguments]
        self.commands.append((script, words))
        if script == "data/make_portraits.py":
            rng = np.random.default_rng(0)
            for i in range(study.NUMBER):
                shape = (study.SIZE, study.SIZE, 3)
                save(f"{words[0]}/{study.FIRST + i:06}.png", rng.integers(0, 200, shape))
            return
        config = load_config(ROOT / words[1], words[3::2])
        dataset, r = config.dataset, config.schedule.jump_n_sample
        for path in Path(dataset.gt_path).iterdir():
            truth = np.asarray(Image.open(path)).astype(int)
            mask = np.asarray(Image.open(Path(dataset.mask_path) / path.name))
            save(f"{dataset.inpainted_dir}/{path.name}", truth + r * (mask == 0)[..., None])
        evaluations = count_evaluations(jump_times(config.schedule))
        record = Path(dataset.inpainted_dir).parent / "run.json"
        record.write_text(json.dumps({"evaluations_per_image": evaluations}))


def save(path: str, values: np.ndarray) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def sampler(tmp_path, monkeypatch) -> Sampler:
    """A study of two portraits in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "confs").symlink_to(ROOT / "confs")
    monkeypatch.setattr(study, "NUMBER", 2)
    sampler = Sampler()
    monkeypatch.setattr(study, "_call", sampler)
    return sampler


def test_the_page_has_what_was_measured(sampler, tmp_path, capsys):
    study.run_portraits()
    page = (tmp_path / "log/study/study.md").read_text()
    rows = re.findall(r"^\| +([^|]+?) +\| (\d+) +\| ([\d,]+) +\| ([\d.]+) \[", page, re.MULTILINE)
    assert len(rows) == len(study.RESAMPLING) == 18
    # The demo's schedule takes 25 steps, and r = 10 costs the 205 evaluations of confs/demo.yml.
    expected = {("1", "25", "1.00"), ("5", "105", "5.00"), ("10", "205", "10.00")}
    assert {row[1:] for row in rows} == expected
    assert {row[0] for row in rows} == set(study.KINDS.values())
    jumps = re.findall(r"^\| (\d+) +\| ([\d.]+) \[.*\| ([\d.]+) \[.*\| ([\d.]+) \[", page, re.M)
    assert jumps == [(r, f"{r}.00", f"{r}.00", f"{r}.00") for r in ("5", "10", "15")]
    for name in ("study_masks.png", "study_jumps.png"):
        assert f"({name})" in page
        picture = Image.open(tmp_path / "log/study" / name)
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(10**6)) > 100


def test_every_cell_is_run_once_with_its_masks_and_jumps(sampler):
    study.run_portraits("page.md")
    assert Path("page.md").exists() and Path("page_masks.png").exists()
    (script, words), *runs = sampler.commands
    assert script == "data/make_portraits.py"
    assert words[1:] == ["--number", "2", "--size", "64", "--seed", "1", "--start", "1000"]
    seen = set()
    for script, words in runs:
        assert script == "test.py" and words[:2] == ["--conf_path", "confs/demo.yml"]
        config = load_config(ROOT / words[1], words[3::2])
        schedule, dataset = config.schedule, config.dataset
        kind = Path(dataset.mask_path).name
        seen.add((kind, schedule.jump_n_sample, schedule.jump_length))
        assert Path(dataset.inpainted_dir).parent.name == config.name
        folders = {dataset.inpainted_dir, dataset.gt_masked_dir, dataset.gt_dir}
        assert {str(Path(folder).parent) for folder in folders} == {f"log/study/{config.name}"}
    kinds = ("thick", "thin", "nn2", "ev2li", "genhalf", "ex64")
    resampling = {(kind, r, 5) for kind in kinds for r in (1, 5, 10)}
    assert seen == resampling | {("thick", r, j) for r in (5, 10, 15) for j in (1, 2, 5)}
    assert len(runs) == len(seen) == 25


def test_masks_have_the_names_of_the_portraits(sampler):
    study.run_portraits()
    for kind in study.KINDS:
        names = sorted(path.name for path in Path("log/study/masks", kind).iterdir())
        assert names == ["001000.png", "001001.png"]
    half = np.asarray(Image.open("log/study/masks/genhalf/001000.png"))
    assert (half[:, :32] == 255).all() and (half[:, 32:] == 0).all()
    thick = [np.asarray(Image.open(p)) for p in Path("log/study/masks/thick").iterdir()]
    assert (thick[0] != thick[1]).any()


@pytest.mark.slow
def test_a_script_that_fails_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "confs").symlink_to(ROOT / "confs")
    (tmp_path / "data").write_text("in the way")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    with pytest.raises(UserError, match="stopped, since data/make_portraits.py did"):
        study.run_portraits()
    assert not list(tmp_path.rglob("*.md"))


def test_the_page_is_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, problem in (
        (["--out", "page.txt"], "a page in Markdown"),
        (["--out", str(ROOT / "README.md")], "this is another page"),
        (["--out", str(ROOT / "README.md/x.md")], "Not a directory"),
    ):
        err = io.StringIO()
        with (
            patch.object(sys, "argv", ["study.py", *words]),
            redirect_stderr(err),
            redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as exit_,
        ):
            runpy.run_path(str(ROOT / "data" / "study.py"), run_name="__main__")
        assert exit_.value.code == 2 and problem in err.getvalue().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_the_study_needs_is_looked_for_first(sampler, tmp_path):
    without = patch.dict(sys.modules, {"matplotlib.figure": None})
    with without, pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        study.run_portraits()
    (tmp_path / "confs").unlink()
    with pytest.raises(UserError, match="confs/demo.yml: cannot read"):
        study.run_portraits()
    assert sampler.commands == [] and list(tmp_path.iterdir()) == []


def test_the_plot_of_jumps_is_over_r(sampler):
    draw = Axes.errorbar
    with patch.object(Axes, "errorbar", autospec=True, side_effect=draw) as plot:
        study.run_portraits()
    xs = [call.args[1] for call in plot.call_args_list]
    masks, jumps = np.array(xs[:6]), np.array(xs[6:])
    np.testing.assert_allclose(masks.mean(axis=0), [25, 105, 205])
    np.testing.assert_allclose(jumps.mean(axis=0), [5, 10, 15])
    assert np.ptp(masks, axis=0).max() < 10 and np.ptp(jumps, axis=0).max() < 0.5


@pytest.mark.slow
def test_ctrl_c_is_left_to_the_script_that_runs(tmp_path, monkeypatch):
    """It saves its state first, which takes longer than Python would wait for it."""
    script = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), exit(7)))"
    )
    (tmp_path / "slow.py").write_text(f"{script}; print('ready', flush=True); time.sleep(60)")
    program = (
        f"from pathlib import Path; from data import study; "
        f"study.ROOT = Path({str(tmp_path)!r}); study._call('slow.py')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "the study stopped, since slow.py did" in err.splitlines()[-1]
