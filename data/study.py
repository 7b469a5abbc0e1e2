"""A study of the embedded model: six masks, resampling, and how far to jump (RePaint, section 5).

64 portraits that the model never saw are inpainted under each kind of mask with r = 1, 5 and 10
(`jump_n_sample`), and under wide masks with several jump lengths j (`jump_length`), as in the
paper's Table 3. The model takes 25 steps instead of the paper's 250, and so the jumps are a tenth
as long or longer. What was made before is not made again. It takes up to an hour on two cores:

    python data/study.py --out docs/study.md
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.config import UserError, load_config
from guided_diffusion.config.errors import exit_status
from guided_diffusion.evaluation.bootstrap import Estimate
from guided_diffusion.evaluation.paper import KINDS
from guided_diffusion.evaluation.table import load_networks, markdown_table, measure
from guided_diffusion.images.files import encode_png
from guided_diffusion.machine import storage
from guided_diffusion.masks.kinds import draw_mask, mask_rng

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from guided_diffusion.evaluation.lpips import Lpips

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "log/study"
CONFIG = "confs/demo.yml"
NUMBER, SIZE = 64, 64  # portraits, and their side
SEED, FIRST = 1, 1000  # of data/make_portraits.py: the training portraits have seed 0
BATCH = 16
FIGURES = {  # column of the scores -> its head, decimal places
    "hole_l1": ("L1 (of 255)", 2),
    "hole_psnr": ("PSNR (dB)", 2),
    "hole_ssim": ("SSIM", 4),
    "lpips_alex": ("LPIPS (AlexNet), whole image", 4),
}


@dataclass(frozen=True)
class Cell:
    """One set of results."""

    kind: str  # of masks
    r: int  # jump_n_sample
    j: int = 5  # jump_length; 5 is the demo's

    @property
    def folder(self) -> str:
        """Where its results go."""
        return f"{FOLDER}/{self.kind}_r{self.r}_j{self.j}"


RESAMPLING = [Cell(kind, r) for kind in KINDS for r in (1, 5, 10)]
JUMPS = [Cell("thick", r, j) for j in (1, 2, 5) for r in (5, 10, 15)]
CELLS = list(dict.fromkeys(RESAMPLING + JUMPS))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", help=f"the page ({FOLDER}/study.md)")
    return exit_status(partial(run_portraits, parser.parse_args().out))


def run_portraits(out: str | None = None) -> None:
    """Inpaint, measure, and write a page with tables, and two plots beside it.

    out: the page, Markdown; None: log/study/study.md. Raises UserError.
    """
    out = out or f"{FOLDER}/study.md"
    _check_out(out)
    _import_figure()  # fails now or not at all
    load_config(CONFIG)  # likewise, outside the repository's folder
    networks = load_networks()
    _inpaint()
    study = Study({cell: _measure(cell, networks) for cell in CELLS})
    stem = out.removesuffix(".md")
    _write(f"{stem}_masks.png", study.plot_masks())
    _write(f"{stem}_jumps.png", study.plot_jumps())
    _write(out, study.page(out).encode())
    print(f"written: {out}, {stem}_masks.png and {stem}_jumps.png")


def _check_out(out: str) -> None:
    """Raises UserError for what is no page, or a page of somebody else's."""
    if not out.endswith(".md"):
        raise UserError(f"--out {out}: accepted for a study: a page in Markdown, such as study.md")
    try:
        storage.check_writable(os.path.dirname(out) or ".")
        there = Path(out).read_text(encoding="utf-8") if storage.exists(out) else _PAGE
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out}: cannot be written: {reason}") from error
    if there.partition("\n")[0] != _PAGE.partition("\n")[0]:
        raise UserError(f"--out {out}: this is another page; give another path")


# ---- Results ----------------------------------------------------------------------------------


def _inpaint() -> None:
    """Make the inputs and all results. Raises UserError."""
    number = ("--number", NUMBER, "--size", SIZE, "--seed", SEED, "--start", FIRST)
    _call("data/make_portraits.py", f"{FOLDER}/gts", *number)
    for kind in KINDS:
        for i in range(NUMBER):
            mask = draw_mask(kind, (SIZE, SIZE), mask_rng(SEED, i))
            _write(f"{FOLDER}/masks/{kind}/{FIRST + i:06}.png", encode_png(mask))
    for number, cell in enumerate(CELLS, start=1):
        print(f"\n[{number} of {len(CELLS)}] {KINDS[cell.kind]}, r = {cell.r}, j = {cell.j}")
        settings = [word for setting in _settings(cell) for word in ("--set", setting)]
        _call("test.py", "--conf_path", CONFIG, *settings)


def _settings(cell: Cell) -> Iterator[str]:
    yield f"name={Path(cell.folder).name}"
    yield f"schedule_jump_params.jump_n_sample={cell.r}"
    yield f"schedule_jump_params.jump_length={cell.j}"
    dataset = {
        "gt_path": f"{FOLDER}/gts",
        "mask_path": f"{FOLDER}/masks/{cell.kind}",
        "batch_size": BATCH,
        "paths.srs": f"{cell.folder}/inpainted",
        "paths.lrs": f"{cell.folder}/gt_masked",
        "paths.gts": f"{cell.folder}/gt",
        "paths.gt_keep_masks": f"{cell.folder}/gt_keep_mask",
    }
    yield from (f"data.eval.portraits.{key}={value}" for key, value in dataset.items())


