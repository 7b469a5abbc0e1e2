"""Training: order of the data, averages, steps, checkpoints, and exact resume."""

import errno
import io
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train as script
from guided_diffusion import load_inpainter
from guided_diffusion.checkpoints.loading import load_state_dict
from guided_diffusion.config import UserError, load_training_config
from guided_diffusion.machine.ranks import World
from guided_diffusion.training import crops as crops_module
from guided_diffusion.training.build import build_trainer, sample_writer
from guided_diffusion.training.crops import Crop, RandomCrops, reduced
from guided_diffusion.training.data import TrainingImages, endless_batches, step_batches
from guided_diffusion.training.ema import EMA
from guided_diffusion.training.loop import Trainer, learning_rate, train
from tests.support.small_runs import one_thread
from tests.support.training import (
    EVERYTHING,
    NETWORK,
    ROOT,
    assert_same_checkpoint,
    one_thread_environment,
    write_config,
    write_images,
)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_images(tmp_path / "images", *(f"{i}.png" for i in range(6)))


@pytest.fixture(autouse=True)
def quick():
    """Tiny networks are faster so, and sums have one order, in this process and in others."""
    with one_thread():
        yield


def make_trainer(data_dir: Path, **changes: Any) -> Trainer:
    return build_trainer(load_training_config(str(write_config(data_dir, **changes))))[0]


def run(data_dir: Path, log_dir: str = "log", **changes: Any) -> Trainer:
    """What train.py does."""
    config = load_training_config(str(write_config(data_dir, log_dir, **changes)))
    trainer, images = build_trainer(config)
    trainer.resume(config.training.log_dir)
    train(
        trainer,
        images,
        config.training.log_dir,
        write_samples=sample_writer(config, trainer.device, len(images.class_folders)),
        show_progress=False,
    )
    return trainer


def take_steps(trainer: Trainer, data_dir: Path, count: int) -> list[float]:
    """Losses of steps on the images of a folder."""
    images = TrainingImages(str(data_dir), 16)
    batches = endless_batches(images, trainer.params.batch_size, trainer.seed, trainer.step)
    return [trainer.train_step(*batch) for batch in islice(batches, count)]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Data ----


def test_order_is_a_function_of_seed_and_step():
    batches = list(islice(step_batches(10, 4, seed=3, first_step=0), 30))
    for step in range(20):
        assert (
            list(islice(step_batches(10, 4, seed=3, first_step=step), 10))
            == (batches[step : step + 10])
        )
    assert next(step_batches(10, 4, seed=4, first_step=0)) != batches[0]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_every_epoch_has_every_image_once(batch_size):
    batches = islice(step_batches(10, batch_size, seed=0, first_step=0), 100)
    order = [i for batch in batches for i in batch]
    epochs = [order[start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10  # each shuffled afresh


def test_batches_hold_the_images_of_their_order(data_dir):
    images = TrainingImages(str(data_dir), 16)
    order = step_batches(6, 4, seed=1, first_step=2)
    for batch, (pictures, _) in islice(zip(order, endless_batches(images, 4, 1, 2)), 5):  # noqa: B905
        assert torch.equal(pictures, torch.stack([images[i][0] for i in batch]))


def test_classes_are_folders(tmp_path):
    folder = write_images(tmp_path / "images", "dog/1.png", "ant/2.png", "dog/0.png", "cat/a/3.png")
    images = TrainingImages(str(folder), 16)
    classes = {Path(images.paths[i]).name: images[i][1] for i in range(4)}
    assert classes == {"2.png": 0, "3.png": 1, "0.png": 2, "1.png": 2}
    images.check_classes(3)
    with pytest.raises(UserError, match="3 folders"):
        images.check_classes(2)


# ---- Random crops ----


def write_photo(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_pixels(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row, both in units of a pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


def test_a_crop_of_a_gradient_tells_place_and_scale(tmp_path):
    write_photo(tmp_path / "gradient.png", gradient(180, 250))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 4.0))
    for crop in (crops.draw(seed=3, number=number) for number in range(50)):
        pixels = as_pixels(crops[crop][0]).astype(float)
        for values, start in ((pixels[..., 0], crop.left), (pixels[..., 1].T, crop.top)):
            step = crop.side / 16
            truth = start + (np.arange(16) + 0.5) * step - 0.5
            # A filter bends a gradient at the photo's own edges.
            assert np.abs(values - truth)[:, 2:-2].max() <= 0.51
        assert 0 <= crop.left <= 250 - crop.side
        assert 0 <= crop.top <= 180 - crop.side


def test_scales_are_log_uniform_and_places_uniform(tmp_path):
    write_photo(tmp_path / "photo.png", noise(0, 100, 80))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 4.0))
    drawn = [crops.draw(0, number) for number in range(4000)]
    sides = np.array([crop.side for crop in drawn])
    assert (sides.min(), sides.max()) == (16, 64)
    assert np.mean(sides <= 32) == pytest.approx(0.5, abs=0.04)  # half of the octaves
    tops = np.array([crop.top / (100 - crop.side) for crop in drawn])
    lefts = np.array([crop.left / (80 - crop.side) for crop in drawn])
    for places in (tops, lefts):
        assert np.histogram(places, 4, (0, 1))[0] == pytest.approx([1000] * 4, rel=0.15)


