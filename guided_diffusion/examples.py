"""A pair as the sampler takes it, and the picture that its results become.

With `fit: crop`, the network sees the centre square, as in the original; with `fit: region`, a
square around each hole of a photo, see `regions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from guided_diffusion.config import DatasetConfig
from guided_diffusion.image_datasets import (
    Pair,
    image_to_tensor,
    mask_to_tensor,
    paste_known,
    read_mask,
    to_bytes,
)
from guided_diffusion.pictures import read_rgb, resize_and_crop
from guided_diffusion.regions import (
    Region,
    cut_image,
    cut_keep,
    cut_start,
    find_regions,
    keep_of,
    paste,
)


@dataclass(frozen=True, eq=False)
class View:
    """What the network sees of a pair."""

    image: torch.Tensor  # (3, S, S) float32 in [-1, 1]
    keep_mask: torch.Tensor  # (3, S, S) float32 in [0, 1]; 1 = keep, 0 = fill in
    start: torch.Tensor | None = None  # like the image: what to start from; None: pure noise


@dataclass(frozen=True, eq=False)
class Companions:
    """Pictures that are written beside a result, uint8 (H, W, 3)."""

    gt: np.ndarray
    gt_masked: np.ndarray
    keep_mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Crop:
    """The centre square of a pair."""

    image: np.ndarray  # uint8 (S, S, 3)
    mask: np.ndarray  # uint8 (S, S, 3), white = keep
    paste_known: bool = False  # known pixels come out exactly
    start: np.ndarray | None = None  # uint8 (S, S, 3)
    views = 1

    def view(self, k: int = 0) -> View:
        """The square itself, the only one."""
        start = None if self.start is None else image_to_tensor(self.start)
        return View(image_to_tensor(self.image), mask_to_tensor(self.mask), start)

    def finish(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """The picture to write. results: of each view, uint8 (S, S, 3)."""
        (result,) = results
        if not self.paste_known:
            return result
        keep_mask = mask_to_tensor(self.mask)
        return paste_known(result[None], self.image[None], keep_mask[None])[0]

    def companions(self) -> Companions:
        """The square, masked and mask, of the tensors that the network sees."""
        gt, m = image_to_tensor(self.image), mask_to_tensor(self.mask)
        return Companions(*to_bytes(torch.stack([gt, gt * m - (1 - m), 2 * m - 1])))


@dataclass(frozen=True, eq=False)
class Photo:
    """A whole photo, of which the network sees the surroundings of its holes."""

    image: np.ndarray  # uint8 (H, W, 3)
    keep: np.ndarray  # bool (H, W)
    image_size: int
    start: np.ndarray | None = None  # uint8 (H, W, 3)

    @cached_property
    def regions(self) -> list[Region]:
        """Squares that cover all holes."""
        return find_regions(self.keep, self.image_size)

    @property
    def views(self) -> int:
        """How many there are: one a region, none if nothing is to be filled in."""
        return len(self.regions)

    def view(self, k: int) -> View:
        """The k-th region, scaled to the network's size."""
        region = self.regions[k]
        image = cut_image(self.image, self.keep, region, self.image_size)
        keep = cut_keep(self.keep, region, self.image_size)
        keep_mask = torch.from_numpy(keep).float().expand(3, -1, -1)  # (3, S, S)
        if self.start is None:
            return View(image_to_tensor(image), keep_mask)
        start = cut_start(self.start, region, self.image_size)
        return View(image_to_tensor(image), keep_mask, image_to_tensor(start))

    def finish(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """The photo with its holes filled in. results: of each view, uint8 (S, S, 3)."""
        return paste(self.image, self.keep, self.regions, results, self.image_size)

    def companions(self) -> Companions:
        """The photo, its bytes as they are, masked, and its mask."""
        keep = np.repeat(self.keep[..., None], 3, axis=2)
        return Companions(self.image, self.image * keep, keep * np.uint8(255))


def load_example(
    pair: Pair,
    dataset: DatasetConfig,
    image_size: int,
    *,
    flip: bool = False,
    paste_known: bool = False,
) -> Crop | Photo:
    """Read a pair. Raises UserError that names a bad file.

    The picture to start from is prepared as the image is. flip: a crop is mirrored left to right.
    paste_known: of a crop; a photo's known pixels always come out as they are.
    """
    image = read_rgb(pair.image_path)
    mask = read_mask(pair.mask_path, dataset.mask_convention)
    starts = [read_rgb(pair.start_path)] if pair.start_path else []
    if dataset.fit == "region":
        return Photo(np.asarray(image), keep_of(mask), image_size, *map(np.asarray, starts))
    squares = [resize_and_crop(picture, image_size) for picture in (image, mask, *starts)]
    image, mask, *starts = map(np.fliplr, squares) if flip else squares
    return Crop(image, mask, paste_known, *starts)
