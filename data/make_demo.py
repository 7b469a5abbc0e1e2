"""Make the demo's inputs: eight portraits that the model never saw, and a mask for each.

    python data/make_demo.py

writes data/datasets/gts/portraits and data/datasets/gt_keep_masks/portraits (white = keep).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_portraits import draw_portrait
from PIL import Image, ImageDraw

SIZE = 64
HELD_OUT_SEED = 1  # the training portraits have seed 0
FOLDER = Path(__file__).parent / "datasets"


def right_half(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((32, 0, 63, 63), fill=0)


def surgical_mask(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(20, 35), (32, 32), (43, 35), (43, 45), (36, 53), (27, 53), (20, 45)], fill=0)


def glasses(draw: ImageDraw.ImageDraw) -> None:
    for left in (17, 33):
        draw.rounded_rectangle((left, 25, left + 13, 36), radius=4, fill=0)
    draw.rectangle((28, 28, 35, 32), fill=0)


def thick_strokes(draw: ImageDraw.ImageDraw) -> None:
    draw.line([(6, 10), (28, 22), (22, 44), (50, 60)], fill=0, width=9, joint="curve")
    draw.line([(60, 6), (42, 34)], fill=0, width=9)


def thin_strokes(draw: ImageDraw.ImageDraw) -> None:
    rng = np.random.default_rng(7)
    for _ in range(14):
        start = rng.uniform(4, 60, size=2)
        points = np.cumsum([start, *rng.normal(0, 13, size=(3, 2))], axis=0)
        draw.line([tuple(point) for point in points], fill=0, width=2)


def every_second_line(draw: ImageDraw.ImageDraw) -> None:
    for row in range(0, SIZE, 2):
        draw.line((0, row, SIZE, row), fill=0)


def keep_the_centre(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, 63, 63), fill=0)
    draw.rectangle((16, 16, 47, 47), fill=255)


def rectangle(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((30, 4, 55, 37), fill=0)


# What each mask hides -> the portrait that it hides it of.
DEMO: list[tuple[Callable[[ImageDraw.ImageDraw], None], int]] = [
    (right_half, 9),
    (surgical_mask, 1),
    (glasses, 35),
    (thick_strokes, 14),
    (thin_strokes, 19),
    (every_second_line, 5),
    (keep_the_centre, 21),
    (rectangle, 11),
]


def main() -> None:
    for number, (hide, portrait) in enumerate(DEMO, start=1):
        mask = Image.new("L", (SIZE, SIZE), 255)
        hide(ImageDraw.Draw(mask))
        save(draw_portrait(HELD_OUT_SEED, portrait, SIZE), "gts", number, hide.__name__)
        save(mask, "gt_keep_masks", number, hide.__name__)


def save(picture: Image.Image, kind: str, number: int, name: str) -> None:
    folder = FOLDER / kind / "portraits"
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{number}_{name}.png")


if __name__ == "__main__":
    main()
