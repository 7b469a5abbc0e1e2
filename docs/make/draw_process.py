"""Draw the pictures of the process in docs/report.md, from the demo's.

    python test.py --conf_path confs/demo.yml --set log_every=20 --overwrite
    python docs/make/draw_process.py

The strip shows eight moments, from left to right: above what the network expects the result to be,
below the noisy picture. The animation is the demo's own.
"""

import shutil
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROCESS, PICTURES = ROOT / "log/demo/process", ROOT / "data/pictures"
NAME = "7_keep_the_centre"
MOMENTS, SIDE, GAP = 8, 128, 4
# Noise that is smoothed would only make the file larger.
ROWS = {"x0": Image.Resampling.BICUBIC, "xt": Image.Resampling.NEAREST}


def main() -> None:
    cell = SIDE + GAP
    strip = Image.new("RGB", (cell * MOMENTS - GAP, cell * len(ROWS) - GAP), "white")
    for row, (kind, resampling) in enumerate(ROWS.items()):
        paths = sorted((PROCESS / NAME).glob(f"*_{kind}.png"))
        for column in range(MOMENTS):
            with Image.open(paths[(column + 1) * len(paths) // MOMENTS - 1]) as picture:
                strip.paste(picture.resize((SIDE, SIDE), resampling), (column * cell, row * cell))
    strip.quantize(256).save(PICTURES / "process.png")
    shutil.copyfile(PROCESS / f"{NAME}.webp", PICTURES / "process.webp")


if __name__ == "__main__":
    main()
