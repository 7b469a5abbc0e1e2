"""`python test.py`: what it says and writes, and what it refuses before it writes anything."""

import gc
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from guided_diffusion import factory
from guided_diffusion.config import load_config
from guided_diffusion.images.files import load_prepared
from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.machine import storage
from guided_diffusion.run.records import load_state
from tests.support.case import (
    EVALUATIONS,
    GOLDEN,
    INPUTS,
    OUTPUTS,
    ROOT,
    SIZE,
    Case,
    Result,
    assert_same,
    command,
)


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, np.ndarray]:
    """The results of a `case` that nothing was changed about."""
    return Case(tmp_path_factory.mktemp("plain")).finish()


def differ(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return all((picture != theirs[name]).any() for name, picture in ours.items())


# ---- A run as a user sees it ----


@dataclass(frozen=True)
class Finished:
    case: Case
    result: Result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """Three images in batches of two, in a process of its own, with relative paths."""
    case = Case(tmp_path_factory.mktemp("finished"), images=3)
    case.config["show_progress"] = True
    case.dataset |= {"gt_path": "gts", "mask_path": "masks", "batch_size": 2}
    case.dataset["paths"] = {key: f"out/{name}" for key, name in OUTPUTS.items()}
    run = subprocess.run(
        [sys.executable, str(ROOT / "test.py"), "--conf_path", case.conf_path()],
        cwd=case.folder,
        capture_output=True,
    )
    return Finished(case, Result(run.returncode, run.stdout.decode(), run.stderr.decode()))


@pytest.mark.slow
def test_a_run_says_what_it_will_do_and_where_the_results_are(finished):
    result = finished.result
    assert result.status == 0, result.err
    plan, evaluations, unguided, seed, speed, left, results, report = result.out.splitlines()
    assert plan == "resample: 3 images from gts, masks from masks (by name), batch size 2"
    assert evaluations == "5 network evaluations per image, 15 in all"
    assert unguided == "no guidance: classifier_scale is 4, but there is no classifier_path"
    assert seed == "seed 10 (to repeat this run: --set seed=10)"
    assert speed == "device cpu, fp32"
    assert re.fullmatch(r"about [0-9.e-]+ (s|min) left \([0-9.e-]+ s per evaluation\)", left)
    assert results == "results: out/inpainted (settings and times: out/run.json)"
    assert report == "to look at: out/report.html"


@pytest.mark.slow
def test_one_bar_over_the_whole_run_with_image_and_rate(finished):
    bar = finished.result.err
    assert bar.count("\n") == 1 and bar.endswith("\n")
    states = bar.split("\r")
    assert any(state.startswith("image 1-2 of 3:   0%") for state in states)
    # Spaces at the end hide what was longer before.
    last = r"image 3 of 3: 100%\|.*\| 15/15 \[.*<00:00, +[0-9.]+ evaluations/s\] *\n"
    assert re.fullmatch(last, states[-1]), states[-1]


@pytest.mark.slow
def test_every_image_gets_its_four_files(finished):
    names = ["000000.png", "000001.png", "000002.png"]
    out = finished.case.out
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    expected = [f"{folder}/{name}" for folder in OUTPUTS.values() for name in names]
    records = ["inpainted.run/images-0.jsonl", "inpainted.run/lock"]
    assert written == sorted([*expected, *records, "report.html", "run.json"])
    for folder in OUTPUTS.values():
        shapes = {picture.shape for picture in finished.case.written(folder).values()}
        assert shapes == {(SIZE, SIZE, 3)}


@pytest.mark.slow
def test_run_json_tells_what_was_run(finished):
    record = finished.case.record()
    model = GOLDEN / "tiny32.pt"
    assert record["finished"] is True
    assert (record["seed"], record["device"], record["images"]) == (10, "cpu", 3)
    assert (record["evaluations_per_image"], record["evaluations"]) == (EVALUATIONS, 15)
    plain = {"precision": "fp32", "compile": False, "cuda_graph": False, "reason": ""}
    assert (record["speed"], record["batch_size"]) == (plain, 2)
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"python", "torch", "numpy", "pillow"}
    assert list(record["seconds_per_image"]) == ["000000.png", "000001.png", "000002.png"]
    assert all(seconds > 0 for seconds in record["seconds_per_image"].values())
    (checkpoint,) = record["checkpoints"]
    assert (checkpoint["path"], checkpoint["bytes"]) == (str(model), model.stat().st_size)
    assert checkpoint["sha256"].startswith("443a1baf7bf3677cd3a8cdabe0665f29533732b7a7d5c355284941")


