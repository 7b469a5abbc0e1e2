"""Measure results against the truth: pairs of pictures, a row of figures for each, and means.

A result belongs to the truth of the same name (without the suffix; subfolders are part of it). If
there are several samples of each image, the results `x_0`, `x_1`, ... belong to the truth `x`, and
its figures are the means over them.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from guided_diffusion.config import UserError
from guided_diffusion.evaluation import distortion, lpips_files
from guided_diffusion.evaluation.bootstrap import Estimate, estimate
from guided_diffusion.images.files import list_images, read_rgb
from guided_diffusion.images.names import Name, match_names, split_names
from guided_diffusion.images.pairs import is_same_path
from guided_diffusion.machine import storage

if TYPE_CHECKING:
    from guided_diffusion.evaluation.lpips import Features, Lpips

# Column -> its title, whether higher or lower is better, and decimal places for people.
METRICS = {
    "l1": ("L1 (grey levels of 255)", "lower", 2),
    "psnr": ("PSNR (dB)", "higher", 2),
    "ssim": ("SSIM", "higher", 4),
    "lpips_alex": ("LPIPS (AlexNet)", "lower", 4),
    "lpips_vgg": ("LPIPS (VGG)", "lower", 4),
    "diversity_alex": ("diversity (LPIPS between samples, AlexNet)", "higher", 4),
    "diversity_vgg": ("diversity (LPIPS between samples, VGG)", "higher", 4),
}
HOLE = "hole_"  # before the name of a column: over the hole alone

Figures = dict[str, float]  # column -> value


# ---- Pairs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A truth, and all that was made of it; paths."""

    name: str
    truth: str
    results: tuple[str, ...]  # in the order of their numbers
    mask: str | None


def find_pairs(results_dir: str, gt_dir: str, masks_dir: str | None = None) -> list[Pair]:
    """Which pictures belong together; none is read yet. Raises UserError if one has no partner.

    Results and masks that are called otherwise than the truth pair by name as in a run: x_mask
    belongs to x if all masks are called so, and may lie beside it.
    """
    truths = _by_name("truth", gt_dir)
    if masks_dir and is_same_path(masks_dir, gt_dir):
        masks = _split(truths, gt_dir)
        truths = {name: truths[name] for name in masks}
    else:
        masks = _partners(truths, _by_name("masks", masks_dir)) if masks_dir else None
    results = _by_name("results", results_dir)
    groups, strangers = _grouped(results, truths)
    if strangers or truths.keys() - groups.keys():
        results = _partners(truths, results)
        groups, strangers = _grouped(results, truths)
    _refuse(strangers, "results", results_dir, "no truth in", gt_dir)
    _refuse(truths.keys() - groups.keys(), "truth", gt_dir, "no result in", results_dir)
    if masks is not None:
        _refuse(truths.keys() - masks.keys(), "truth", gt_dir, "no mask in", masks_dir)
        _refuse(masks.keys() - truths.keys(), "masks", masks_dir, "no truth in", gt_dir)
    return [
        Pair(name, path, tuple(results[of_it] for of_it in groups[name]), masks and masks[name])
        for name, path in truths.items()
    ]


def _by_name(what: str, folder: str) -> dict[str, str]:
    """Name -> path of each picture in a folder and below."""
    folder = folder.rstrip("/") or "/"
    paths = list_images(what, folder)
    if paths == [folder]:
        raise UserError(f"{what}: {folder} is a file; give the folder that it is in")
    by_name: dict[str, str] = {}
    for path in paths:
        name = path[len(folder.rstrip("/")) + 1 :]
        name = name[: -len(PurePath(name).suffix) or None]
        if name in by_name:
            raise UserError(f"{what}: {by_name[name]} and {path} have the same name; remove one")
        by_name[name] = path
    return by_name


def _split(pictures: dict[str, str], folder: str) -> dict[str, str]:
    """Name of a truth -> its mask in the same folder. Raises UserError."""
    names = list(pictures)
    split = split_names([_name(name) for name in names])
    if split is None:
        raise UserError(
            f"masks: {folder} is the folder of the truth too, and no picture there is called after "
            "another, as x_mask.png after x.png; give the folder of the masks"
        )
    mask_of, _ = split
    _refuse(
        {*names} - {names[i] for pair in mask_of.items() for i in pair},
        "truth and masks",
        folder,
        "no partner in",
        folder,
    )
    return {names[truth]: pictures[names[mask]] for truth, mask in sorted(mask_of.items())}


def _partners(truths: dict[str, str], others: dict[str, str]) -> dict[str, str]:
    """The others under the names of their truths, if names tell; else as they are."""
    paths = list(others.values())
    match = match_names([_name(name) for name in truths], [_name(name) for name in others])
    return {t: paths[i] for t, i in zip(truths, match.order, strict=True)} if match else others


def _name(name: str) -> Name:
    folder, _, stem = name.rpartition("/")
    return folder, stem


