"""Draw data/pictures/masks.png: one mask of each kind, with its name.

python docs/make/draw_masks.py
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion.masks.kinds import KINDS, draw_mask, mask_rng  # noqa: E402

SIDE = 128  # of each mask, in pixels
COLUMNS, GAP, NAME_HEIGHT = 5, 12, 22
SEED = 4  # whose masks show well what their kinds are
GREY, INK = 140, 40
FINE = ("ev2li", "nn2")  # drawn in half the size and enlarged: single pixels are hard to see
OPTIONS = {"half": {"side": "top"}, "expand": {"keep": 0.5}}


def main() -> None:
    width, height = SIDE + 2 + GAP, SIDE + 2 + NAME_HEIGHT
    rows = -(-len(KINDS) // COLUMNS)
    strip = Image.new("L", (width * COLUMNS + GAP, height * rows + GAP), 255)
    for place, kind in enumerate(KINDS):
        row, column = divmod(place, COLUMNS)
        draw_cell(strip, GAP + column * width, GAP + row * height, kind)
    strip.save(ROOT / "data/pictures/masks.png", optimize=True)


def draw_cell(strip: Image.Image, x: int, y: int, kind: str) -> None:
    options = OPTIONS.get(kind, {})
    size = SIDE // 2 if kind in FINE else SIDE
    mask = Image.fromarray(draw_mask(kind, (size, size), mask_rng(SEED, 0), **options))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=14)
    draw.rectangle((x, y, x + SIDE + 1, y + SIDE + 1), outline=GREY)
    strip.paste(mask.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x + 1, y + 1))
    name = " ".join([kind, *(f"--{option} {value}" for option, value in options.items())])
    draw.text((x + SIDE // 2, y + SIDE + 4), name, INK, font, anchor="ma")


if __name__ == "__main__":
    main()
