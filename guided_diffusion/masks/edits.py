"""Masks from pictures that users have, and masks changed.

A mask is uint8 (H, W), 255 = keep, 0 = fill in; "hole" is what is not kept. Whatever would leave
no hole, or nothing but a hole, is an error: it is a mistake in the picture or in a number.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from guided_diffusion.config import UserError


def from_alpha(picture: Image.Image) -> np.ndarray:
    """Fill in what is transparent, if only a little; keep what is opaque.

    A soft eraser leaves pixels half transparent. They still show what is to go, so they go too.
    Raises UserError if the picture has no transparency, or is nowhere, or everywhere, opaque.
    """
    if not picture.has_transparency_data:
        raise UserError(
            "has no transparency (no alpha channel): erase what is to be filled in and save it as "
            "PNG, or paint over it and use from-colour"
        )
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    if alpha.min() == 255:
        raise UserError("is opaque everywhere, so that nothing would be filled in")
    if alpha.max() < 255:
        raise UserError("is nowhere fully opaque, so that nothing would be kept")
    return _mask(alpha == 255)


def from_colour(
    picture: Image.Image, colour: tuple[int, int, int], tolerance: int = 0
) -> np.ndarray:
    """Fill in what has a colour, in each of red, green and blue up to `tolerance` levels of 255.

    picture: RGB. Raises UserError if no pixel has it, or all have.
    """
    levels = np.asarray(picture).astype(np.int16)  # (H, W, 3)
    distance = abs(levels - np.array(colour, np.int16)).max(axis=2)
    painted = "#{:02x}{:02x}{:02x}".format(*colour)
    if distance.min() > tolerance:
        nearest = levels.reshape(-1, 3)[distance.argmin()]
        raise UserError(
            f"no pixel has the colour {painted}; the nearest is "
            f"#{nearest[0]:02x}{nearest[1]:02x}{nearest[2]:02x}: use that one, or "
            f"--tolerance {distance.min()}"
        )
    if distance.max() <= tolerance:
        raise UserError(f"all pixels have the colour {painted}, so that nothing would be kept")
    return _mask(distance > tolerance)


def read_mask(picture: Image.Image) -> np.ndarray:
    """The values of an RGB picture that is grey all over. Raises UserError if it is not."""
    levels = np.asarray(picture)
    if (levels != levels[..., :1]).any():
        raise UserError("is a picture in colour, not a mask; threshold makes it black and white")
    return levels[..., 0]


def threshold(picture: Image.Image, at: int = 128) -> np.ndarray:
    """Keep what is as bright as `at`, of 255, or brighter. Raises UserError if all is, or nothing.

    picture: RGB; a coloured one counts by its luminance.
    """
    levels = np.asarray(picture.convert("L"))
    if levels.max() < at:
        raise UserError(f"nothing is as bright as {at}: nothing would be kept; change --at")
    if levels.min() >= at:
        raise UserError(
            f"nothing is darker than {at}, so that nothing would be filled in; use --at"
        )
    return _mask(levels >= at)


def invert(mask: np.ndarray) -> np.ndarray:
    """Keep what was filled in, and fill in what was kept. Raises UserError if all was kept."""
    if mask.min() == 255:
        raise UserError("the mask keeps everything: nothing would be kept")
    return 255 - mask


def grow(mask: np.ndarray, by: int) -> np.ndarray:
    """Make the hole larger: fill in all that is at most `by` pixels from it, centre to centre.

    Raises UserError if the mask is not black and white, has no hole, or would be all hole.
    """
    hole = _hole(mask)
    _check_reach(mask, by)
    if not hole.any():
        raise UserError("has no hole (it is white all over), so that nothing can grow")
    grown = _spread(hole, by)
    if grown.all():
        raise UserError(f"grown by {by} pixels, the hole would cover the whole mask")
    return _mask(~grown)


def shrink(mask: np.ndarray, by: int) -> np.ndarray:
    """Make the hole smaller: keep all that is at most `by` pixels from what is kept.

    The edge of the picture is not an edge of the hole. Raises UserError if the mask is not black
    and white, is all hole, or if no hole would be left.
    """
    hole = _hole(mask)
    _check_reach(mask, by)
    if hole.all():
        raise UserError("keeps nothing (it is black all over), so that the hole has no edge")
    kept = _spread(~hole, by)
    if kept.all():
        raise UserError(f"shrunk by {by} pixels, no hole would be left")
    return _mask(kept)


def _hole(mask: np.ndarray) -> np.ndarray:
    if not np.isin(mask, (0, 255)).all():
        raise UserError("has grey values; make it black and white first, with threshold")
    return mask == 0


def _check_reach(mask: np.ndarray, by: int) -> None:
    height, width = mask.shape
    if by >= max(mask.shape):
        raise UserError(f"{by} pixels is beyond the mask, which is {width}x{height}")


def _spread(inside: np.ndarray, by: int) -> np.ndarray:
    """All pixels within a disc of radius `by` of one that is inside: bool (H, W).

    A row of the disc covers a stretch of pixels. The difference of two sums, each from the left
    edge on, tells whether any pixel of the stretch is inside.
    """
    height, width = inside.shape
    padded = np.pad(inside, ((by, by), (by + 1, by)))
    sums = np.cumsum(padded, axis=1, dtype=np.int32)  # (H + 2 by, W + 2 by + 1)
    spread = np.zeros_like(inside)
    for down in range(2 * by + 1):
        reach = math.isqrt(by**2 - (down - by) ** 2)
        rows = sums[down : down + height]
        first, last = by - reach, by + 1 + reach
        spread |= rows[:, last : last + width] > rows[:, first : first + width]
    return spread


def _mask(keep: np.ndarray) -> np.ndarray:
    return keep.astype(np.uint8) * 255
