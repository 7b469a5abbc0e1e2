"""Draw data/pictures/masks_right_wrong.png: one right mask, four wrong ones, and what they give.

    python docs/make/draw_right_and_wrong_masks.py

The model of the demo fills in all five, with the demo's settings. Rows: the mask, the mask over the
photo (red is filled in), the result.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from guided_diffusion import load_inpainter  # noqa: E402  (after the path is set)

NAME = "3_glasses.png"
SIDE, GAP, HEAD, LABELS = 128, 12, 44, 92  # pixels
RED, GREEN, INK, GREY = (200, 0, 60), (0, 120, 60), (40, 40, 40), (140, 140, 140)
ROWS = ("mask", "over the photo", "result")


def wrong_masks(right: Image.Image) -> dict[str, Image.Image]:
    """What is wrong -> the mask, from the right one (L, white = keep)."""
    small = right.filter(ImageFilter.MaxFilter(5))
    grey = right.point(lambda keep: 255 if keep else 160)
    moved = Image.new("L", right.size, 255)
    moved.paste(right, (8, 10))
    inverted = right.point(lambda keep: 255 - keep)
    return {"inverted": inverted, "too small": small, "grey": grey, "moved": moved}


def main() -> None:
    datasets = ROOT / "data/datasets"
    photo = Image.open(datasets / "gts/portraits" / NAME).convert("RGB")
    right = Image.open(datasets / "gt_keep_masks/portraits" / NAME).convert("L")
    masks = {"right": right} | wrong_masks(right)
    inpaint = load_inpainter(
        str(ROOT / "confs/demo.yml"),
        overrides=[f"model_path={ROOT}/data/pretrained/portraits64.pt"],
    )
    results = inpaint([photo] * len(masks), [*masks.values()], seed=0)
    columns = [
        (title, (mask, overlaid(photo, mask), result))
        for (title, mask), result in zip(masks.items(), results, strict=True)
    ]
    sheet(columns).quantize(256).save(ROOT / "data/pictures/masks_right_wrong.png", optimize=True)


def overlaid(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo, in red as far as it is filled in."""
    hole = 0.6 * (1 - np.asarray(mask, float)[..., None] / 255)
    return Image.fromarray(((1 - hole) * np.asarray(photo) + hole * (255, 0, 80)).astype(np.uint8))


def sheet(columns: list[tuple[str, tuple[Image.Image, ...]]]) -> Image.Image:
    step = SIDE + 2 + GAP
    size = (LABELS + step * len(columns), HEAD + step * len(ROWS))
    drawn = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=17)
    for row, label in enumerate(ROWS):
        text = label.replace(" the ", "\nthe ")
        place = LABELS - GAP, HEAD + row * step + SIDE // 2
        draw.text(place, text, INK, font, anchor="rm", align="right")
    for column, (title, pictures) in enumerate(columns):
        x = LABELS + column * step
        draw_title(draw, x + SIDE // 2, title, font)
        for row, picture in enumerate(pictures):
            y = HEAD + row * step
            draw.rectangle((x, y, x + SIDE + 1, y + SIDE + 1), outline=GREY)
            large = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            drawn.paste(large, (x + 1, y + 1))
    return drawn


def draw_title(draw: ImageDraw.ImageDraw, x: int, title: str, font: ImageFont.FreeTypeFont) -> None:
    if title == "right":
        draw.text((x, HEAD - 8), "RIGHT", GREEN, font, anchor="ms")
    else:
        draw.text((x, HEAD - 26), "WRONG", RED, font, anchor="ms")
        draw.text((x, HEAD - 8), title, RED, font, anchor="ms")


if __name__ == "__main__":
    main()
