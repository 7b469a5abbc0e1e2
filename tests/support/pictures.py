"""Pictures on disk, and errors about them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.config import UserError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_images(folder: Path, *names: str, size: tuple[int, int] = (8, 8)) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size).save(path)
    return str(folder)


def user_error(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)
