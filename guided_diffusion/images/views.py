"""A pair as the sampler takes it, and the picture that its results become.

With `fit: crop`, the network sees the centre square, as in the original, or, without an image_size,
the picture as it is; with `fit: region`, a square around each hole of a photo, see `regions`; with
`fit: tile`, many windows over the holes of a photo at its own resolution, see `tiles`.

Networks of pixels take masks as they are, but for a white that is only nearly white. Latent
diffusion knows only black and white: it fills in what is darker than CUT, and all else comes out as
the image's own bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from guided_diffusion.config import CUT, DatasetConfig
from guided_diffusion.images.files import encode_png, resize_and_crop
from guided_diffusion.images.metadata import NOTHING, Kept
from guided_diffusion.images.pairs import PairFiles
from guided_diffusion.images.regions import (
    Region,
    cut_image,
    cut_keep,
    cut_start,
    find_regions,
    keep_of,
    paste,
)
from guided_diffusion.images.tensors import (
    decode_mask,
    image_to_tensor,
    mask_to_tensor,
    stretch_mask,
    to_bytes,
)
from guided_diffusion.images.tiles import Tiles, find_tiles, padded


@dataclass(frozen=True, eq=False)
class View:
    """What the network sees of a pair at a time.

    That is a square, or, without an image_size, all of the picture, or a row of pixels in windows.
    """

    image: torch.Tensor  # (3, H, W) float32 in [-1, 1]; H = W = S if there is an image_size S
    keep_mask: torch.Tensor  # (3, H, W) float32 in [0, 1]; 1 = keep, 0 = fill in
    start: torch.Tensor | None = None  # like the image: what to start from; None: pure noise
    windows: torch.Tensor | None = None  # (K, S, S), `Tiles.places`; H is 1 then

    @property
    def square(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and keep mask as the network gets them: (3, H, W) each, of the first window."""
        if self.windows is None:
            return self.image, self.keep_mask
        first = self.windows[0]
        return self.image[:, 0, first], self.keep_mask[:, 0, first]

    def as_picture(self, x: torch.Tensor) -> torch.Tensor:
        """What the network makes of the image, (3, H, W), as it is shown to people."""
        return x


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledView(View):
    """The pixels of a photo that lie in some window, as a row."""

    photo: np.ndarray  # uint8 (H, W, 3)
    covered: np.ndarray  # bool (H, W)

    def as_picture(self, x: torch.Tensor) -> torch.Tensor:
        """The photo with these pixels, (3, H, W); x: (3, 1, N)."""
        picture = image_to_tensor(self.photo)
        picture[:, torch.from_numpy(self.covered)] = x[:, 0].float().cpu()
        return picture


