"""Score a sampler on portraits that the embedded model never saw, under the study's six masks.

    python data/score_samplers.py --set sampler=langevin
    python data/score_samplers.py --number 16 --seeds 2 --set timestep_respacing=ddim250 \\
        --set schedule_jump_params.t_T=250 --set schedule_jump_params.jump_length=10

The second command is the paper's setting of RePaint, which takes an hour. Prints a row for each
kind of mask, all measured in the hole:

error: mean absolute difference to the truth, in grey levels (0-255), with its standard error
spread: standard deviation over the seeds, in grey levels
detail: energy of fine detail (root mean square of the Laplacian) over the truth's; 1 is right
seam: mean absolute step from a known pixel to a hidden neighbour, in grey levels (the truth's)
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.score_portraits import BATCH, HELD_OUT_SEED, held_out  # noqa: E402  (after the path)
from guided_diffusion import load_inpainter  # noqa: E402
from guided_diffusion.evaluation.paper import KINDS  # noqa: E402
from guided_diffusion.inpainter import Inpainter  # noqa: E402
from guided_diffusion.masks.kinds import draw_mask, mask_rng  # noqa: E402

APART = 1000  # seeds of one portrait's results
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--number", type=int, default=64, help="how many portraits (64)")
    add("--seeds", type=int, default=4, help="results of each portrait (4)")
    add("--masks", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="some only")
    add("--conf_path", default=str(ROOT / "confs/demo.yml"))
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # where the demo's paths start
    inpaint = load_inpainter(arguments.conf_path, overrides=arguments.set)
    truth = held_out(arguments.number)
    print(f"{inpaint.evaluations:,} evaluations, {arguments.number} portraits\n")
    print("| mask | error | spread | detail | seam |\n| --- | --- | ---: | ---: | ---: |")
    for kind in arguments.masks:
        keep = keep_masks(kind, truth)
        results = torch.stack([*complete(inpaint, truth, keep, arguments.seeds)])
        print(f"| {KINDS[kind]} | {' | '.join(score(results, truth, keep))} |", flush=True)


def keep_masks(kind: str, truth: torch.Tensor) -> torch.Tensor:
    """A mask for each picture, (N, 1, S, S): 1 = known."""
    side = truth.shape[2:]
    masks = [draw_mask(kind, side, mask_rng(HELD_OUT_SEED, i)) for i in range(len(truth))]
    return torch.stack([torch.from_numpy(mask == 255) for mask in masks])[:, None].float()


def complete(
    inpaint: Inpainter, truth: torch.Tensor, keep: torch.Tensor, seeds: int
) -> Iterator[torch.Tensor]:
    """What the model makes of the pictures, (N, 3, S, S), with each of the seeds."""
    for number in range(seeds):
        parts = []
        for i in range(0, len(truth), BATCH):
            part = slice(i, i + BATCH)
            parts.append(inpaint(truth[part], keep[part], seed=APART * number + i))
        yield torch.cat(parts).clamp(-1, 1)


def score(results: torch.Tensor, truth: torch.Tensor, keep: torch.Tensor) -> list[str]:
    """The cells of a row. results: (seeds, N, 3, S, S)."""
    hole = (1 - keep).expand_as(truth)
    errors = ((results - truth).abs() * hole).sum((0, 2, 3, 4)) / hole.sum((1, 2, 3)) / len(results)
    errors = errors * 127.5  # (N,)
    spread = (results.std(0) * hole).sum() / hole.sum() * 127.5 if len(results) > 1 else torch.nan
    *details, true_detail = [detail(pictures, hole) for pictures in (*results, truth)]
    *seams, true_seam = [seam(pictures, keep) for pictures in (*results, truth)]
    return [
        f"{errors.mean():.2f} ± {errors.std() / len(errors) ** 0.5:.2f}",
        f"{spread:.2f}",
        f"{sum(details) / len(details) / true_detail:.3f}",
        f"{sum(seams) / len(seams):.1f} ({true_seam:.1f})",
    ]


def detail(pictures: torch.Tensor, hole: torch.Tensor) -> float:
    """The root mean square of the Laplacian in the hole."""
    kernel = LAPLACIAN.expand(3, 1, 3, 3)
    laplacian = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return ((laplacian.square() * hole).sum() / hole.sum()).sqrt().item()


def seam(pictures: torch.Tensor, keep: torch.Tensor) -> float:
    """The mean absolute step between a known and a hidden neighbour, in grey levels."""
    total = number = 0.0
    for dim in (2, 3):
        steps, edges = pictures.diff(dim=dim).abs(), keep.diff(dim=dim).abs()
        total += (steps * edges).sum().item()
        number += 3 * edges.sum().item()
    return total / number * 127.5


if __name__ == "__main__":
    main()