def _call(script: str, *arguments: object) -> None:
    """Run a script of the repository, as a user does. Raises UserError; it has said why."""
    sys.stdout.flush()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)])
    while process.returncode is None:
        with suppress(KeyboardInterrupt):  # the script gets it too, and saves what it is at
            process.wait()
    if process.returncode:
        raise UserError(f"the study stopped, since {script} did, see above; to go on, run it again")


def _write(path: str, data: bytes) -> None:
    with storage.writing(path):
        storage.write_atomically(path, data)


@dataclass(frozen=True)
class Measured:
    """What came out for one cell."""

    evaluations: int  # of the network, an image
    figures: dict[str, Estimate]  # column -> mean and interval


def _measure(cell: Cell, networks: Sequence[Lpips]) -> Measured:
    record = json.loads(Path(f"{cell.folder}/run.json").read_text(encoding="utf-8"))
    scores = measure(
        f"{cell.folder}/inpainted", f"{FOLDER}/gts", f"{FOLDER}/masks/{cell.kind}", networks
    )
    return Measured(record["evaluations_per_image"], scores.summary())


# ---- The page ---------------------------------------------------------------------------------

_PAGE = """# Masks and resampling, on portraits

Made by `python data/study.py --out {out}`.

The model of the demo fills in {number} drawn portraits of {size}x{size} pixels that it never saw,
in 25 steps. r is `jump_n_sample`, j is `jump_length`; r = 1 does not resample. All figures are
means over the holes alone, with 95 % bootstrap intervals over the portraits.

## Six kinds of masks

{masks}

![Error against evaluations for six kinds of masks]({stem}_masks.png)

## How far to jump, and how often

Wide masks; the mean absolute error in the hole (L1, of 255), and below it the evaluations.

{jumps}

![Error against r for three jump lengths]({stem}_jumps.png)
"""


@dataclass(frozen=True)
class Study:
    """All that was measured."""

    cells: dict[Cell, Measured]

    @cached_property
    def columns(self) -> list[str]:
        """Of FIGURES, those that could be computed."""
        first = next(iter(self.cells.values()))
        return [column for column in FIGURES if column in first.figures]

    def page(self, out: str) -> str:
        """Markdown. out: where it goes; the plots lie beside it."""
        return _PAGE.format(
            out=out,
            stem=Path(out).stem,
            number=NUMBER,
            size=SIZE,
            masks=markdown_table(list(self._mask_rows())),
            jumps=markdown_table(list(self._jump_rows())),
        )

    def _mask_rows(self) -> Iterator[list[str]]:
        yield ["mask", "r", "evaluations", *(FIGURES[column][0] for column in self.columns)]
        for cell in RESAMPLING:
            measured = self.cells[cell]
            figures = [measured.figures[c].describe(FIGURES[c][1]) for c in self.columns]
            yield [KINDS[cell.kind], f"{cell.r}", f"{measured.evaluations:,}", *figures]

    def _jump_rows(self) -> Iterator[list[str]]:
        lengths = list(dict.fromkeys(cell.j for cell in JUMPS))
        yield ["r", *(f"j = {j}" for j in lengths)]
        for r in dict.fromkeys(cell.r for cell in JUMPS):
            row = [self.cells[Cell("thick", r, j)] for j in lengths]
            yield [f"{r}", *(measured.figures["hole_l1"].describe(2) for measured in row)]
            yield ["", *(f"{measured.evaluations:,}" for measured in row)]

    def plot_masks(self) -> bytes:
        """PNG: the error against the evaluations, a line a kind of mask."""
        lines = {
            title: [cell for cell in RESAMPLING if cell.kind == kind]
            for kind, title in KINDS.items()
        }
        return self._plot(lines, "evaluations an image", lambda cell: self.cells[cell].evaluations)

    def plot_jumps(self) -> bytes:
        """PNG: the error against r, a line a jump length."""
        lengths = dict.fromkeys(cell.j for cell in JUMPS)
        lines = {f"j = {j}": [cell for cell in JUMPS if cell.j == j] for j in lengths}
        return self._plot(lines, "r (jump_n_sample)", lambda cell: cell.r)

    def _plot(
        self, lines: dict[str, list[Cell]], xlabel: str, x_of: Callable[[Cell], int]
    ) -> bytes:
        figure = _import_figure()(figsize=(7, 4.5), layout="constrained")
        axes: Axes = figure.add_subplot()
        ticks = sorted({x_of(cell) for cells in lines.values() for cell in cells})
        gap = (ticks[-1] - ticks[0]) / 100  # else intervals would hide each other
        for number, (label, cells) in enumerate(lines.items()):
            errors = [self.cells[cell].figures["hole_l1"] for cell in cells]
            xs = [x_of(cell) + (number - (len(lines) - 1) / 2) * gap for cell in cells]
            reach = [[e.mean - e.low for e in errors], [e.high - e.mean for e in errors]]
            axes.errorbar(xs, [e.mean for e in errors], reach, label=label, marker="o")
        axes.set(xlabel=xlabel, ylabel="mean absolute error in the hole (of 255)", yscale="log")
        axes.set_xticks(ticks)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        return picture.getvalue()


def _import_figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the study needs: pip install -r requirements-eval.txt") from error
    return Figure


if __name__ == "__main__":
    sys.exit(main())
