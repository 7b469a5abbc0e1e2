"""A picture of what a run will get: each image, its mask over it, and what the network will see."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.config import CUT, Config, DatasetConfig, UserError
from guided_diffusion.images.checks import Found, PairChecks
from guided_diffusion.images.files import encode_png, picture_grid
from guided_diffusion.images.pairs import Pair, PairFiles, find_pairs, for_each_pair
from guided_diffusion.images.tensors import decode_mask, image_to_tensor, to_bytes
from guided_diffusion.images.views import Photo, TiledPhoto, View, black_and_white, decode_pair
from guided_diffusion.machine import storage

MOST = 100  # pairs in one picture
CELL, GAP, TEXT = 256, 8, 18  # pixels
FILL_IN = (255, 0, 80)  # laid over what will be filled in
SQUARES = 8  # pixels of the chequered pattern, for what the network does not see


def write_preview(config: Config, out: str) -> str:
    """Draw the pairs of a config's dataset into a PNG; a line about it. Raises UserError."""
    if not out.lower().endswith(".png"):
        raise UserError(f"--preview {out}: accepted: the path of a PNG, such as preview.png")
    d = config.dataset
    pairs = find_pairs(d.gt_path, d.mask_path, d.offset, d.max_len, config.start_path)
    _check_apart(out, pairs, d)
    checks = PairChecks(d, config.image_size, config.known_from)

    def look(pair: Pair, files: PairFiles) -> tuple[Found | UserError, Image.Image | None]:
        found = checks.inspect(files)
        drawable = isinstance(found, Found) and checks.fits(found) and pair.index < MOST
        return found, _draw_pair(pair.name, files, config) if drawable else None

    looked = for_each_pair(pairs, look)
    checks.report({pair: found for pair, (found, _) in looked.items()})
    sheet = _sheet([drawn for _, drawn in looked.values() if drawn])
    with storage.writing(out):
        storage.write_atomically(out, encode_png(np.asarray(sheet)))
    number = f"the first {MOST} of {len(pairs):,}" if pairs[MOST:] else f"{len(pairs)}"
    return f"written: {out} ({number}: image | mask over image | what the network will see)"


def _check_apart(out: str, pairs: Sequence[Pair], d: DatasetConfig) -> None:
    """Raises UserError where the preview would replace an input or a result."""
    target = os.path.realpath(out)
    inputs = {path for p in pairs for path in (p.image_path, p.mask_path, p.start_path) if path}
    if target in map(os.path.realpath, inputs):
        raise UserError(f"--preview {out}: this is one of the inputs; give another path")
    folders = filter(None, (d.inpainted_dir, d.gt_masked_dir, d.gt_dir, d.keep_mask_dir))
    for folder in map(os.path.realpath, folders):
        if os.path.commonpath([folder, target]) == folder:
            raise UserError(f"--preview {out}: results go to this folder; give another path")


def _draw_pair(name: str, files: PairFiles, config: Config) -> Image.Image:
    """Three pictures side by side, and the name below."""
    dataset, known_from = config.dataset, config.known_from
    picture = decode_pair(
        files, dataset, config.image_size, known_from=known_from, grey=config.grey
    )
    image, mask = files.image.rgb(), decode_mask(files.mask, dataset.mask_convention)
    if known_from == CUT:
        mask = Image.fromarray(black_and_white(mask))
    squares = []
    if isinstance(picture, Photo):
        squares = picture.squares
    elif image.size != mask.size:  # each is cropped on its own, and so they meet
        image, mask = Image.fromarray(picture.image), Image.fromarray(picture.mask)
    views = [picture.view(number) for number in range(picture.views)]
    if isinstance(picture, TiledPhoto):
        views = [picture.whole]
    seen = [_seen(view) for view in views] or [np.asarray(image)]
    cells = [image, _overlaid(image, mask, squares), Image.fromarray(_tiled(seen))]
    row = Image.new("RGB", (3 * CELL + 2 * GAP, CELL + TEXT), "white")
    for column, cell in enumerate(cells):
        cell = _fitted(cell)
        left = column * (CELL + GAP) + (CELL - cell.width) // 2
        row.paste(cell, (left, (CELL - cell.height) // 2))
    font = ImageFont.load_default(12)
    ImageDraw.Draw(row).text((0, CELL + 2), _printable(name), "black", font)
    return row


def _printable(name: str) -> str:
    """The end of a name, in letters that Pillow's own font has: those of English."""
    name = name if len(name) <= 100 else f"...{name[-97:]}"
    return unicodedata.normalize("NFKD", name).encode("ascii", "replace").decode()


def _overlaid(
    image: Image.Image, mask: Image.Image, squares: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """The image, in colour where it will be filled in; squares: (left, top, side) of regions."""
    width = image.width
    image, keep = _fitted(image), _fitted(mask).convert("L")
    scale = image.width / width
    colour = Image.blend(image, Image.new("RGB", image.size, FILL_IN), 0.6)
    overlaid = Image.composite(image, colour, keep)
    draw = ImageDraw.Draw(overlaid)
    for left, top, side in squares:
        starts = [max(0, round(scale * x)) for x in (left, top)]
        ends = [round(scale * (x + side)) - 1 for x in (left, top)]
        ends = [min(x, length - 1) for x, length in zip(ends, image.size, strict=True)]
        corners = (*starts, *ends)
        draw.rectangle(corners, outline="white", width=3)
        draw.rectangle(corners, outline="black", width=1)
    return overlaid


def _seen(view: View) -> np.ndarray:
    """A view, uint8 (H, W, 3); where the network is to fill in, its start picture, or chequered."""
    size = view.image.shape[1:]
    dark = (np.indices(size) // max(1, max(size) * SQUARES // CELL)).sum(0) % 2
    chequered = np.repeat((230 - 60 * dark).astype(np.uint8)[..., None], 3, axis=2)
    m, ground = view.keep_mask, image_to_tensor(chequered) if view.start is None else view.start
    return to_bytes((view.image * m + ground * (1 - m))[None])[0]


def _tiled(views: Sequence[np.ndarray]) -> np.ndarray:
    return views[0] if len(views) == 1 else picture_grid(np.stack(views))


def _fitted(image: Image.Image) -> Image.Image:
    """The picture within a cell, small ones as large as whole pixels allow."""
    if max(image.size) > CELL:
        fitted = image.copy()
        fitted.thumbnail((CELL, CELL))
        return fitted
    times = CELL // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _sheet(rows: Sequence[Image.Image]) -> Image.Image:
    """The pairs below each other, in as many columns as make it about square."""
    width, height = rows[0].width + 2 * GAP, rows[0].height + GAP
    columns = max(1, round(math.sqrt(len(rows) * height / width)))
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (columns * width, lines * height + GAP), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (i // lines * width + GAP, i % lines * height + GAP))
    return sheet