@pytest.mark.slow
def test_the_config_in_run_json_loads_to_the_same(finished, tmp_path):
    again = tmp_path / "again.yml"
    again.write_text(yaml.safe_dump(finished.case.record()["config"]))
    assert load_config(str(again)) == load_config(str(finished.case.folder / "conf.yml"))


@pytest.mark.slow
def test_the_batch_size_does_not_change_the_results(finished, plain):
    for name, picture in plain.items():
        difference = np.abs(picture.astype(int) - finished.case.written()[name])
        assert difference.max() <= 1


def test_help_shows_examples_that_work():
    result = command("--help")
    assert result.status == 0
    examples = [line for line in result.out.splitlines() if line.startswith("  python test.py ")]
    assert len(examples) >= 3
    for example in examples:
        words = shlex.split(example)[2:]
        assert words[0] == "--conf_path" and set(words[2::2]) <= {"--set", "--dry-run"}
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        load_config(str(ROOT / words[1]), sets)


def test_a_dry_run_prints_the_plan_and_leaves_no_trace(case):
    path = case.conf_path()
    before = case.tree()
    result = command("--conf_path", path, "--dry-run")
    assert (result.status, result.err) == (0, "")
    assert case.tree() == before
    assert "2 images from " in result.out
    assert "5 network evaluations per image, 10 in all" in result.out
    assert result.out.endswith(
        "everything is in order; nothing was sampled or written (--dry-run)\n"
    )


def test_settings_on_the_command_line_win(case):
    result = case.run(
        *("--dry-run", "--set", "schedule_jump_params.jump_n_sample=1"),
        *("--set", "data.eval.resample.max_len=1", "--set", "seed=77"),
    )
    assert "1 of 2 images from " in result.out
    assert "3 network evaluations per image, 3 in all" in result.out
    assert "seed 77 " in result.out


def test_a_seed_drawn_afresh_is_told_and_repeats_the_run(case, plain):
    del case.config["seed"]
    seeds = []
    for _ in range(2):
        run = case.run("--overwrite")
        assert run.status == 0
        seeds += re.findall(r"seed ([0-9]+) \(to repeat this run: --set seed=\1\)", run.out)
    assert seeds[0] != seeds[1]
    assert case.record()["seed"] == case.record()["config"]["seed"] == int(seeds[1])
    drawn = case.written()
    assert differ(drawn, plain)
    case.write_to("again")
    assert_same(case.finish("--set", f"seed={seeds[1]}"), drawn)


def test_a_run_without_a_seed_goes_on_with_that_of_the_run_before(case):
    del case.config["seed"]
    first = case.finish()
    seed = case.record()["seed"]
    (case.out / "inpainted" / "000001.png").unlink()
    result = case.run()
    assert f"seed {seed} (to repeat this run: --set seed={seed})\n" in result.out
    assert "1 of 2 are finished and skipped (--overwrite does them again)\n" in result.out
    assert_same(case.written(), first)
    assert case.record()["seed"] == seed


def test_what_is_finished_is_not_done_again(case, plain):
    assert_same(case.finish(), plain)
    before = case.tree()
    with patch.object(factory, "build_inpainter", pytest.fail):
        result = case.run()
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        "all were finished before (--overwrite makes them again); "
        f"results: {case.out}/inpainted (settings and times: {case.out}/run.json)\n"
        f"to look at: {case.out}/report.html\n"
    )
    assert case.tree() == before


