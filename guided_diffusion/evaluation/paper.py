"""The table of RePaint's paper beside what this program's runs come to.

Lugmayr et al. 2022, table 1: LPIPS with AlexNet, means over 100 images; lower is better.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guided_diffusion.config import UserError
from guided_diffusion.evaluation.bootstrap import Estimate, estimate
from guided_diffusion.evaluation.table import (
    Pair,
    csv_text,
    find_pairs,
    markdown_table,
    perceptual,
    with_progress,
)
from guided_diffusion.machine import storage

if TYPE_CHECKING:
    from guided_diffusion.evaluation.lpips import Lpips

DATASETS = {"c256": "CelebA-HQ", "inet256": "ImageNet", "p256": "Places2"}
KINDS = {
    "thick": "Wide",
    "thin": "Narrow",
    "nn2": "Super-resolve 2×",
    "ev2li": "Alternating lines",
    "genhalf": "Half",
    "ex64": "Expand",
}
PAPER = {
    "c256": (0.059, 0.028, 0.029, 0.009, 0.165, 0.435),
    "inet256": (0.134, 0.064, 0.183, 0.089, 0.304, 0.629),
    "p256": (0.105, 0.044, 0.099, 0.051, 0.286, 0.615),
}
IMAGES = 100  # in each of the paper's cells

Cell = tuple[str, str]  # a key of DATASETS, a key of KINDS


@dataclass(frozen=True)
class PaperTable:
    """What was measured of each cell that has a run."""

    ours: dict[Cell, Estimate]

    def to_markdown(self) -> str:
        """The paper's figures, and below them ours; cells without a run are blank."""
        rows: list[Sequence[str]] = [("LPIPS (AlexNet)", *KINDS.values())]
        for dataset, title in DATASETS.items():
            rows.append((f"{title}, paper", *(f"{value:.3f}" for value in PAPER[dataset])))
            ours = [self.ours.get((dataset, kind)) for kind in KINDS]
            rows.append((f"{title}, ours", *(cell.describe(3) if cell else "" for cell in ours)))
        return "\n".join([markdown_table(rows), "", *self._notes()])

    def _notes(self) -> list[str]:
        notes = [f"Means over {IMAGES} images; ours with [95 % bootstrap interval over images]."]
        for (dataset, kind), cell in self.ours.items():
            if cell.number != IMAGES:
                notes.append(
                    f"{DATASETS[dataset]}, {KINDS[kind]}: ours is the mean over {cell.number}."
                )
        return notes

    def to_csv(self) -> str:
        """One line a cell."""
        rows = []
        for dataset, title in DATASETS.items():
            for (kind, mask), paper in zip(KINDS.items(), PAPER[dataset], strict=True):
                cell = self.ours.get((dataset, kind))
                figures = (cell.mean, cell.low, cell.high) if cell else ()
                ours = [f"{figure:.6g}" for figure in figures] or [""] * 3
                rows.append((title, mask, paper, *ours, cell.number if cell else ""))
        return csv_text([("dataset", "mask", "paper", "ours", "low", "high", "images"), *rows])


def compare(folders: Iterable[str]) -> PaperTable:
    """Measure finished runs of confs/test_*.yml; the name of a folder tells its cell.

    Raises UserError if a folder is none of these, or not finished, or the weights are missing.
    """
    runs: dict[Cell, str] = {}
    for folder in folders:
        cell = _cell(folder)
        if cell in runs:
            raise UserError(f"--paper: {runs[cell]} and {folder} are for the same cell; give one")
        _check_finished(folder)
        runs[cell] = folder
    pairs = {cell: find_pairs(f"{run}/inpainted", f"{run}/gt") for cell, run in runs.items()}
    network = _alexnet()
    return PaperTable({cell: _measured(pairs[cell], network) for cell in pairs})


def _alexnet() -> Lpips:
    from guided_diffusion.evaluation import lpips  # with torch, which takes seconds

    return lpips.load("alex")


def _measured(pairs: list[Pair], network: Lpips) -> Estimate:
    figures = [perceptual(pair, [network]) for pair in with_progress(pairs)]
    return estimate([each["lpips_alex"] for each in figures])


def _cell(folder: str) -> Cell:
    name = os.path.basename(os.path.normpath(folder))
    match = re.fullmatch(rf"test_({'|'.join(DATASETS)})_({'|'.join(KINDS)})", name)
    if match is None:
        raise UserError(
            f"--paper: {folder} is not the folder of a run of confs/test_*.yml, such as "
            "log/test_c256_thick"
        )
    return match[1], match[2]


def _check_finished(folder: str) -> None:
    path = f"{folder}/run.json"
    try:
        with storage.open_binary(path) as file:
            finished = json.load(file)["finished"]
    except OSError as error:
        raise UserError(
            f"--paper: cannot read {path}, which test.py writes: {error.strerror or error}"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"--paper: {path} is not as test.py writes it; run it again") from error
    if not finished:
        raise UserError(
            f"--paper: the run in {folder} is not finished; run test.py again with its config"
        )
