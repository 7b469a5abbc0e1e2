"""`python benchmark.py` on tiny configs, in this process."""

import contextlib
import io
import json
import runpy
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from guided_diffusion.config import Config, load_config

ROOT = Path(__file__).parents[2]
TINY = {
    "model_path": "nowhere/none.pt",
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 2,
    "use_scale_shift_norm": True,
    "learn_sigma": True,
    "timestep_respacing": "3",
    # Times 2 1, up to 2, 1 0, up to 1, 0: five evaluations.
    "schedule_jump_params": {"t_T": 3, "n_sample": 1, "jump_length": 1, "jump_n_sample": 2},
    "device": "cpu",
}
SHAPES = ROOT / "tests" / "golden" / "ldm" / "tiny_config.json"
LATENT = {  # its pictures are 64×64, its latents 16×16
    "method": "latent",
    "model_path": "nowhere/none.ckpt",
    "latent": json.loads(SHAPES.read_text("utf-8")),
    "ddim_steps": 4,
    "device": "cpu",
}


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


def write(folder: Path, **keys: object) -> str:
    """The path of a tiny config; with method="latent" it is LATENT, else TINY."""
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump((LATENT if "method" in keys else TINY) | keys))
    return str(path)


def load(folder: Path, **keys: object) -> Config:
    return load_config(write(folder, **keys), require_data=False)


def command(*arguments: str) -> Result:
    """What `python benchmark.py ARGUMENTS` does, in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        patch.object(sys, "argv", ["benchmark.py", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as exit_,
    ):
        runpy.run_path(str(ROOT / "benchmark.py"), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    return Result(exit_.value.code, out.getvalue(), err.getvalue())