def test_overwrite_does_all_again(case, plain):
    case.finish()
    paths = sorted((case.out / "inpainted").iterdir())
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    result = case.run("--overwrite")
    assert (result.status, result.err) == (0, "")
    assert (
        "2 of 2 were made before and are done again, first 000000.png: --overwrite was given; "
        f"earlier results go to {case.out}/inpainted.old\n"
    ) in result.out
    assert [path.read_bytes() for path in paths] == before
    assert all(path.stat().st_mtime_ns > time for path, time in zip(paths, times, strict=True))
    old = sorted((case.out / "inpainted.old").iterdir())
    assert [path.read_bytes() for path in old] == before


def test_a_changed_setting_does_all_again_and_says_why(case, plain):
    case.finish()
    result = case.run("--set", "schedule_jump_params.jump_n_sample=1")
    assert "first 000000.png: schedule_jump_params.jump_n_sample was 2, is 1; " in result.out
    assert differ(case.written(), plain)
    assert_same(case.written("inpainted.old"), plain)


def test_a_changed_image_is_done_again_and_no_other(case, plain):
    case.finish()
    shutil.copy(case.folder / "gts" / "000000.png", case.folder / "gts" / "000001.png")
    dry = case.run("--dry-run")
    assert_same(case.written(), plain)
    result = case.run()
    for out in (dry.out, result.out):
        assert "1 of 2 are finished and skipped (--overwrite does them again)\n" in out
        reason = "1 of 2 were made before and are done again, first 000001.png: the image changed; "
        assert reason in out
    old = case.written("inpainted.old")
    assert_same(old, {"000001.png": plain["000001.png"]})
    assert_same(case.written() | old, plain)
    assert differ({"000001.png": case.written()["000001.png"]}, plain)
    gts = case.written("gt")
    np.testing.assert_array_equal(gts["000000.png"], gts["000001.png"])


def test_several_samples_of_each_image(case, plain):
    case.dataset["batch_size"] = 3
    result = case.run("--set", "samples_per_image=2")
    assert (result.status, result.err) == (0, "")
    assert ", 2 samples of each, batch size 3\n" in result.out
    assert "5 network evaluations per sample, 20 in all\n" in result.out
    names = [f"00000{image}_{sample}.png" for image in (0, 1) for sample in (0, 1)]
    written = case.written()
    assert list(written) == names
    assert list(case.record()["seconds_per_image"]) == names
    for name, picture in plain.items():
        first, second = (written[f"{name[:-4]}_{sample}.png"].astype(int) for sample in (0, 1))
        assert np.abs(first - picture).max() <= 1 and np.abs(second - first).max() > 1
    for kind in ("gt", "gt_masked", "gt_keep_mask"):
        assert list(case.written(kind)) == list(plain)
    # Sample 1 of image 0 has the stream of this seed.
    case.write_to("other")
    other = case.finish("--set", f"seed={10 + 2**32}")["000000.png"].astype(int)
    assert np.abs(other - written["000000_1.png"]).max() <= 1


# ---- What a run does at a time, and how fast ----


def out_of_memory_above(images: int) -> Callable[..., torch.Tensor]:
    """`PixelInpainter.sample` on a GPU that holds so many images."""
    sample = PixelInpainter.sample

    def sample_few(inpainter, gt, keep_mask, seeds, *, after_evaluation, **keys):
        def run_out(evaluation):
            after_evaluation(evaluation)
            if len(seeds) > images:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        return sample(inpainter, gt, keep_mask, seeds, after_evaluation=run_out, **keys)

    return sample_few


def test_a_batch_that_does_not_fit_costs_one_line_and_no_image(case, plain):
    case.dataset["batch_size"] = 2
    with patch.object(PixelInpainter, "sample", out_of_memory_above(1)):
        result = case.run()
    assert result.status == 0
    assert result.err == "warning: not enough memory for 2 images at a time; going on with 1\n"
    assert_same(case.written(), plain)
    record = case.record()
    assert (record["finished"], record["batch_size"]) == (True, 1)
    assert record["config"]["data"]["eval"]["resample"]["batch_size"] == 2


