"""Draw the strip at the top of the README from the demo's results.

    python test.py --conf_path confs/demo.yml
    python docs/make/draw_strip.py

Rows: what the model saw, what it made of it, the truth.
"""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("gt_masked", "inpainted", "gt")
SCALE, GAP = 2, 4


def main() -> None:
    results = ROOT / "log/demo"
    names = sorted(path.name for path in (results / "inpainted").glob("*.png"))
    cell = 64 * SCALE + GAP
    strip = Image.new("RGB", (cell * len(names) - GAP, cell * len(ROWS) - GAP), "white")
    for row, kind in enumerate(ROWS):
        for column, name in enumerate(names):
            with Image.open(results / kind / name) as picture:
                large = picture.resize((64 * SCALE, 64 * SCALE), Image.Resampling.BICUBIC)
            strip.paste(large, (column * cell, row * cell))
    strip.save(ROOT / "data/pictures/demo.png")


if __name__ == "__main__":
    main()