@dataclass(frozen=True, eq=False)
class Companions:
    """Pictures that are written beside a result, uint8 (H, W, 3)."""

    gt: np.ndarray
    gt_masked: np.ndarray
    keep_mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Crop:
    """The centre square of a pair, or the pair as it is."""

    image: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray  # uint8 (H, W, 3), white = keep; black and white alone if known_from is CUT
    known_from: int | None = None  # level of the mask from which the image's own bytes come out
    start: np.ndarray | None = None  # uint8 (H, W, 3)
    kept: Kept = NOTHING  # of a whole photo, besides pixels
    views = 1

    def view(self, number: int = 0) -> View:
        """The picture itself, the only one."""
        start = None if self.start is None else image_to_tensor(self.start)
        return View(image_to_tensor(self.image), mask_to_tensor(self.mask), start)

    def finish(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """The picture to write. results: of each view, uint8 (H, W, 3)."""
        (result,) = results
        if self.known_from is None:
            return result
        return np.where(self.mask >= self.known_from, self.image, result)

    def encode(self, finished: np.ndarray) -> bytes:
        """A PNG of the finished picture, with what it keeps of its photo; holes are opaque."""
        return encode_png(finished, self.kept, hole=self.mask.min(axis=2) < CUT)

    def companions(self) -> Companions:
        """The picture, masked and mask: what the network sees, or bytes that results keep."""
        if self.known_from == CUT:
            return Companions(self.image, self.image * (self.mask >= CUT), self.mask)
        gt, m = image_to_tensor(self.image), mask_to_tensor(self.mask)
        return Companions(*to_bytes(torch.stack([gt, gt * m - (1 - m), 2 * m - 1])))


@dataclass(frozen=True, eq=False)
class Photo:
    """A whole photo, of which the network sees the surroundings of its holes."""

    image: np.ndarray  # uint8 (H, W, 3)
    keep: np.ndarray  # bool (H, W)
    image_size: int
    start: np.ndarray | None = None  # uint8 (H, W, 3)
    kept: Kept = NOTHING  # besides pixels

    @cached_property
    def regions(self) -> list[Region]:
        """Squares that cover all holes."""
        return find_regions(self.keep, self.image_size)

    @property
    def squares(self) -> list[tuple[int, int, int]]:
        """Left, top and side of each region."""
        return [(each.left, each.top, each.side) for each in self.regions]

    @property
    def views(self) -> int:
        """How many there are: one a region, none if nothing is to be filled in."""
        return len(self.regions)

    def view(self, number: int) -> View:
        """A region, scaled to the network's size."""
        region = self.regions[number]
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

    def encode(self, finished: np.ndarray) -> bytes:
        """A PNG of the finished photo, with what it keeps of the input; holes are opaque."""
        return encode_png(finished, self.kept, hole=~self.keep)

    def companions(self) -> Companions:
        """The photo, its bytes as they are, masked, and its mask."""
        keep = np.repeat(self.keep[..., None], 3, axis=2)
        return Companions(self.image, self.image * keep, keep * np.uint8(255))


@dataclass(frozen=True, eq=False)
class TiledPhoto(Photo):
    """A whole photo, of which the network sees windows over its holes."""

    squares = ()

    @cached_property
    def tiles(self) -> list[Tiles]:
        """Windows that cover all holes."""
        return find_tiles(padded(~self.keep, self.image_size), self.image_size)

    @property
    def views(self) -> int:
        """How many there are: one, none if nothing is to be filled in, more of a huge photo."""
        return len(self.tiles)

    @property
    def whole(self) -> View:
        """The photo as it is."""
        keep_mask = torch.from_numpy(self.keep).float().expand(3, -1, -1)
        start = None if self.start is None else image_to_tensor(self.start)
        return View(image_to_tensor(self.image), keep_mask, start)

    def view(self, number: int) -> TiledView:
        """The pixels of a part's windows."""
        tiles = self.tiles[number]
        photo, keep = (padded(each, self.image_size) for each in (self.image, self.keep))
        start = None if self.start is None else padded(self.start, self.image_size)
        return TiledView(
            image_to_tensor(photo[tiles.covered][None]),
            torch.from_numpy(keep[tiles.covered][None]).float().expand(3, -1, -1),
            None if start is None else image_to_tensor(start[tiles.covered][None]),
            torch.from_numpy(tiles.places),
            photo=photo,
            covered=tiles.covered,
        )

    def finish(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """The photo with its holes filled in. results: of each view, uint8 (1, N, 3)."""
        filled = padded(self.image, self.image_size).copy()
        for tiles, result in zip(self.tiles, results, strict=True):
            filled[tiles.hole] = result[0, tiles.hole[tiles.covered]]
        height, width = self.keep.shape
        return filled[:height, :width]


Picture = Crop | Photo


def decode_pair(
    files: PairFiles,
    dataset: DatasetConfig,
    image_size: int | None,
    *,
    flip: bool = False,
    known_from: int | None = None,
    grey: bool = False,
) -> Picture:
    """A pair of its files. Raises UserError that names a bad one.

    The picture to start from is prepared as the image is. image_size: None: pictures are left as
    they are, and the mask must be as large as the image. flip: a crop is mirrored left to right.
    known_from: of a crop, the level of the prepared mask from which pixels come out as they are;
    CUT: the mask is cut there. A photo's mask is always cut, and its known pixels never change.
    grey: images lose their colours.
    """
    photo, mask = files.image.decoded(), decode_mask(files.mask, dataset.mask_convention)
    image, start, kept = photo.rgb, files.start and files.start.rgb(), photo.kept
    if grey:
        image, start = (each and each.convert("L").convert("RGB") for each in (image, start))
    if dataset.fit != "crop":
        kind = {"region": Photo, "tile": TiledPhoto}[dataset.fit]
        start = start and np.asarray(start)
        return kind(np.asarray(image), keep_of(mask), image_size, start, kept)
    if known_from != CUT:
        mask = stretch_mask(mask, dataset.mask_convention)
    pictures = [image, mask, *([start] if start else [])]
    prepared = [resize_and_crop(picture, image_size) for picture in pictures]
    image, mask, *starts = map(np.fliplr, prepared) if flip else prepared
    if known_from == CUT:
        mask = black_and_white(mask)
    kept = kept if image_size is None and not flip else NOTHING
    return Crop(image, mask, known_from, *(starts or [None]), kept)


def black_and_white(mask: Image.Image | np.ndarray) -> np.ndarray:
    """A mask, a picture or uint8 (H, W, 3), cut at CUT: uint8 (H, W, 3) of 0 and 255."""
    return np.repeat(keep_of(mask)[..., None] * np.uint8(255), 3, axis=2)