def _grouped(
    results: Iterable[str], truths: Iterable[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Truth -> its results, and the results without one.

    `x_0` may be a sample of `x`, or the only result of a truth that is called `x_0` itself. All
    names of a folder are read in the same way: the way that finds a truth for more results.
    """
    of_one = _read_names(results, truths, lambda name: (name, 0))
    of_several = _read_names(results, truths, _split_sample)
    return min(of_one, of_several, key=lambda reading: len(reading[1]))


def _read_names(
    results: Iterable[str], truths: Iterable[str], split: Callable[[str], tuple[str, int]]
) -> tuple[dict[str, list[str]], list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(results, key=split):
        groups.setdefault(split(name)[0], []).append(name)
    strangers = [name for of_it in groups.keys() - truths for name in groups[of_it]]
    return groups, strangers


def _split_sample(name: str) -> tuple[str, int]:
    """`x_12` -> x, 12; a name without a number stands for no truth."""
    match = re.fullmatch(r"(.+)_([0-9]+)", name)
    return (match[1], int(match[2])) if match else ("", 0)


def _refuse(strangers: Iterable[str], what: str, folder: str, lack: str, other: str) -> None:
    names = sorted(strangers)
    if not names:
        return
    more = f" and {len(names) - 3} more" if names[3:] else ""
    have = "picture has" if len(names) == 1 else "pictures have"
    raise UserError(
        f"{what}: {len(names)} {have} {lack} {other}: {', '.join(names[:3])}{more} "
        f"(in {folder}); partners have the same name, or NAME_0, NAME_1, ... if they are samples"
    )


def _read(pair: Pair) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """Truth and results, uint8 (H, W, 3), and the hole, bool (H, W). Raises UserError."""
    truth = np.asarray(read_rgb(pair.truth))
    results = [np.asarray(read_rgb(path)) for path in pair.results]
    for path, result in zip(pair.results, results, strict=True):
        _check_size(path, result, pair.truth, truth)
    if pair.mask is None:
        return truth, results, None
    hole = np.asarray(read_rgb(pair.mask).convert("L")) < 128
    _check_size(pair.mask, hole, pair.truth, truth)
    if not hole.any():
        raise UserError(
            f"{pair.mask} hides nothing, so there is no hole to measure (black = hole); remove the "
            "image, or leave out --masks"
        )
    return truth, results, hole


def _check_size(path: str, picture: np.ndarray, truth_path: str, truth: np.ndarray) -> None:
    sizes = [f"{shape[1]}x{shape[0]}" for shape in (picture.shape, truth.shape)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path} is {sizes[0]}, but the truth {truth_path} is {sizes[1]}; compare with the "
            "prepared truth, which test.py writes beside the results (log/NAME/gt)"
        )


# ---- Figures ---------------------------------------------------------------------------------


def load_networks() -> list[Lpips]:
    """LPIPS with the networks whose weights are there; a line on stderr names the others.

    Raises UserError if weights are damaged.
    """
    missing = lpips_files.missing()
    if missing:
        left_out = " and ".join(lpips_files.TITLES[name] for name in missing)
        how = lpips_files.how_to_get(next(iter(missing.values())))
        print(f"LPIPS ({left_out}) is left out: {how}", file=sys.stderr)
    there = [name for name in lpips_files.FILES if name not in missing]
    if not there:
        return []
    from guided_diffusion.evaluation import lpips  # with torch, which takes seconds

    return [lpips.load(name) for name in there]


def measure(
    results_dir: str, gt_dir: str, masks_dir: str | None = None, networks: Sequence[Lpips] = ()
) -> Scores:
    """Measure every result in a folder.

    masks_dir: 255 = known; where it is less than 128 is the hole. None: the whole image only.
    networks: for LPIPS and diversity. Raises UserError for whatever cannot be paired or measured.
    """
    pairs = find_pairs(results_dir, gt_dir, masks_dir)
    rows = [Row(pair.name, len(pair.results), _distortion(pair)) for pair in pairs]
    if masks_dir and not any(f"{HOLE}ssim" in row.figures for row in rows):
        raise UserError(
            f"SSIM has no value for the hole of {pairs[0].mask}, which lies within 5 pixels of the "
            "edge, nor for any other; leave out --masks"
        )
    if networks:  # last, since it takes the time
        for pair, row in zip(with_progress(pairs), rows, strict=True):
            row.figures.update(perceptual(pair, networks))
    return Scores(rows)


def with_progress(pairs: list[Pair]) -> Iterable[Pair]:
    """The same pairs, with a bar on a terminal while they are gone through."""
    return tqdm(pairs, "LPIPS", leave=False, disable=None)


def _distortion(pair: Pair) -> Figures:
    """L1, PSNR and SSIM."""
    truth, results, hole = _read(pair)
    if min(truth.shape[:2]) < distortion.SIDE:
        raise UserError(f"{pair.truth} is too small: SSIM needs 11 or more pixels on each side")
    return _mean([_distortion_of(result, truth, hole) for result in results])


def _distortion_of(result: np.ndarray, truth: np.ndarray, hole: np.ndarray | None) -> Figures:
    similarity = distortion.ssim_map(result, truth)
    figures = {
        "l1": distortion.l1(result, truth),
        "psnr": distortion.psnr(result, truth),
        "ssim": float(similarity.mean()),
    }
    if hole is not None:
        figures[f"{HOLE}l1"] = distortion.l1(result, truth, hole)
        figures[f"{HOLE}psnr"] = distortion.psnr(result, truth, hole)
        if distortion.inside(hole).any():
            figures[f"{HOLE}ssim"] = float(similarity[distortion.inside(hole)].mean())
    return figures


def perceptual(pair: Pair, networks: Sequence[Lpips]) -> Figures:
    """LPIPS to the truth and, of several samples, between them. Raises UserError."""
    figures: Figures = {}
    truth, results, hole = _read(pair)
    for network in networks:
        true = network.features(truth)
        samples = [network.features(result) for result in results]
        kinds = {"lpips": [(true, sample) for sample in samples]}
        if len(samples) > 1:
            kinds["diversity"] = list(combinations(samples, 2))
        for kind, couples in kinds.items():
            distances = [_distance(network, a, b, hole) for a, b in couples]
            for area, value in _mean(distances).items():
                figures[f"{area}{kind}_{network.name}"] = value
    return figures


def _distance(network: Lpips, a: Features, b: Features, hole: np.ndarray | None) -> Figures:
    """Over the whole image, and over the hole."""
    distances = {"": network.distance(a, b)}
    if hole is not None:
        distances[HOLE] = float(network.distance_map(a, b, hole.shape)[hole].mean())
    return distances


def _mean(of_samples: Sequence[Figures]) -> Figures:
    return {key: sum(each[key] for each in of_samples) / len(of_samples) for key in of_samples[0]}


# ---- Tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The figures of an image."""

    name: str
    samples: int
    figures: Figures


@dataclass(frozen=True)
class Scores:
    """The figures of all images."""

    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Those that at least one image has: over the whole image, then over the hole."""
        present = {column for row in self.rows for column in row.figures}
        return [area + key for area in ("", HOLE) for key in METRICS if area + key in present]

    def summary(self) -> dict[str, Estimate]:
        """Column -> mean over the images that have a finite value there, with an interval."""
        return {
            column: estimate([row.figures[column] for row in self.rows if column in row.figures])
            for column in self.columns
        }

    def to_csv(self) -> str:
        """One line an image, and nothing else below the header."""
        head = ("image", "samples", *self.columns)
        return csv_text([head, *map(self._cells, self.rows)])

    def _cells(self, row: Row) -> tuple[object, ...]:
        figures = (row.figures.get(column) for column in self.columns)
        return row.name, row.samples, *("" if x is None else f"{x:.6g}" for x in figures)

    def to_markdown(self) -> str:
        """The means, with their intervals, for people."""
        summary = self.summary()
        areas = ["", *[HOLE] * any(column.startswith(HOLE) for column in summary)]
        head = ("", "better", *("hole" if area else "whole image" for area in areas))
        rows = [
            (title, better, *(summary[area + key].describe(places) for area in areas))
            for key, (title, better, places) in METRICS.items()
            if key in summary
        ]
        return "\n".join([markdown_table([head, *rows]), "", *self._notes(summary)])

    def _notes(self, summary: dict[str, Estimate]) -> list[str]:
        samples = sorted({row.samples for row in self.rows})
        each = f", {' or '.join(map(str, samples))} samples of each" if samples != [1] else ""
        interval = " [95 % bootstrap interval over images]" if self.rows[1:] else ""
        notes = [f"{len(self.rows)} image{'s' * bool(self.rows[1:])}{each}: mean{interval}."]
        ssim = f"{HOLE}ssim"
        lacking = [row.name for row in self.rows if ssim not in row.figures]
        if ssim in summary and lacking:
            notes.append(
                f"SSIM over the hole leaves out {len(lacking)}, first {lacking[0]}: there the hole "
                "lies within 5 pixels of the edge."
            )
        for area, where in (("", "the whole image"), (HOLE, "the hole")):
            psnr = summary.get(f"{area}psnr")
            if psnr and psnr.number < len(self.rows):
                notes.append(
                    f"{len(self.rows) - psnr.number} equal to the truth over {where}: its PSNR is "
                    "infinite, and left out of the mean."
                )
        return notes


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up as plain text too; the first row is the head."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as a spreadsheet reads them."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def check_out(path: str) -> None:
    """Raises UserError if a CSV file cannot be written there."""
    with storage.writing(path, key="--out"):
        if storage.is_dir(path):
            raise UserError(f"--out: {path} is a folder; give a file, such as {path}/metrics.csv")
        if not path.lower().endswith(".csv"):
            raise UserError(f"--out: {path}; accepted: a CSV file, such as metrics.csv")
        storage.check_writable(os.path.dirname(path) or ".")


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all. Raises UserError."""
    with storage.writing(path, key="--out"):
        storage.write_atomically(path, text.encode("utf-8", "surrogateescape"))
