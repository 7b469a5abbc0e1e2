"""The scripts around the model of photos: the table of sources, the layout, and the score."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from guided_diffusion.config import load_training_config
from guided_diffusion.networks.unet import UNet

DATA = Path(__file__).parents[2] / "data"


def load_script(name: str):
    """Import a stand-alone script, which lies outside every package."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_photos = load_script("prepare_photos")
score_denoiser = load_script("score_denoiser")


def run_script(module, capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main(), *capsys.readouterr()


# ---- The table, and the layout ----


def test_every_photo_has_a_source_and_a_licence_that_allows_it():
    rows = prepare_photos.read_table()
    free = ("CC0", "Public domain", "CC-BY-1", "CC-BY-2", "CC-BY-3", "CC-BY-4", "MIT", "Apache-2.0")
    for row in rows:
        assert row["licence"].startswith((*free, "BSD-2-Clause", "Unsplash (CC0 era")), row
        assert row["source"] and row["path"] and row["licence_stated_in"], row
        assert row["author"] or not row["licence"].startswith("CC-BY"), row  # to be credited
    assert len({row["file"] for row in rows}) == len(rows)
    held_out = [row["licence"] for row in rows if row["use"] == "held_out"]
    assert len(held_out) == 24
    assert sum(licence.startswith(("CC0", "Public domain")) for licence in held_out) >= 10
    assert {row["use"] for row in rows} == {"train", "held_out"}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A folder with two photos, and their table."""
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "a" / "1.jpg").write_bytes(b"one")
    (source / "2.jpg").write_bytes(b"two")
    table = tmp_path / "table.tsv"
    table.write_text("file\tuse\na/1.jpg\ttrain\n2.jpg\theld_out\n")
    monkeypatch.setattr(prepare_photos, "TABLE", table)
    return source


def test_photos_are_laid_out_by_their_use(table, tmp_path, capsys, monkeypatch):
    target = tmp_path / "photos"
    status, said, _ = run_script(prepare_photos, capsys, monkeypatch, table, target)
    assert (status, said) == (0, "1 photos to train on, 1 held out\n")
    files = {path.relative_to(target).as_posix() for path in target.rglob("*.jpg")}
    assert files == {"train/a/1.jpg", "held_out/2.jpg"}
    assert (target / "train/a/1.jpg").read_bytes() == b"one"


def test_missing_photos_are_counted(table, tmp_path, capsys, monkeypatch):
    (table / "2.jpg").unlink()
    target = tmp_path / "photos"
    status, _, error = run_script(prepare_photos, capsys, monkeypatch, table, target)
    assert status == 2
    assert error == f"error: 1 of 2 photos are not in {table}; the first is 2.jpg\n"
    assert not target.exists()


# ---- The score ----


@pytest.fixture
def config(tmp_path) -> Path:
    settings = {
        "data_dir": "nowhere",
        "log_dir": "log",
        "batch_size": 1,
        "total_steps": 1,
        "image_size": 16,
        "num_channels": 32,
        "channel_mult": "1",
        "num_res_blocks": 1,
        "num_heads": 1,
        "learn_sigma": True,
        "noise_schedule": "cosine",
        "crop": "random",
        "scales": "1,2",
    }
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_network_that_predicts_nothing_is_wrong_by_all_of_the_noise(
    config, tmp_path, capsys, monkeypatch
):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png")
    torch.manual_seed(0)
    network = UNet(load_training_config(str(config)).network.params)
    for name, bias in (("fresh.pt", 0), ("biased.pt", 0.5)):  # a fresh network's output is zero
        torch.nn.init.constant_(network.out[-1].bias, bias)
        torch.save(network.state_dict(), tmp_path / name)
    status, table, _ = run_script(
        score_denoiser,
        capsys,
        monkeypatch,
        *("--conf_path", config, "--photos", tmp_path / "photos", "--number", 40),
        *(tmp_path / "fresh.pt", tmp_path / "biased.pt"),
    )
    assert status == 0
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert head[1] == "t = 20"
    for row, name, error in zip(rows, ("fresh.pt", "biased.pt"), (1, 1.25), strict=True):
        assert row[0] == name
        assert list(map(float, row[1:])) == pytest.approx([error] * 11, abs=0.02)


def test_missing_checkpoint(config, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (20, 20)).save(photos / "0.png")
    arguments = ("--conf_path", config, "--photos", photos, "--number", 1, "nothing.pt")
    status, _, error = run_script(score_denoiser, capsys, monkeypatch, *arguments)
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