def test_an_image_that_does_not_fit_is_one_line(case):
    with patch.object(PixelInpainter, "sample", out_of_memory_above(0)):
        result = case.run()
    assert result.status == 2
    assert re.fullmatch(r"error: cpu has not enough memory for one image; .*\n", result.err)
    assert case.written() == {}


def test_batch_size_auto_is_one_on_a_cpu(case, plain):
    case.dataset["batch_size"] = "auto"
    assert "batch size 1 (auto)\n" in case.run("--dry-run").out
    assert_same(case.finish(), plain)
    record = case.record()
    assert record["batch_size"] == 1
    assert record["config"]["data"]["eval"]["resample"]["batch_size"] == "auto"


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_the_precision_is_told_before_the_run(case, arguments):
    result = case.run(*arguments, "--set", "precision=bf16")
    assert result.status == 0 and "\ndevice cpu, bf16\n" in result.out
    assert arguments or case.record()["speed"]["precision"] == "bf16"


def test_fast_says_what_it_chose_and_why(case):
    result = case.run("--set", "fast=true")
    assert result.status == 0, result.err
    speed = case.record()["speed"]
    assert speed["reason"].startswith("fast: ")
    assert re.search(rf"\ndevice cpu, {speed['precision']}.* \(fast: .*\)\n", result.out)
    assert f" ({speed['reason']})\n" in result.out


def test_a_network_that_puts_out_no_numbers_stops_the_run(case):
    state_dict = torch.load(GOLDEN / "tiny32.pt", weights_only=True)
    state_dict["out.2.bias"][0] = math.nan
    torch.save(state_dict, case.folder / "damaged.pt")
    result = case.run("--set", f"model_path={case.folder / 'damaged.pt'}")
    assert result.status == 2
    (error,) = result.err.splitlines()
    assert error.startswith("error: 000000.png: what the network predicts is not finite")
    assert "at step 2, after 0 of 5 evaluations; the checkpoint is likely damaged" in error
    assert case.written() == {}


# ---- What is refused ----


def _edit(section: str = "", **keys: object) -> Callable[[Case], None]:
    """A change of the config; None removes a key."""

    def change(case: Case) -> None:
        table = {"": case.config, "data": case.dataset}.get(section)
        table = case.config[section] if table is None else table
        table.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del table[key]

    return change


def _checkpoint(name: str, content: bytes) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        (case.folder / name).write_bytes(content)
        case.config["model_path"] = str(case.folder / name)

    return change


def _write(name: str, content: bytes) -> Callable[[Case], None]:
    """Put a file in the place of an input."""
    return lambda case: (case.folder / name).write_bytes(content)


def _remove(name: str) -> Callable[[Case], None]:
    return lambda case: (case.folder / name).unlink()


def _empty_gts(case: Case) -> None:
    shutil.rmtree(case.folder / "gts")
    (case.folder / "gts").mkdir()


def _two_datasets(case: Case) -> None:
    case.config["data"]["eval"]["second"] = dict(case.dataset)


def _colliding_names(case: Case) -> None:
    shutil.copy(case.folder / "gts" / "000000.png", case.folder / "gts" / "000000.PNG")
    shutil.copy(case.folder / "masks" / "000000.png", case.folder / "masks" / "000002.png")


def _output_below_a_file(case: Case) -> None:
    (case.folder / "a-file").write_bytes(b"")
    case.dataset["paths"]["lrs"] = str(case.folder / "a-file" / "below")


def _output_among_inputs(case: Case) -> None:
    case.dataset["paths"]["srs"] = str(case.folder / "gts" / "out")


def _outputs_in_one_folder(case: Case) -> None:
    case.dataset["paths"]["srs"] = case.dataset["paths"]["gts"]


def _missing_classifier(case: Case) -> None:
    case.config |= {
        "image_size": 64,
        "attention_resolutions": "32",
        "classifier_scale": 1.0,
        "classifier_path": str(case.folder / "256x256_classifier.pt"),
    }
    del case.dataset["image_size"]