def test_without_reduction_crops_are_the_photos_own_pixels(tmp_path):
    photo = write_photo(tmp_path / "photo.png", noise(0, 20, 18))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 1.0))
    found = set()
    for crop in (crops.draw(0, number) for number in range(200)):
        part = photo[crop.top : crop.top + 16, crop.left : crop.left + 16]
        assert np.array_equal(as_pixels(crops[crop][0]), part)
        found.add((crop.top, crop.left))
    assert found == {(top, left) for top in range(5) for left in range(3)}


@pytest.mark.parametrize("top", [0, 10, 32])
@pytest.mark.parametrize("left", [0, 6, 32])
def test_a_reduced_crop_is_a_part_of_the_reduced_photo(top, left):
    photo = noise(1, 64, 64)
    whole = np.asarray(Image.fromarray(photo).resize((32, 32), Image.Resampling.LANCZOS))
    part = reduced(photo, Crop(0, top, left, 32), 16)
    assert np.array_equal(part, whole[top // 2 : top // 2 + 16, left // 2 : left // 2 + 16])


def test_photos_count_by_their_area(tmp_path):
    sides = [(16, 16), (64, 32), (32, 40), (16, 160)]
    for i, (height, width) in enumerate(sides):
        write_photo(tmp_path / f"{i}.png", noise(i, height, width))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 1.0))
    drawn = np.bincount([crops.draw(0, number).photo for number in range(8000)], minlength=4)
    areas = np.array([height * width for height, width in sides])
    assert drawn / 8000 == pytest.approx(areas / areas.sum(), abs=0.02)


def test_small_photos_take_the_scales_that_fit(tmp_path):
    write_photo(tmp_path / "small.png", noise(0, 24, 200))
    write_photo(tmp_path / "smallest.png", noise(1, 300, 17))
    with pytest.warns(UserWarning, match="1 of 2"):
        crops = RandomCrops(str(tmp_path), 16, (1.1, 4.0))  # 18 pixels or more
    assert len(crops) == 1
    sides = [crops.draw(0, number).side for number in range(500)]
    assert (min(sides), max(sides)) == (18, 24)


def test_photos_too_small_are_counted_in_one_warning(tmp_path):
    for i, side in enumerate([40, 31, 64, 8]):
        write_photo(tmp_path / f"{i}.png", noise(i, 64, side))
    with pytest.warns(UserWarning, match="2 of 4 image.s. left out.* 32 pixels") as warnings:
        crops = RandomCrops(str(tmp_path), 16, (2.0, 4.0))
    assert len(warnings) == 1
    assert str(warnings[0].message).endswith(f"{tmp_path / '1.png'}")
    assert {crops.draw(0, number).photo for number in range(100)} == {0, 1}
    drawn = as_pixels(crops[Crop(1, 0, 0, 16)][0])  # the second photo that is left
    assert np.array_equal(drawn, noise(2, 64, 64)[:16, :16])


