"""Small training runs."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from guided_diffusion.checkpoints.loading import load_state_dict

ROOT = Path(__file__).parents[2]


NETWORK = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1",
    "num_res_blocks": 1,
    "num_heads": 1,
    "attention_resolutions": "16",
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "diffusion_steps": 4,
}


TRAINING = {
    "batch_size": 4,
    "lr": 0.001,
    "ema_rate": "0.9",
    "total_steps": 4,
    "save_interval": 2,
    "sample_interval": 0,
    "sample_number": 3,
    "show_progress": False,
    "device": "cpu",
    "seed": 5,
}


# Everything that has a state of its own, or draws random numbers.
EVERYTHING = {
    "ema_rate": "0.9,0.5",
    "dropout": 0.2,
    "schedule_sampler": "loss-second-moment",
    "microbatch": 3,
    "lr_anneal_steps": 16,
    "grad_clip": 1.0,
}


def write_images(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def write_config(data_dir: Path, log_dir: str = "log", **changes: Any) -> Path:
    """A YAML file beside the images; log_dir is relative to it."""
    folder = data_dir.parent
    paths = {"data_dir": str(data_dir), "log_dir": str(folder / log_dir)}
    path = folder / "training.yml"
    path.write_text(yaml.safe_dump(NETWORK | TRAINING | paths | changes))
    return path


def leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Tensors and numbers of a nested checkpoint by their paths."""
    if isinstance(content, dict):
        content = content.items()
    elif isinstance(content, list | tuple):
        content = enumerate(content)
    else:
        return {path: content}
    return {k: v for key, part in content for k, v in leaves(part, f"{path}/{key}").items()}


def assert_same_checkpoint(expected: Path, found: Path, names: list[str]) -> None:
    for name in names:
        wanted, got = (leaves(load_state_dict(f"{folder / name}")) for folder in (expected, found))
        assert wanted.keys() == got.keys()
        same = {key: np.array_equal(value, got[key]) for key, value in wanted.items()}
        assert all(same.values()), f"{name}: {[key for key in same if not same[key]]}"


def one_thread_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}
