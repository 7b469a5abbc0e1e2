"""Random squares of photos as training images: photos are decoded once, crops cost little."""

import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from guided_diffusion.config import TrainingParams, UserError
from guided_diffusion.images.files import read_rgb
from guided_diffusion.training.data import TrainingImages

LANCZOS_REACH = 3  # pixels of the result, to each side


@dataclass(frozen=True)
class Crop:
    """A square of a photo, in whole pixels."""

    photo: int
    top: int
    left: int
    side: int


class RandomCrops(TrainingImages):
    """Squares of a folder's photos, reduced to the network's size.

    A crop takes a photo in proportion to its area, so that many small photos do not count for
    more than a few large ones. Its reduction is log-uniform within `scales`, as far as the photo is
    large enough, and its place is uniform. Photos too small for the least reduction are left out,
    and a warning counts them.

    The pixels of all photos lie in one temporary file without a name, mapped into memory: the
    system keeps as much of it there as it likes. Each process has a file of its own.
    """

    def __init__(
        self, folder: str, image_size: int, scales: tuple[float, float], channels: int = 3
    ):
        """Decodes all photos. Raises UserError if one is bad, or none is large enough."""
        super().__init__(folder, image_size, channels)
        self.scales = scales
        self.photos: list[np.ndarray] = []  # uint8 (H, W, 3)
        self.photo_classes: list[int] = []
        least = round(image_size * scales[0])
        used = self._decode(least)
        if not used:
            raise UserError(
                f"data_dir: no image in {folder} has sides of {least} pixels or more, which a crop "
                "takes: use larger images, or a smaller image_size or least of scales"
            )
        if left_out := [path for path in self.paths if path not in used]:
            warnings.warn(
                f"data_dir: {len(left_out)} of {len(self.paths)} image(s) left out, whose shorter "
                f"sides are below the {least} pixels that a crop takes; the first is {left_out[0]}",
                UserWarning,
                stacklevel=2,
            )
        self.area_ends = np.cumsum([photo[..., 0].size for photo in self.photos])

    def _decode(self, least: int) -> set[str]:
        """Fill `photos` with those whose sides are `least` or more; returns their paths."""
        shapes: dict[str, tuple[int, ...]] = {}
        with tempfile.TemporaryFile() as file:
            for path, class_ in zip(self.paths, self.classes, strict=True):
                pixels = np.asarray(read_rgb(path))
                if min(pixels.shape[:2]) >= least:
                    _append(file, pixels)
                    shapes[path] = pixels.shape
                    self.photo_classes.append(class_)
            if shapes:
                file.flush()
                everything = np.memmap(file, np.uint8, mode="r")  # outlives the file
                ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
                parts = np.split(everything, ends[:-1])
                self.photos = [p.reshape(s) for p, s in zip(parts, shapes.values(), strict=True)]
        return set(shapes)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, crop: Crop) -> tuple[torch.Tensor, int]:
        """(C, S, S) in [-1, 1], and the class."""
        pixels = reduced(self.photos[crop.photo], crop, self.image_size)
        return self.to_tensor(pixels), self.photo_classes[crop.photo]

    def batches(self, batch_size: int, seed: int, first_step: int) -> Iterator[list[Crop]]:
        """The crops of each training step from `first_step` on, a function of (seed, step)."""
        for step in count(first_step):
            numbers = range(step * batch_size, (step + 1) * batch_size)
            yield [self.draw(seed, number) for number in numbers]

    def draw(self, seed: int, number: int) -> Crop:
        """A crop of the endless sequence that belongs to a seed."""
        random = np.random.default_rng([seed, number])
        pixel = random.integers(self.area_ends[-1])
        photo = int(np.searchsorted(self.area_ends, pixel, side="right"))
        height, width, _ = self.photos[photo].shape
        low, high = self.scales
        high = max(low, min(high, min(height, width) / self.image_size))
        scale = low * (high / low) ** random.random()
        side = min(round(self.image_size * scale), height, width)
        top, left = random.integers([height - side + 1, width - side + 1]).tolist()
        return Crop(photo, top, left, side)


def reduced(photo: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """A crop of a photo as uint8 (size, size, 3), the same as from the whole photo reduced.

    Near its edges the filter takes the photo's pixels around the crop. Without a reduction, the
    photo's own pixels come out.
    """
    top, left, side = crop.top, crop.left, crop.side
    if side == size:
        return photo[top : top + side, left : left + side]
    margin = math.ceil(LANCZOS_REACH * side / size) + 1
    first_row, first_column = max(0, top - margin), max(0, left - margin)
    part = photo[first_row : top + side + margin, first_column : left + side + margin]
    x, y = left - first_column, top - first_row
    image = Image.fromarray(np.ascontiguousarray(part))
    box = (x, y, x + side, y + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _append(file: BinaryIO, pixels: np.ndarray) -> None:
    try:
        file.write(pixels.tobytes())
    except OSError as error:
        raise UserError(
            f"data_dir: cannot keep the decoded images in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; set the environment variable TMPDIR to a folder with room "
            "for them"
        ) from error


def training_images(params: TrainingParams, image_size: int, channels: int = 3) -> TrainingImages:
    """What a network learns from. Raises UserError."""
    if params.crop == "random":
        return RandomCrops(params.data_dir, image_size, params.scales or (1.0, 1.0), channels)
    return TrainingImages(params.data_dir, image_size, channels)
