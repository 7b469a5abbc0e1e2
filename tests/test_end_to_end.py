"""Whole runs of `test.py`, as a user starts them, against the PNGs that the original wrote."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.support.golden_runs import prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EVALUATIONS = {  # per image: steps down, and again after each jump up
    "resample": 20 + 2 * 5 * 3,
    "odd_inputs": 50 + 2 * 10 * 3,
    "guided": 10 + 3 * 3,
    "random_label": 10 + 8 + 5 + 5,  # times 7 to 0 repeated; a jump to 5, times 4 to 0 again
    "short_start": 30 + 5 * 5,
}


@dataclass(frozen=True)
class Run:
    """A finished run of a golden case."""

    case: str
    folder: Path
    stdout: str

    @property
    def written(self) -> dict[str, np.ndarray]:
        return pictures(self.folder / "out")

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return pictures(self.folder / "expected")

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "out" / "run.json").read_text("utf-8"))


def start(folder: Path, settings: dict[str, object]) -> subprocess.Popen:
    """Run the config of a folder, from within it."""
    command = [sys.executable, str(ROOT / "test.py"), "--conf_path", "conf.yml"]
    for key, value in {"device": "cpu", **settings}.items():
        command += ["--set", f"{key}={value}"]
    # One thread each: networks so small gain nothing from more, and lose much on a busy machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def inpaint(case: str, parent: Path, **runs: dict[str, object]) -> dict[str, Run]:
    """Run a case several times side by side, each time with other settings."""
    for name in runs:
        prepare(case, parent / name)
    processes = {name: start(parent / name, settings) for name, settings in runs.items()}
    outputs = {name: process.communicate() for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, outputs[name][1]
    return {name: Run(case, parent / name, stdout) for name, (stdout, _) in outputs.items()}


@pytest.fixture(scope="module", params=EVALUATIONS)
def runs(request, tmp_path_factory) -> dict[str, Run]:
    """A case as it is, and in batches."""
    case = request.param
    batches = {f"data.eval.{case}.batch_size": 4}
    return inpaint(case, tmp_path_factory.mktemp(case), single={}, batched=batches)


@pytest.fixture(scope="module")
def resample_runs(tmp_path_factory) -> dict[str, Run]:
    """The case of four images in another order, and its last two images alone."""
    dataset = "data.eval.resample."
    shuffled = {f"{dataset}deterministic": "false", f"{dataset}batch_size": 3}
    last_two = {f"{dataset}offset": 2, "seed": 12}  # the case's own is 10
    return inpaint(
        "resample", tmp_path_factory.mktemp("resample"), shuffled=shuffled, last_two=last_two
    )


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """`gt/000000.png` and so on -> uint8 (H, W, 3)."""
    arrays = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            arrays[path.relative_to(folder).as_posix()] = np.asarray(picture)
    return arrays


def assert_faithful(written: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """At most one grey level apart, in at most 0.1 % of the values of each picture."""
    assert written.keys() == expected.keys()
    for name, picture in written.items():
        difference = np.abs(picture.astype(int) - expected[name].astype(int))
        assert difference.max() <= 1, name
        assert (difference > 0).mean() <= 1e-3, name


def fingerprint(folder: Path, name: str) -> dict:
    content = (folder / name).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return {"path": name, "bytes": len(content), "sha256": sha256}


def test_a_run_writes_what_the_original_wrote(runs):
    run = runs["single"]
    assert_faithful(run.written, run.expected)
    assert "out/inpainted" in run.stdout


def test_a_batch_gives_what_single_images_give(runs):
    assert_faithful(runs["batched"].written, runs["batched"].expected)


def test_a_run_records_what_was_run(runs):
    run = runs["single"]
    config = yaml.safe_load((run.folder / "conf.yml").read_text())
    names = {Path(name).name for name in run.expected}
    record = run.record
    assert record["finished"] is True
    assert record["seed"] == record["config"]["seed"] == config["seed"]
    effective = record["config"]["schedule_jump_params"]
    assert effective.items() >= config["schedule_jump_params"].items()
    assert record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert record["images"] == len(names)
    assert record["evaluations_per_image"] == EVALUATIONS[run.case]
    assert record["evaluations"] == EVALUATIONS[run.case] * len(names)
    assert record["seconds_per_image"].keys() == names
    assert all(seconds > 0 for seconds in record["seconds_per_image"].values())
    checkpoints = filter(None, [config["model_path"], config.get("classifier_path")])
    assert record["checkpoints"] == [fingerprint(run.folder, name) for name in checkpoints]


def test_the_order_of_work_does_not_matter(resample_runs):
    run = resample_runs["shuffled"]
    assert_faithful(run.written, run.expected)
    order = list(run.record["seconds_per_image"])
    assert order != sorted(order)  # the case's seed does shuffle


def test_after_an_offset_the_first_image_has_the_seeds_own_stream(resample_runs):
    run = resample_runs["last_two"]
    stems = ("000002", "000003")
    last = {name: run.expected[name] for name in run.expected if Path(name).stem in stems}
    assert len(last) == 2 * 4
    assert_faithful(run.written, last)