def test_crops_are_a_function_of_seed_and_step(tmp_path):
    write_photo(tmp_path / "photo.png", noise(0, 64, 64))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 4.0))
    batches = list(islice(crops.batches(4, seed=3, first_step=0), 12))
    assert list(islice(crops.batches(4, seed=3, first_step=5), 7)) == batches[5:]
    assert len({crop for batch in batches for crop in batch}) > 40
    assert next(crops.batches(4, seed=4, first_step=0)) != batches[0]


def test_ranks_share_the_crops(tmp_path):
    write_photo(tmp_path / "photo.png", noise(0, 64, 64))
    crops = RandomCrops(str(tmp_path), 16, (1.0, 4.0))
    whole = list(islice(endless_batches(crops, 5, 1, 2), 3))
    worlds = (World(rank, 2) for rank in range(2))
    ranks = [list(islice(endless_batches(crops, 5, 1, 2, world), 3)) for world in worlds]
    for step, (pictures, _) in enumerate(whole):
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), pictures)


def test_crops_have_the_classes_of_their_photos(tmp_path):
    colours = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}
    for folder, colour in colours.items():
        side = 8 if folder == "ant" else 24  # its folder is a class all the same
        write_photo(tmp_path / folder / "0.png", np.full((side, side, 3), colour, np.uint8))
    with pytest.warns(UserWarning, match="1 of 3"):
        crops = RandomCrops(str(tmp_path), 16, (1.0, 1.0))
    for number in range(20):
        picture, class_ = crops[crops.draw(0, number)]
        assert picture[:, 0, 0].argmax() == class_
    assert len(crops.class_folders) == 3


# ---- Averages ----


def test_average_forgets_at_its_rate():
    network = torch.nn.Linear(3, 2)
    before = network.weight.detach().clone()
    ema = EMA(network, rate=0.9)
    torch.nn.init.constant_(network.weight, 2.0)
    for _ in range(7):
        ema.update(network)
    torch.testing.assert_close(ema.weights["weight"], 2 + 0.9**7 * (before - 2))


def test_each_step_moves_the_averages(data_dir):
    trainer = make_trainer(data_dir, ema_rate="0.75,0")
    before = weights_of(trainer)
    take_steps(trainer, data_dir, 1)
    for name, after in weights_of(trainer).items():
        slow, fast = (ema.weights[name] for ema in trainer.emas)
        torch.testing.assert_close(slow, 0.75 * before[name] + 0.25 * after)
        assert torch.equal(fast, after)


# ---- A step ----


def with_plain_descent(trainer: Trainer) -> Trainer:
    """Weights then move by the gradients themselves, which Adam would hide."""
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=0.1)
    return trainer


@pytest.mark.parametrize("microbatch", [1, 2, 3, 9])
def test_microbatches_add_up_to_the_batch(data_dir, microbatch):
    whole = with_plain_descent(make_trainer(data_dir, lr=0.1))
    parts = with_plain_descent(make_trainer(data_dir, lr=0.1, microbatch=microbatch))
    losses = take_steps(whole, data_dir, 3)
    assert take_steps(parts, data_dir, 3) == pytest.approx(losses, rel=1e-4)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], weight, atol=1e-5, rtol=1e-4)


def test_long_gradients_are_cut(data_dir):
    trainer = with_plain_descent(make_trainer(data_dir, lr=0.1, grad_clip=0.01))
    before = weights_of(trainer)
    take_steps(trainer, data_dir, 1)
    moves = [(weight - before[name]).flatten() for name, weight in weights_of(trainer).items()]
    assert torch.cat(moves).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_learning_rate_warms_up_and_anneals(data_dir):
    constant = make_trainer(data_dir, lr=2.0).params
    assert [learning_rate(constant, step) for step in (0, 9, 999)] == [2, 2, 2]
    both = make_trainer(data_dir, lr=2.0, warmup_steps=4, lr_anneal_steps=10).params
    rates = [learning_rate(both, step) for step in (0, 1, 3, 4, 5, 9, 10, 11)]
    assert rates == pytest.approx([0.5, 0.9, 1.4, 1.2, 1.0, 0.2, 0, 0])


