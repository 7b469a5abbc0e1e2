"""Films of sampling, made of noise."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from guided_diffusion.output.film import (
    FilmLog,
)

# Three steps down, two up, three down: evaluations end at 1, 2, 3, 6, 7 and 8.
JUMP = [3, 2, 1, 0, 1, 2, 1, 0, -1]


LEVELS = ["noise 10 %", "noise 50 %", "noise 83 %", "noise 100 %"]


def log(folder: Path | str, every: int = 1) -> FilmLog:
    return FilmLog(str(folder), every, JUMP, LEVELS)


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as animation:
        return [np.asarray(f.convert("RGB"), int) for f in ImageSequence.Iterator(animation)]
