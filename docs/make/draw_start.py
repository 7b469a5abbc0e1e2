"""Start from a picture that is half wrong: what t keeps of it, and what it repairs.

    python docs/make/draw_start.py

The right half of each portrait, which the model never saw, is replaced by that of another person.
Sampling starts from this paste, noised to several times t: once with everything unknown, once with
the wrong half unknown. Prints the tables of docs/start_from.md, mean absolute differences in grey
levels (0-255), and draws data/pictures/start.png. Its rows come in pairs, above with everything
unknown, below with the wrong half unknown; its columns are the paste, results by rising t, and the
truth.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.score_portraits import complete, held_out  # noqa: E402  (after the path is set)
from guided_diffusion import load_inpainter  # noqa: E402
from guided_diffusion.images.tensors import to_bytes  # noqa: E402
from guided_diffusion.inpainter import Inpainter  # noqa: E402

CONFIG = "confs/demo.yml"
TIMES = (0, 2, 4, 6, 8, 11, 14, 17, 20, 24)  # of the demo's 25
DRAWN_TIMES, DRAWN = TIMES[1:], (0, 1, 2)
SIDE, GAP = 64, 4
LEFT, RIGHT = (..., slice(None, SIDE // 2)), (..., slice(SIDE // 2, None))
# Where everything is unknown, resampling has nothing to fit new parts to, and only forgets.
SETTINGS = {"everything": ["schedule_jump_params.jump_n_sample=1"], "the wrong half": []}
HEAD = (
    "| t | noise | evaluations | left half, from the truth | right half, from the paste "
    "| right half, from the truth |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Start the embedded model from wrong pastes.")
    parser.add_argument("--number", type=int, default=16, help="how many portraits (16)")
    number = parser.parse_args().number
    os.chdir(ROOT)  # where the demo's paths start
    truth, others = held_out(2 * number).split(number)  # (N, 3, S, S)
    paste = torch.cat([truth[LEFT], others[RIGHT]], dim=3)
    print(f"The paste's right half is {difference(paste, truth, RIGHT):.2f} from the truth.")
    results = {}
    for unknown, settings in SETTINGS.items():
        print(f"\nUnknown: {unknown}\n\n{HEAD}\n{re.sub('[^|]+', ' ---: ', HEAD)}")
        for t in TIMES:
            inpaint = load_inpainter(CONFIG, overrides=[*settings, f"start_from.t={t}"])
            noise = (1 - inpaint.diffusion.alphas_cumprod[t]) ** 0.5
            results[unknown, t] = repair(inpaint, paste, unknown)
            print_row(t, noise, inpaint, results[unknown, t], paste, truth)
    inpaint = load_inpainter(CONFIG)
    print_row("pure noise", 1, inpaint, repair(inpaint, paste, "the wrong half"), paste, truth)
    draw(paste, results, truth)


def repair(inpaint: Inpainter, paste: torch.Tensor, unknown: str) -> torch.Tensor:
    """What becomes of the pastes, (N, 3, S, S)."""
    keep_mask = torch.zeros(len(paste), 1, SIDE, SIDE)
    if unknown != "everything":
        keep_mask[LEFT] = 1
    return complete(inpaint, paste, keep_mask)


def print_row(
    t: int | str,
    noise: float,
    inpaint: Inpainter,
    results: torch.Tensor,
    paste: torch.Tensor,
    truth: torch.Tensor,
) -> None:
    pairs = ((truth, LEFT), (paste, RIGHT), (truth, RIGHT))
    errors = " | ".join(f"{difference(results, other, half):.2f}" for other, half in pairs)
    print(f"| {t} | {noise:.0%} | {inpaint.evaluations} | {errors} |", flush=True)


def difference(a: torch.Tensor, b: torch.Tensor, half: tuple) -> float:
    """The mean absolute difference in a half, in grey levels."""
    return (a[half] - b[half]).abs().mean().item() * 127.5


def draw(
    paste: torch.Tensor, results: dict[tuple[str, int], torch.Tensor], truth: torch.Tensor
) -> None:
    cell = SIDE + GAP
    rows = [(i, unknown) for i in DRAWN for unknown in SETTINGS]
    strip = Image.new("RGB", (cell * (len(DRAWN_TIMES) + 2) - GAP, cell * len(rows) - GAP), "white")
    for row, (i, unknown) in enumerate(rows):
        middle = [results[unknown, t][i] for t in DRAWN_TIMES]
        for column, picture in enumerate(to_bytes(torch.stack([paste[i], *middle, truth[i]]))):
            strip.paste(Image.fromarray(picture), (column * cell, row * cell))
    strip.quantize(256).save(ROOT / "data/pictures/start.png")


if __name__ == "__main__":
    main()
