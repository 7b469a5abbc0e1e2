"""Runs of `test.py` with `method: latent`, on tiny networks of weights that follow from names."""

import json
import shutil
from functools import cache
from pathlib import Path

import torch

from tests.support.case import Case
from tests.support.filled_weights import filled

GOLDEN = Path(__file__).parents[1] / "golden" / "ldm"
TINY = json.loads((GOLDEN / "tiny_config.json").read_text("utf-8"))
SIZE = 64  # of the golden pictures


@cache
def tiny_weights() -> dict[str, torch.Tensor]:
    """As the golden networks were filled: all by their full names, but for the copy."""
    shapes = json.loads((GOLDEN / "state_dict_manifests.json").read_text("utf-8"))["tiny"]
    weights = filled(shapes)
    for key in weights:
        if key.startswith("cond_stage_model."):
            weights[key] = weights[key.replace("cond_stage_model.", "first_stage_model.")]
    return weights


def write_checkpoint(path: Path) -> None:
    """A file as Lightning writes it, in so far as this program looks at it."""
    torch.save({"epoch": 7, "state_dict": tiny_weights()}, path)


class LatentCase(Case):
    """A folder with inputs of a golden case, and a config that runs them in a moment."""

    def __init__(self, folder: Path, golden: str = "ddim10", **keys: object):
        self.folder = folder
        for kind in ("gts", "masks"):
            shutil.copytree(GOLDEN / golden / kind, folder / kind)
        write_checkpoint(folder / "tiny.ckpt")
        run = json.loads((GOLDEN / golden / "run.json").read_text("utf-8"))
        self.dataset = {"gt_path": str(folder / "gts"), "mask_path": str(folder / "masks")}
        self.config = {
            "method": "latent",
            "model_path": str(folder / "tiny.ckpt"),
            "latent": TINY,
            "image_size": None,
            "device": "cpu",
            "data": {"eval": {"tiny": self.dataset}},
            **run,
            **keys,
        }
        self.write_to("out")
