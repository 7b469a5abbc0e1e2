"""`python test.py` with `method: latent`: all that pixel models have, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.run import worker
from guided_diffusion.speed import choice, loading
from tests.support.case import GOLDEN, ROOT, Case
from tests.support.latent_runs import SIZE, LatentCase, tiny_weights


@pytest.fixture
def case(tmp_path) -> LatentCase:
    return LatentCase(tmp_path, ddim_steps=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, np.ndarray]:
    """The results of a `case` that nothing was changed about."""
    return LatentCase(tmp_path_factory.mktemp("plain"), ddim_steps=2).finish()


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, picture in one.items():
        assert (picture == other[name]).all(), name


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, picture in one.items():
        difference = np.abs(picture.astype(int) - other[name])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001, name


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def add_photo(case: LatentCase, name: str, height: int, width: int) -> None:
    """A photo of any size, with a hole in its middle."""
    save(case.folder / "gts" / name, photo(height, width))
    mask = np.full((height, width), 255, np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 0
    save(case.folder / "masks" / name, mask)


# ---- As for pixels ---------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_writes_all_outputs(case):
    result = case.run()
    assert (result.status, result.lines("error"), result.lines("warning")) == (0, [], [])
    assert "2 network evaluations per image, 4 in all" in result.out
    for kind in ("inpainted", "gt_masked", "gt", "gt_keep_mask"):
        assert {array.shape for array in case.written(kind).values()} == {(SIZE, SIZE, 3)}
    record = case.record()
    assert record["finished"] and record["evaluations_per_image"] == 2
    assert record["config"]["method"] == "latent"
    assert record["config"]["latent"]["autoencoder"]["n_embed"] == 256
    assert (case.out / "report.html").exists()


def test_results_do_not_depend_on_batches_nor_on_the_order(case, plain):
    case.dataset |= {"batch_size": 2, "deterministic": False}
    assert_close(case.finish(), plain)


def test_an_interrupted_run_goes_on_to_the_same_bytes(case, plain):
    case.config["checkpoint_every"] = 0
    load_network, calls = loading.load_network, []

    def counted(*arguments: object, **options: object) -> loading.Function:
        network = load_network(*arguments, **options)

        def evaluate(*inputs: torch.Tensor) -> torch.Tensor:
            calls.append(len(inputs[0]))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return network(*inputs)

        return evaluate

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("guided_diffusion.factory.load_network", counted)
        assert case.run().status == 130
        calls[:] = [0] * 10
        result = case.run()
    assert result.status == 0 and len(calls) == 10 + 3  # one of four evaluations was not lost
    assert_same(case.written(), plain)


def test_finished_results_are_skipped_until_a_setting_changes(case, plain):
    case.finish()
    assert "all were finished before" in case.run().out
    result = case.run("--set", "ddim_steps=1")
    assert "2 of 2 were made before and are done again" in result.out
    assert "ddim_steps" in result.out
    of_no_effect = (
        "ddim_steps=1",
        "latent.autoencoder.resolution=512",
        "latent.autoencoder.dropout=0.5",
    )
    again = case.run(*(word for setting in of_no_effect for word in ("--set", setting)))
    assert "all were finished before" in again.out


@pytest.mark.parametrize(
    ("image_size", "remedy"),
    [
        (None, ", or image_size: 512 and, in the dataset, fit: region (the hole's surroundings)"),
        (544, ", or a smaller image_size, such as 512"),
        (512, ""),
    ],
)
def test_what_to_do_where_a_photo_does_not_fit_in_memory(case, image_size, remedy):
    case.config["image_size"] = image_size
    with (
        patch.object(worker, "offered_precisions", lambda device: ["fp32", "bf16"]),
        patch.object(Autoencoder, "encode", lambda *_: torch.empty(2**58)),
    ):
        result = case.run()
    assert result.status == 2
    [error] = result.lines("error")
    known = "error: cpu has not enough memory for one image; set precision: bf16 (half the memory)"
    assert error == known + remedy
    assert case.written() == {}


def test_samples_have_streams_of_their_own(case, plain):
    results = case.finish("--set", "samples_per_image=2")
    assert len(results) == 4
    assert (results["000000_0.png"] == plain["000000.png"]).all()
    assert (results["000000_1.png"] != plain["000000.png"]).any()


def test_the_process_is_shown_as_pictures(case):
    save(case.folder / "gts" / "000000.png", photo(50, 70))
    save(case.folder / "masks" / "000000.png", np.zeros((50, 70), np.uint8))
    case.finish("--set", "log_every=1")
    frames = [path for path in (case.out / "process").rglob("*.png")]
    assert {Image.open(path).size for path in frames} == {(70, 50), (SIZE, SIZE)}
    for name in ("000000.webp", "000000.gif"):
        assert list((case.out / "process").rglob(name)), name


def test_bf16_is_close_to_fp32(case, plain):
    if "bf16" not in choice.offered_precisions(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bf16 numbers")
    for name, picture in case.finish("--set", "precision=bf16").items():
        assert np.abs(picture.astype(int) - plain[name]).mean() < 3


@pytest.mark.slow
def test_two_processes_make_the_same_results(case, plain):
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "test.py")]
    subprocess.run(
        [sys.executable, *command, "--conf_path", case.conf_path()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    assert_close(case.written(), plain)  # to the byte with as many threads


# ---- Any size --------------------------------------------------------------------------------


def test_photos_stay_as_they_are_in_batches_of_equal_sizes(case):
    sizes = {"a.png": (33, 70), "b.png": (64, 64), "c.png": (33, 70), "d.png": (70, 33)}
    for name, size in sizes.items():
        add_photo(case, name, *size)
    case.dataset["batch_size"] = 4
    results = case.finish()
    for name, size in sizes.items():
        keep = np.asarray(Image.open(case.folder / "masks" / name)) == 255
        gt = np.asarray(Image.open(case.folder / "gts" / name))
        assert results[name].shape[:2] == size
        assert (results[name][keep] == gt[keep]).all()
        assert (results[name][~keep] != gt[~keep]).any()


def test_what_belongs_to_whole_photos_comes_back(case):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    add_photo(case, "a.png", 40, 70)
    picture = Image.fromarray(photo(40, 70))
    picture.putalpha(90)
    picture.save(case.folder / "gts" / "a.png", icc_profile=profile)
    case.finish()
    with Image.open(case.out / "inpainted" / "a.png") as result:
        assert result.info["icc_profile"] == profile
        keep = np.asarray(Image.open(case.folder / "masks" / "a.png")) == 255
        np.testing.assert_array_equal(np.asarray(result)[..., 3], np.where(keep, 90, 255))


def test_an_image_size_resizes_and_crops(case):
    add_photo(case, "a.png", 100, 150)
    results = case.finish("--set", "image_size=48")
    assert {picture.shape for picture in results.values()} == {(48, 48, 3)}


def test_holes_of_whole_photos_are_filled_region_by_region(case):
    add_photo(case, "a.png", 200, 300)
    case.dataset["fit"] = "region"
    result = case.finish("--set", "image_size=64")["a.png"]
    keep = np.asarray(Image.open(case.folder / "masks" / "a.png")) == 255
    assert result.shape == (200, 300, 3)
    assert (result[keep] == photo(200, 300)[keep]).all()


def test_colours_of_a_region_are_shifted_to_those_around_the_hole(case):
    """A decoder that makes all 25 levels brighter leaves no edge."""
    save(case.folder / "gts" / "000000.png", np.full((64, 64, 3), 100, np.uint8))
    mask = np.full((64, 64), 255, np.uint8)
    mask[24:40, 24:40] = 0
    save(case.folder / "masks" / "000000.png", mask)
    case.dataset |= {"fit": "region", "max_len": 1}

    def brighter(autoencoder: Autoencoder, z: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 3, 64, 64), 125 / 127.5 - 1)

    with patch.object(Autoencoder, "decode", brighter):
        result = case.finish("--set", "image_size=64")["000000.png"]
    assert np.abs(result.astype(int) - 100).max() <= 2


def test_preview_and_dry_run_write_nothing_else(case):
    before = {path for path in case.folder.rglob("*")}
    assert "everything is in order" in case.run("--dry-run").out
    assert case.run("--preview", str(case.folder / "preview.png")).status == 0
    made = {path for path in case.folder.rglob("*")} - before
    assert {path.name for path in made} == {"conf.yml", "preview.png"}


# ---- Refused before anything is loaded -------------------------------------------------------


def refusal(case: LatentCase, *settings: str) -> str:
    before = case.tree()
    result = case.run(*(word for setting in settings for word in ("--set", setting)))
    after = {path: content for path, content in case.tree().items() if "conf.yml" not in path}
    assert result.status == 2 and "Traceback" not in result.err
    assert after == {path: content for path, content in before.items() if "conf.yml" not in path}
    (line,) = result.lines("error")
    return line


def test_the_wrong_method_for_a_checkpoint_is_named(case):
    pixel = str(GOLDEN / "tiny32.pt")
    assert "set method: pixel" in refusal(case, f"model_path={pixel}")
    result = Case(case.folder / "pixel").run("--set", f"model_path={case.config['model_path']}")
    assert result.status == 2 and not (case.folder / "pixel" / "out").exists()
    assert "set method: latent" in result.lines("error")[0]


@pytest.mark.parametrize("steps", ["0", "1001", "-3", "many"])
def test_impossible_numbers_of_steps(case, steps):
    assert "from 1 to 1000" in refusal(case, f"ddim_steps={steps}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("schedule_jump_params.jump_length=10", "does not resample"),
        ("schedule_jump_params.t_T=10", "does not resample"),
        ("start_from.t=3", "start_from"),
        ("timestep_respacing=10", "ddim_steps"),
        ("paste_known=true", "paste_known"),
        ("ddim_eta=9", "ddim_eta"),
        ("data.eval.tiny.fit=region", "image_size"),
        ("image_size=60000", "from 1 to 16384"),
        ("latent.unet.num_res_blocks=100000000", "from 1 to 100"),
    ],
)
def test_keys_that_belong_to_pixels(case, setting, words):
    line = refusal(case, setting)
    assert setting.partition("=")[0].split(".")[0] in line and words in line


def test_a_mask_of_another_size(case):
    save(case.folder / "masks" / "000001.png", np.zeros((SIZE, SIZE + 1), np.uint8))
    line = refusal(case)
    assert "1 of 2 images" in line and "64x64" in line and "65x64" in line


def test_latent_keys_belong_to_latent(case):
    case.config["method"] = "pixel"
    assert "method: latent" in refusal(case)


def test_networks_of_other_shapes_are_refused_by_a_dry_run(case):
    for key, shape in (("autoencoder.n_embed", 128), ("unet.model_channels", 64)):
        result = case.run("--dry-run", "--set", f"latent.{key}={shape}")
        assert result.status == 2
        assert f"latent.{key}: " in result.lines("error")[0]


def test_without_a_moving_average_a_warning_and_the_plain_weights(case):
    plain = {key: w for key, w in tiny_weights().items() if not key.startswith("model_ema.")}
    torch.save({"state_dict": plain}, case.config["model_path"])
    result = case.run()
    assert result.status == 0
    (line,) = result.lines("warning")
    assert "no moving average" in line
    assert json.loads((case.out / "run.json").read_text())["finished"]
