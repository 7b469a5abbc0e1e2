"""Compare generated thick and thin masks with the published ones, as a Markdown table.

    bash download.sh data
    python data/compare_masks.py --published data/datasets/gt_keep_masks

p is that of a two-sample Kolmogorov-Smirnov test: below 0.05, the test tells the
generated masks from the published ones.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.stats import ks_2samp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from guided_diffusion.config.errors import exit_status  # noqa: E402  (after the path is set)
from guided_diffusion.images.files import list_images, read_rgb  # noqa: E402
from guided_diffusion.masks.kinds import draw_mask, mask_rng  # noqa: E402

TOUCHING = np.ones((3, 3))  # pixels that touch at a corner belong together


def parts(inside: np.ndarray) -> int:
    return ndimage.label(inside, TOUCHING)[1]


def depths(keep: np.ndarray) -> np.ndarray:
    """How far each pixel of the hole is from what is kept or from the outside."""
    return ndimage.distance_transform_edt(np.pad(~keep, 1))[1:-1, 1:-1][~keep]


def border(keep: np.ndarray) -> np.ndarray:
    return np.concatenate((keep[0], keep[-1], keep[:, 0], keep[:, -1]))


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "share that is kept": np.mean,
    "connected parts of the hole": lambda keep: parts(~keep),
    "connected parts of what is kept": parts,
    "median depth in the hole, pixels": lambda keep: np.median(depths(keep)),
    "largest depth in the hole, pixels": lambda keep: depths(keep).max(),
    "share of the border that is hidden": lambda keep: 1 - border(keep).mean(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare generated masks with published ones.")
    add = parser.add_argument
    add("--published", required=True, metavar="FOLDER", help="with folders thick/ and thin/")
    add("--number", type=int, default=1000, help="how many masks to draw of each kind (1000)")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args()
    return exit_status(partial(print_table, arguments.published, arguments.number, arguments.seed))


def print_table(published: str, number: int, seed: int) -> None:
    print("| kind | | published | generated | p |\n| --- | --- | --- | --- | --- |")
    for kind in ("thick", "thin"):
        paths = list_images("--published", f"{published}/{kind}")
        theirs = [np.asarray(read_rgb(path))[..., 0] for path in paths]
        size = theirs[0].shape[::-1]
        ours = [draw_mask(kind, size, mask_rng(seed, index)) for index in range(number)]
        for name, measure in MEASURES.items():
            print(f"| {kind} | {name} | {compare(measure, theirs, ours)} |")


def compare(
    measure: Callable[[np.ndarray], float], theirs: list[np.ndarray], ours: list[np.ndarray]
) -> str:
    samples = [[measure(mask == 255) for mask in masks] for masks in (theirs, ours)]
    return " | ".join([*map(summary, samples), f"{ks_2samp(*samples).pvalue:.2f}"])


def summary(values: list[float]) -> str:
    quartiles = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{np.mean(values):.3g} ({', '.join(f'{value:.3g}' for value in quartiles)})"


if __name__ == "__main__":
    sys.exit(main())