TINY_BYTES = (GOLDEN / "tiny32.pt").read_bytes()
PNG_BYTES = (INPUTS / "gts" / "000001.png").read_bytes()
BAD_INPUT: dict[str, tuple[Callable[[Case], object], list[str]]] = {
    "unknown key": (_edit(imge_size=32), ["imge_size: unknown key", "nearest", "image_size"]),
    "wrong type": (_edit(image_size="big"), ["conf.yml", "image_size: found", "big", "accepted"]),
    "out of range": (_edit("data", batch_size=0), ["batch_size: found 0", ">= 1"]),
    "t_T above the steps": (_edit("schedule_jump_params", t_T=4), ["t_T: found 4", "at most 3"]),
    "jump_length 0": (_edit("schedule_jump_params", jump_length=0), ["jump_length: found 0"]),
    "no jump_length": (_edit("schedule_jump_params", jump_length=None), ["jump_length: missing"]),
    "two datasets": (_two_datasets, ["data.eval: found 2 datasets (resample, second)"]),
    "no dataset": (_edit(data=None), ["data.eval: missing"]),
    "class above 999": (_edit(class_cond=True, cond_y=1000), ["cond_y: found 1000", "999"]),
    "class below 0": (_edit(class_cond=True, cond_y=-1), ["cond_y: found -1", "0"]),
    "eta without DDIM": (_edit(ddim_eta=0.5), ["ddim_eta: found 0.5", "use_ddim: true"]),
    "eta too large": (_edit(use_ddim=True, ddim_eta=9), ["ddim_eta: found 9", "from 0 to 1"]),
    "respacing": (_edit(timestep_respacing="ddim333"), ["timestep_respacing", "333"]),
    "time shift": (_edit(inpa_inj_time_shift=9), ["inpa_inj_time_shift: found 9", "accepted: 1"]),
    "no such setting": (_edit("data", image_size=64), ["image_size: found 64", "32"]),
    # Speed.
    "unknown precision": (
        _edit(precision="fp8"),
        ["precision: found fp8", "fp32, bf16"],
    ),
    "tf32 without CUDA": (
        _edit(precision="tf32"),
        ["precision: found tf32", "fp32, bf16"],
    ),
    "CUDA graph without CUDA": (
        _edit(cuda_graph=True),
        ["cuda_graph: found true", "needs CUDA"],
    ),
    # Checkpoints.
    "published checkpoint missing": (
        _edit(model_path="nowhere/places256_300000.pt"),
        ["no such checkpoint", "bash download.sh places", "confs/demo.yml"],
    ),
    "classifier missing": (_missing_classifier, ["bash download.sh classifier"]),
    "another architecture": (
        _edit(num_channels=64),
        ["does not fit the config: num_channels: 32 in the file, 64 in the config"],
    ),
    "truncated checkpoint": (_checkpoint("cut.pt", TINY_BYTES[:-100]), ["cut.pt: the file is inc"]),
    "corrupt checkpoint": (_checkpoint("bad.pt", b"\x80\x02" + b"?" * 99), ["bad.pt: the file is"]),
    "empty checkpoint": (_checkpoint("empty.pt", b""), ["empty.pt: the file is empty"]),
    "web page": (_checkpoint("page.pt", b"<html>"), ["page.pt: this is no checkpoint", "web page"]),
    "malicious checkpoint": (
        _checkpoint("evil.pt", pickle.dumps(print, protocol=2)),
        ["evil.pt: ", "objects that could run code", "nothing was run"],
    ),
    # Images and masks.
    "missing folder": (
        _edit("data", gt_path="nowhere"),
        ["gt_path: no such file or folder", "now"],
    ),
    "empty folder": (_empty_gts, ["gt_path: no images in folder"]),
    "counts differ": (_remove("masks/000001.png"), ["has 2 image(s)", "has 1", "mask_path"]),
    "text as image": (_write("gts/000001.png", b"text"), ["gts/000001.png", "not an image"]),
    "truncated image": (_write("gts/000001.png", PNG_BYTES[:-60]), ["cannot read", "000001.png"]),
    "zero-byte image": (_write("gts/000001.png", b""), ["gts/000001.png", "empty"]),
    "zero-byte mask": (_write("masks/000000.png", b""), ["masks/000000.png", "empty"]),
    "offset too large": (_edit("data", offset=2), ["offset 2 leaves no image"]),
    "no whole batch": (_edit("data", drop_last=True, batch_size=3), ["drop_last", "no batch"]),
    # Outputs.
    "names collide": (_colliding_names, ["000000.PNG", "000000.png", "both write the result"]),
    "one folder for two": (_outputs_in_one_folder, ["paths.srs", "a folder of its own"]),
    "output among inputs": (_output_among_inputs, ["paths.srs", "a folder apart from gt_path"]),
    "unwritable output": (_output_below_a_file, ["cannot write", "a-file/below", "paths"]),
}


