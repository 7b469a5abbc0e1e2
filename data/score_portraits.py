"""Score the embedded model: complete portraits that it never saw, and compare with the truth.

    python data/score_portraits.py
    python data/score_portraits.py --precision bf16
    python data/score_portraits.py --number 16 --set use_ddim=true

The right half of each portrait is hidden. Since portraits are symmetric, the left half tells what
the hidden one must look like. Prints the mean absolute error in the hidden half, in grey levels
(0-255), without resampling (jump_n_sample 1) and with it (10); for another precision, also how far
its pictures are from those in fp32, there.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.make_portraits import draw_portrait  # noqa: E402  (after the path is set)
from guided_diffusion import load_inpainter  # noqa: E402
from guided_diffusion.inpainter import Inpainter  # noqa: E402

HELD_OUT_SEED = 1  # the training portraits have seed 0
FIRST = 1000  # well away from the demo's portraits
BATCH = 16
JUMPS = "schedule_jump_params.jump_n_sample"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the embedded model.")
    parser.add_argument("--number", type=int, default=64, help="how many portraits (64)")
    parser.add_argument("--conf_path", default=str(ROOT / "confs/demo.yml"))
    parser.add_argument("--precision", help="one to compare with fp32, such as bf16")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)  # where the demo's paths start
    truth = held_out(arguments.number)
    precisions = ["fp32", *filter(None, [arguments.precision])]
    keep_mask = torch.ones(len(truth), 1, *truth.shape[2:])
    keep_mask[..., truth.shape[3] // 2 :] = 0
    print("| jump_n_sample | precision | mean absolute error | difference to fp32 |")
    print("| --- | --- | --- | --- |")
    for jump_n_sample in (1, 10):
        in_fp32 = None
        for precision in precisions:
            settings = [f"precision={precision}", f"{JUMPS}={jump_n_sample}", *arguments.set]
            inpaint = load_inpainter(arguments.conf_path, overrides=settings)
            results = complete(inpaint, truth, keep_mask)
            in_fp32 = results if in_fp32 is None else in_fp32
            errors = (hidden_difference(results, other, keep_mask) for other in (truth, in_fp32))
            print("| {} | {} | {:.2f} | {:.2f} |".format(jump_n_sample, precision, *errors))


def held_out(number: int) -> torch.Tensor:
    """Portraits that neither the training nor the demo has: (number, 3, 64, 64) in [-1, 1]."""
    portraits = [np.asarray(draw_portrait(HELD_OUT_SEED, FIRST + i)) for i in range(number)]
    return torch.from_numpy(np.stack(portraits)).permute(0, 3, 1, 2) / 127.5 - 1


def complete(inpaint: Inpainter, gt: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """The pictures with what the model puts in place of what is hidden: (N, 3, S, S)."""
    batches = [slice(i, i + BATCH) for i in range(0, len(gt), BATCH)]
    results = [inpaint(gt[batch], keep_mask[batch], seed=batch.start) for batch in batches]
    return torch.cat(results).clamp(-1, 1)


def hidden_difference(a: torch.Tensor, b: torch.Tensor, keep_mask: torch.Tensor) -> float:
    """The mean absolute difference where the mask hides, in grey levels."""
    hidden = (keep_mask == 0).expand_as(a)
    return (a - b)[hidden].abs().mean().item() * 127.5


if __name__ == "__main__":
    main()