def test_optimiser_takes_the_learning_rate(data_dir):
    trainer = make_trainer(data_dir, lr=0.01, warmup_steps=4)
    take_steps(trainer, data_dir, 2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_flips_mirror_about_half_of_the_images(data_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Trainer, "_backward", lambda self, images, *_: seen.append(images) or torch.zeros(64)
    )
    pictures = torch.randn(64, 3, 16, 16)
    for random_flip in (True, False):
        trainer = make_trainer(data_dir, random_flip=random_flip, batch_size=64)
        trainer.train_step(pictures, torch.zeros(64, dtype=torch.long))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(seen[0], pictures, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(seen[0], pictures, strict=True)]
    assert 16 < sum(flipped) < 48
    assert sum(flipped) + sum(same) == 64
    assert torch.equal(seen[1], pictures)


def test_classes_reach_a_class_conditional_network(tmp_path):
    folder = write_images(tmp_path / "images", "a/0.png", "b/1.png", "c/2.png")
    trainer = make_trainer(folder, class_cond=True, weight_decay=0)
    before = weights_of(trainer)["label_emb.weight"]
    take_steps(trainer, folder, 4)
    moved = (weights_of(trainer)["label_emb.weight"] != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [0, 1, 2]


def test_bf16_computes_otherwise_but_keeps_weights_in_fp32(data_dir):
    full, half = make_trainer(data_dir), make_trainer(data_dir, use_bf16=True)
    losses = take_steps(full, data_dir, 3), take_steps(half, data_dir, 3)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert {weight.dtype for weight in weights_of(half).values()} == {torch.float32}


def test_it_learns(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
    trainer = make_trainer(folder, lr=0.003, diffusion_steps=20)
    losses = take_steps(trainer, folder, 50)
    assert np.mean(losses[:2]) > 1  # a network that says 0 is wrong by the noise's variance, 1
    assert np.mean(losses[-20:]) < 0.3


# ---- Checkpoints ----


def test_files_have_the_names_of_the_ecosystem(data_dir):
    run(data_dir, total_steps=5, ema_rate="0.9,0.9999")
    files = [f"{kind}{step:06d}.pt" for step in (2, 4, 5) for kind in ("model", "opt")]
    emas = [f"ema_{rate}_{step:06d}.pt" for step in (2, 4, 5) for rate in (0.9, 0.9999)]
    assert files_in(data_dir.parent / "log") == sorted(files + emas)


@pytest.mark.parametrize("name", ["model000004.pt", "ema_0.9_000004.pt"])
def test_weights_serve_as_model_path(data_dir, name):
    trainer = run(data_dir)
    log_dir = data_dir.parent / "log"
    weights = weights_of(trainer) if name.startswith("model") else trainer.emas[0].weights
    found = load_state_dict(f"{log_dir / name}")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())

    sampling = data_dir.parent / "sampling.yml"
    sampling.write_text(yaml.safe_dump(NETWORK | {"model_path": f"{log_dir / name}"}))
    inpaint = load_inpainter(str(sampling), device="cpu")
    result = inpaint(torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16))
    assert result.shape == (1, 3, 16, 16)
    assert result.isfinite().all()
    with pytest.raises(UserError, match="num_channels"):
        load_inpainter(str(sampling), device="cpu", overrides=["num_channels=64"])


def test_samples_appear_in_the_log(data_dir):
    run(data_dir, total_steps=3, sample_interval=2)
    pictures = [name for name in files_in(data_dir.parent / "log") if name.endswith(".png")]
    assert pictures == ["samples000002.png", "samples000003.png"]
    grid = np.asarray(Image.open(data_dir.parent / "log" / pictures[0]))
    assert grid.shape == (32, 32, 3)  # 2 x 2 places for 3 pictures
    assert (grid[16:, 16:] == 0).all()
    assert all(cell.std() > 0 for cell in (grid[:16, :16], grid[:16, 16:], grid[16:, :16]))


# ---- Exact resume ----


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_resumed_run_equals_an_uninterrupted_one(data_dir, changes):
    whole = run(data_dir, "whole", total_steps=16, **changes)
    for total_steps in (3, 11, 16):  # 3 and 11 are saved as last steps
        parts = run(data_dir, "parts", total_steps=total_steps, **changes)
    folder = data_dir.parent
    assert_same_checkpoint(folder / "whole", folder / "parts", whole.checkpoint_files(16))
    assert parts.step == 16
    if changes:
        assert whole.timesteps.probabilities().unique().numel() > 1  # past the uniform start


RANDOM_CROPS = {"crop": "random", "scales": "1,2"}


def test_resumed_run_on_crops_equals_an_uninterrupted_one(tmp_path):
    write_photo(tmp_path / "images" / "photo.png", noise(0, 40, 60))
    data_dir = tmp_path / "images"
    whole = run(data_dir, "whole", total_steps=8, **RANDOM_CROPS)
    for total_steps in (3, 8):
        run(data_dir, "parts", total_steps=total_steps, **RANDOM_CROPS)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", whole.checkpoint_files(8))


def test_incomplete_checkpoints_are_ignored(data_dir):
    whole = run(data_dir, "whole", total_steps=6)
    run(data_dir, "log", total_steps=4)
    log_dir = data_dir.parent / "log"
    for name in ("model000006.pt", "ema_0.9_000006.pt", ".0123.tmp", "opt000006.pt.tmp"):
        (log_dir / name).write_bytes(b"half a file")
    (log_dir / "opt000004.pt").unlink()
    trainer = make_trainer(data_dir)
    trainer.resume(str(log_dir))
    assert trainer.step == 2
    run(data_dir, "log", total_steps=6)
    assert_same_checkpoint(data_dir.parent / "whole", log_dir, whole.checkpoint_files(6))


def test_checkpoints_put_aside_in_a_subfolder_do_not_count(data_dir):
    run(data_dir, "log/old")
    trainer = make_trainer(data_dir)
    trainer.resume(str(data_dir.parent / "log"))
    assert trainer.step == 0


def test_finished_run_is_left_alone(data_dir):
    run(data_dir)
    log_dir = data_dir.parent / "log"
    before = {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()}
    run(data_dir)
    assert {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()} == before


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_weights(data_dir):
    """`kill -9`, then Ctrl-C, each at a random moment, then the same command once more."""
    changes = EVERYTHING | {"total_steps": 60, "save_interval": 5, "lr_anneal_steps": 60}
    whole = run(data_dir, "whole", **changes)
    log_dir = data_dir.parent / "log"
    command = [sys.executable, "train.py", "--conf_path", f"{write_config(data_dir, **changes)}"]

    killed, _ = stop_at_random(command, log_dir, signal.SIGKILL, 5)
    assert killed == -signal.SIGKILL
    interrupted, message = stop_at_random(command, log_dir, signal.SIGINT, 25)
    assert interrupted == 130
    assert message == "stopped; run the same command again to resume\n"
    last = subprocess.run(command, cwd=ROOT, env=one_thread_environment(), capture_output=True)
    assert last.returncode == 0, last.stderr
    assert b"resuming from step" in last.stdout
    assert_same_checkpoint(data_dir.parent / "whole", log_dir, whole.checkpoint_files(60))


def stop_at_random(
    command: list[str], log_dir: Path, stop: signal.Signals, first_step: int
) -> tuple[int, str]:
    """Exit status and stderr of a run, stopped soon after one of four checkpoints is there."""
    awaited = log_dir / f"opt{first_step + random.randrange(0, 20, 5):06d}.pt"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=one_thread_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while process.poll() is None and not awaited.exists():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(stop)
        message = process.communicate()[1]
    return process.returncode, message


# ---- train.py, and what users do wrong ----


def run_script(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of train.py."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    capsys.readouterr()
    status = script.main()
    return status, *capsys.readouterr()


@pytest.fixture
def failing_script(capsys, monkeypatch, tmp_path):
    """Runs train.py, which has to fail; returns its one-line error."""

    def run_failing(config: Path, *settings: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        overrides = [f"--set={setting}" for setting in settings]
        status, _, error = run_script(capsys, monkeypatch, "--conf_path", config, *overrides)
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before  # nothing written
        return error

    return run_failing


def test_script_says_what_it_does(data_dir, capsys, monkeypatch):
    config = write_config(data_dir, total_steps=2)
    status, first, error = run_script(capsys, monkeypatch, "--conf_path", config)
    assert (status, error) == (0, "")
    for part in ("0.2 M weights", "6 image(s)", "2 steps", "seed 5", "device cpu", "afresh"):
        assert part in first
    log_dir = data_dir.parent / "log"
    assert first.endswith(f"{log_dir}/ema_0.9_000002.pt\n")
    _, again, _ = run_script(capsys, monkeypatch, "--conf_path", config, "--set", "total_steps=3")
    assert "resuming from step 2" in again


def test_progress_shows_loss_and_time_left(data_dir, capsys, monkeypatch):
    config = write_config(data_dir, show_progress=True, log_interval=1)
    _, _, progress = run_script(capsys, monkeypatch, "--conf_path", config)
    assert "4/4" in progress
    assert "loss=" in progress


def test_help_shows_examples(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_script(capsys, monkeypatch, "--help")
    assert end.value.code == 0
    assert "python train.py --conf_path confs/train_portraits.yml" in capsys.readouterr().out


def test_missing_data_dir(data_dir, failing_script):
    error = failing_script(write_config(data_dir), "data_dir=/nowhere")
    assert "data_dir: no such file or folder: /nowhere" in error


def test_empty_data_dir(data_dir, tmp_path, failing_script):
    (tmp_path / "empty").mkdir()
    assert "no images in folder" in failing_script(write_config(tmp_path / "empty"))


def test_unreadable_image_is_named(data_dir, failing_script):
    (data_dir / "3.png").write_bytes(b"no picture")
    error = failing_script(write_config(data_dir, batch_size=6))
    assert f"cannot read image {data_dir / '3.png'}" in error


def test_no_photo_is_large_enough(data_dir, failing_script):
    error = failing_script(write_config(data_dir, crop="random", scales="2,4"))
    assert f"no image in {data_dir} has sides of 32 pixels or more" in error


def test_no_room_for_decoded_photos(data_dir, failing_script, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(crops_module.tempfile, "TemporaryFile", Full)
    error = failing_script(write_config(data_dir, crop="random"))
    assert "No space left on device; set the environment variable TMPDIR" in error


def test_unreadable_photo_is_named(data_dir, failing_script):
    (data_dir / "3.png").write_bytes(b"no picture")
    error = failing_script(write_config(data_dir, crop="random"))
    assert f"cannot read image {data_dir / '3.png'}" in error


def test_unknown_key(data_dir, failing_script):
    assert "unknown key; the nearest known key is lr" in failing_script(
        write_config(data_dir, lrr=0.1)
    )


def test_log_dir_that_cannot_be_written(data_dir, failing_script):
    (data_dir.parent / "file").touch()
    error = failing_script(write_config(data_dir, "file/log"))
    assert "log_dir: cannot write in" in error


@pytest.mark.parametrize(
    ("setting", "explanation"),
    [
        ("num_channels=64", "num_channels: 32 in the file, 64 in the config"),
        ("ema_rate=0.99", "set ema_rate as it was"),
        ("schedule_sampler=loss-second-moment", "set schedule_sampler"),
    ],
)
def test_log_dir_of_another_configuration(data_dir, failing_script, setting, explanation):
    run(data_dir, total_steps=2)
    error = failing_script(write_config(data_dir, total_steps=6), setting)
    assert explanation in error
    assert "choose another log_dir" in error


def test_log_dir_of_another_number_of_diffusion_steps(data_dir, failing_script):
    run(data_dir, total_steps=2, schedule_sampler="loss-second-moment")
    config = write_config(data_dir, schedule_sampler="loss-second-moment")
    assert "diffusion_steps" in failing_script(config, "diffusion_steps=9")


def test_damaged_checkpoint_is_named(data_dir, failing_script):
    run(data_dir, total_steps=2)
    (data_dir.parent / "log" / "model000002.pt").write_bytes(b"half a file")
    assert "model000002.pt" in failing_script(write_config(data_dir))


def test_copied_log_dir_is_enough_to_resume(data_dir):
    """Nothing outside log_dir is needed, such as a random state."""
    whole = run(data_dir, "whole", total_steps=4)
    log_dir = data_dir.parent / "copy"
    log_dir.mkdir()
    for name in whole.checkpoint_files(2):
        shutil.copy(data_dir.parent / "whole" / name, log_dir)
    run(data_dir, "copy", total_steps=4)
    assert_same_checkpoint(data_dir.parent / "whole", log_dir, whole.checkpoint_files(4))