def assert_refused(result: Result, *fragments: str) -> None:
    (error,) = result.lines("error")
    *before, last = result.err.splitlines()
    assert last == error and before == result.lines("warning")
    assert result.status == 2 and result.out == ""
    for fragment in fragments:
        assert fragment in error, error


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_nothing_is_written(case, name):
    spoil, fragments = BAD_INPUT[name]
    spoil(case)
    path = case.conf_path()
    before = case.tree()
    for mode in ([], ["--dry-run"]):
        assert_refused(command("--conf_path", path, *mode), *fragments)
        assert case.tree() == before


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ["conf.yml: cannot read this config file", "No such file"]),
        (b"", ["the file is empty"]),
        (b"a: [1", ["not valid YAML", "line 1"]),
        (b"\xff\xfe\x00", ["not a text file in UTF-8"]),
    ],
)
def test_a_bad_config_file(tmp_path, content, fragments):
    if content is not None:
        (tmp_path / "conf.yml").write_bytes(content)
    assert_refused(command("--conf_path", str(tmp_path / "conf.yml")), *fragments)


@pytest.mark.parametrize("setting", ["seed", "sede=1", "seed=x", "schedule_jump_params.t_T=0"])
def test_a_bad_setting_on_the_command_line(case, setting):
    assert_refused(
        case.run("--set", setting), f"--set {setting}", "nearest" * (setting == "sede=1")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_asked_for_and_absent(case, device):
    assert_refused(case.run("--set", f"device={device}"), device, "use device: cpu")
    assert not case.out.exists()


@pytest.mark.slow
def test_a_mistake_in_the_config_is_told_without_waiting_for_torch(case):
    case.config["sede"] = 1
    run = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            str(ROOT / "test.py"),
            "--conf_path",
            case.conf_path(),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "error: " in run.stderr.splitlines()[-1]
    imported = [line.split("|")[-1].strip() for line in run.stderr.splitlines() if "|" in line]
    assert "yaml" in imported and "torch" not in imported and "numpy" not in imported


def test_an_image_that_is_damaged_while_the_run_is_on(case):
    build = factory.build_inpainter

    def build_and_damage(*arguments, **keys):
        (case.folder / "gts" / "000001.png").write_bytes(b"")
        return build(*arguments, **keys)

    with patch.object(factory, "build_inpainter", build_and_damage):
        result = case.run()
    assert result.status == 2 and len(result.lines("error")) == 1
    assert "cannot read image" in result.err and "gts/000001.png" in result.err
    assert list(case.written()) == ["000000.png"]
    assert case.record()["finished"] is False


def test_a_disk_that_is_full_while_the_run_is_on(case, plain):
    write = storage.write_atomically

    def fill_up(path, data):
        if path.endswith("inpainted/000001.png"):
            raise OSError(28, "No space left on device")
        write(path, data)

    with patch.object(storage, "write_atomically", fill_up):
        result = case.run()
    assert result.status == 2
    (error,) = result.lines("error")
    assert "inpainted/000001.png: No space left on device" in error
    assert list(case.written()) == ["000000.png"]
    assert case.record()["finished"] is False
    assert_same(case.finish(), plain)
    assert case.record()["finished"] is True


# ---- What is warned of, and done ----


def test_masks_that_keep_everything_or_nothing(case):
    Image.new("L", (SIZE, SIZE), 255).save(case.folder / "masks" / "000000.png")
    Image.new("L", (SIZE, SIZE), 0).save(case.folder / "masks" / "000001.png")
    result = case.run()
    assert (result.status, result.lines("error")) == (0, [])
    everything, nothing = result.lines("warning")
    assert "000000.png, keep everything" in everything and "000001.png, keep nothing" in nothing
    assert len(case.written()) == 2


def test_starting_below_the_last_step_is_warned_of_once_with_the_noise_level(case):
    case.config["schedule_jump_params"]["t_T"] = 2
    result = case.run()
    betas = np.linspace(1e-4, 2e-2, 1000)
    noise = math.sqrt(1 - np.prod(1 - betas[:501]))  # the steps kept are 0, 500 and 999
    assert result.status == 0
    (warning,) = result.lines("warning")
    assert f"step 1 of 3, whose noise level is {noise:.3f}, not 1" in warning
    assert "timestep_respacing: '2'" in warning


# ---- Names and places ----


def test_dots_in_names_and_subfolders(case, plain):
    names = {"000000.png": "my.photo.v2.final.png", "000001.png": "trip.2024/b.c.png"}
    for kind in ("gts", "masks"):
        (case.folder / kind / "trip.2024").mkdir()
        for old, new in names.items():
            (case.folder / kind / old).rename(case.folder / kind / new)
    results = case.finish()
    assert_same(results, {names[old]: picture for old, picture in plain.items()})
    for folder in OUTPUTS.values():
        assert set(case.written(folder)) == set(names.values())


def test_a_single_image_and_a_single_mask(case, plain):
    for key, kind in (("gt_path", "gts"), ("mask_path", "masks")):
        case.dataset[key] = str(case.folder / kind / "000000.png")
    assert_same(case.finish(), {"000000.png": plain["000000.png"]})


def test_without_a_folder_for_the_input_it_is_not_written(case, plain):
    del case.dataset["paths"]["gts"]
    assert_same(case.finish(), plain)
    assert sorted(path.name for path in case.out.iterdir()) == [
        *("gt_keep_mask", "gt_masked", "inpainted", "inpainted.run", "report.html", "run.json")
    ]


def test_a_slash_after_the_folder_of_the_results_moves_nothing(case, plain):
    case.dataset["paths"]["srs"] += "/"
    assert_same(case.finish(), plain)
    assert case.record()["finished"] is True


# ---- Keys that change the pictures ----


def test_known_pixels_are_pasted_to_the_byte(case, plain):
    results = case.finish("--set", "paste_known=true")
    for name, picture in results.items():
        original = load_prepared(str(case.folder / "gts" / name), SIZE)
        known = load_prepared(str(case.folder / "masks" / name), SIZE) == 255
        assert known.any() and not known.all()
        np.testing.assert_array_equal(picture[known], original[known])
        np.testing.assert_array_equal(picture[~known], plain[name][~known])
        assert (plain[name][known] != original[known]).any()


def test_without_injection_the_image_does_not_matter(case, plain):
    free = case.finish("--set", "inpa_inj_sched_prev=false")
    assert differ(free, plain)
    for path in (case.folder / "gts").iterdir():
        Image.new("RGB", (SIZE, SIZE), "red").save(path)
    case.write_to("red")
    assert differ(case.finish(), plain)
    case.write_to("red-free")
    assert_same(case.finish("--set", "inpa_inj_sched_prev=false"), free)


def test_without_a_schedule_every_time_is_visited_once(case, plain):
    once = case.finish("--set", "schedule_jump_params.jump_n_sample=1")
    del case.config["schedule_jump_params"]
    case.write_to("without")
    assert "3 network evaluations per image, 6 in all" in case.run("--dry-run").out
    assert_same(case.finish(), once)
    assert differ(once, plain)


def test_respacing_left_out_follows_the_schedule(case, plain):
    del case.config["timestep_respacing"]
    assert_same(case.finish(), plain)


def test_the_cosine_schedule(case, plain):
    assert differ(case.finish("--set", "noise_schedule=cosine"), plain)


def test_fixed_variances(case, plain):
    state_dict = torch.load(GOLDEN / "tiny32.pt", weights_only=True)
    without = {key: weight[:3] for key, weight in state_dict.items() if key.startswith("out.2.")}
    torch.save(state_dict | without, case.folder / "fixed.pt")
    case.config["model_path"] = str(case.folder / "fixed.pt")
    assert_refused(case.run(), "learn_sigma: false in the file, true in the config")
    assert differ(case.finish("--set", "learn_sigma=false"), plain)


def test_work_in_shuffled_order_gives_the_same(case, plain):
    assert_same(case.finish("--set", "data.eval.resample.deterministic=false"), plain)


# ---- Stopping ----


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_leaves_complete_images_and_one_line(tmp_path):
    case = Case(tmp_path, images=4)
    case.config |= {"timestep_respacing": "20", "checkpoint_every": 0}
    case.config["schedule_jump_params"] |= {"t_T": 20, "jump_n_sample": 10}  # 191 evaluations
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "test.py"), "--conf_path", case.conf_path()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell would pass on that it ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    states = set()
    while process.poll() is None and len(states) < 2:  # until it is at work on the second image
        states |= {path.name for path in case.out.glob("inpainted.run/unfinished/*.state")}
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.split("\n") == [
        "",  # a line of its own, wherever the bar is
        "stopping after this evaluation; Ctrl-C again stops at once",
        "stopped; to go on, run the same command again",
        "",
    ]
    files = [path.relative_to(case.out) for path in case.out.rglob("*") if path.is_file()]
    records = [path for path in files if path.parts[0] == "inpainted.run"]
    assert {path.suffix for path in set(files) - set(records)} == {".png", ".json"}
    *others, state = sorted(path.as_posix() for path in records)
    assert others == ["inpainted.run/images-0.jsonl", "inpainted.run/lock"]
    assert state.startswith("inpainted.run/unfinished/") and Path(state).name in states
    assert load_state(str(case.out / state))["position"] > 0
    for folder in OUTPUTS.values():
        written = case.written(folder)  # reads every picture to its end
        assert "000000.png" in written and "000003.png" not in written
    assert case.record()["finished"] is False


