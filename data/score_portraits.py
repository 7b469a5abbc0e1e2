"""Score the embedded model: complete portraits that it never saw, and compare with the truth.

    python data/score_portraits.py

The right half of each portrait is hidden. Since portraits are symmetric, the left half tells what
the hidden one must look like. Prints the mean absolute error in the hidden half, in grey levels
(0-255), without resampling (jump_n_sample 1) and with it (10).
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from make_portraits import draw_portrait

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion import load_inpainter  # noqa: E402  (after the path is set)

HELD_OUT_SEED = 1  # the training portraits have seed 0
FIRST = 1000  # well away from the demo's portraits
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the embedded model.")
    parser.add_argument("--number", type=int, default=64, help="how many portraits (64)")
    parser.add_argument("--conf_path", default=str(ROOT / "confs/demo.yml"))
    arguments = parser.parse_args()
    portraits = [
        np.asarray(draw_portrait(HELD_OUT_SEED, FIRST + i)) for i in range(arguments.number)
    ]
    os.chdir(ROOT)  # where the demo's paths start
    truth = torch.from_numpy(np.stack(portraits)).permute(0, 3, 1, 2) / 127.5 - 1  # (N, 3, S, S)
    print("| jump_n_sample | evaluations | mean absolute error |\n| --- | --- | --- |")
    for jump_n_sample in (1, 10):
        print(score(arguments.conf_path, jump_n_sample, truth), flush=True)


def score(conf_path: str, jump_n_sample: int, truth: torch.Tensor) -> str:
    """One row of the table."""
    setting = f"schedule_jump_params.jump_n_sample={jump_n_sample}"
    inpaint = load_inpainter(conf_path, overrides=[setting])
    keep_mask = torch.ones(len(truth), 1, *truth.shape[2:])
    keep_mask[..., truth.shape[3] // 2 :] = 0
    results = torch.cat(
        [
            inpaint(truth[i : i + BATCH], keep_mask[i : i + BATCH], seed=i)
            for i in range(0, len(truth), BATCH)
        ]
    )
    hidden = (keep_mask == 0).expand_as(truth)
    error = (results.clamp(-1, 1) - truth)[hidden].abs().mean().item() * 127.5
    return f"| {jump_n_sample} | {inpaint.evaluations} | {error:.2f} |"


if __name__ == "__main__":
    main()