@pytest.mark.slow
def test_nobody_listens_any_more(case):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "test.py"), "--conf_path", case.conf_path()]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.returncode == 0 and "Error" not in run.stderr
    assert len(case.written()) == 2 and case.record()["finished"] is True


def test_overwrite_and_a_stop_or_a_restart(case, monkeypatch):
    case.finish()
    with patch.object(PixelInpainter, "sample", side_effect=KeyboardInterrupt):
        result = case.run("--overwrite")
    assert result.status == 130
    assert result.err.endswith(
        "stopped; to go on, run the same command again, without --overwrite\n"
    )
    gc.collect()  # of the stopped run, the lock, as when a process ends
    case.finish()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # by torchrun, after a process has died
    assert "all were finished before" in case.run("--overwrite").out


def test_files_that_are_not_of_this_run_are_told_of(case):
    case.finish()
    (case.folder / "gts" / "000001.png").rename(case.folder / "gts" / "000002.png")
    (case.folder / "masks" / "000001.png").rename(case.folder / "masks" / "000002.png")
    result = case.run()
    assert result.status == 0
    (line,) = result.lines("warning")
    assert line == (
        f"warning: 1 file in {case.out}/inpainted would not be made by this run, first "
        "000001.png; left as they are"
    )
    assert sorted(case.written()) == ["000000.png", "000001.png", "000002.png"]
