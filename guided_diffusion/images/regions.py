"""Photos of any size: squares around the holes for the network, and their results back into them.

`find_regions` chooses the squares, `cut_image`, `cut_keep` and `cut_start` scale one to the
network's size S = image_size, and `paste` puts results back: pixels outside the holes stay as they
are.

A photo is uint8 (H, W, 3); keep is bool (H, W), False in the holes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from PIL import Image

from guided_diffusion.config import CUT
from guided_diffusion.images.files import resize_and_crop

CLOSE = 8  # holes that touch when they grow by S / CLOSE pixels can be one group
CONTEXT = 16  # a hole has at least S / CONTEXT pixels around it, where the photo has them
FEATHER = 16  # results are fitted to the photo over S / FEATHER of the network's pixels
NEARLY_ALL = 0.9  # of the photo's longer side

# Boxes are int (N, 4): top, left, bottom, right; bottom and right are not part of them.
_TOP, _LEFT, _BOTTOM, _RIGHT = range(4)


@dataclass(frozen=True)
class Region:
    """A square of a photo that goes through the network, and the holes that are filled from it.

    Where it reaches beyond the photo, nothing is known, as in a hole. If `side` is larger than S,
    the result is enlarged by side / S.
    """

    left: int
    top: int
    side: int
    holes: tuple[int, ...]  # as `label_holes` numbers them
    largest_hole: int  # longest side of the largest hole, in pixels; a close group counts as one


def keep_of(mask: Image.Image | np.ndarray) -> np.ndarray:
    """bool (H, W): where a mask, a picture or uint8 (H, W) or (H, W, 3), is at least CUT."""
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    return np.asarray(image.convert("L")) >= CUT


def label_holes(keep: np.ndarray) -> np.ndarray:
    """int (H, W): the number, from 1, of the hole that a pixel belongs to; 0 where it is kept.

    Pixels of one hole touch at sides or corners.
    """
    return _labels(~keep)


def _labels(inside: np.ndarray) -> np.ndarray:
    return _ndimage().label(inside, structure=np.ones((3, 3)))[0]


def _ndimage() -> ModuleType:
    """Imported by those who need regions, since it takes a third of a second."""
    from scipy import ndimage

    return ndimage


# ---- Which squares ----


def find_regions(keep: np.ndarray, image_size: int) -> list[Region]:
    """Squares that cover all holes and something around them, sorted by their position.

    A square has the network's size (image_size), or a larger one if a hole needs it. A photo that
    is smaller than that, or nearly covered by a square, is taken as a whole. Each hole is filled
    from one square. Returns [] if there is no hole.
    """
    labels = label_holes(keep)
    if not labels.any():
        return []
    units, unit_of = _find_units(labels, image_size)
    wanted = _with_context(units, image_size, keep.shape)
    squares = [*_find_squares(wanted, image_size, keep.shape)]
    square_of_unit = np.empty(len(units), int)
    for number, (*_, members) in enumerate(squares):
        square_of_unit[members] = number
    holes_of = _indices_of_each(square_of_unit[unit_of])
    regions = [
        Region(*square, tuple((holes + 1).tolist()), int(_longest_sides(units[members]).max()))
        for (*square, members), holes in zip(squares, holes_of, strict=True)
    ]
    return sorted(regions, key=lambda region: (region.top, region.left, region.side, region.holes))


def _indices_of_each(groups: np.ndarray) -> list[np.ndarray]:
    """For each group 0, 1, ..., the places where it stands."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])


def _find_units(labels: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What is filled at once, single holes or close groups: their boxes, and each hole's unit.

    Holes are close if less than about image_size / 4 apart. A group that is far larger than its
    largest hole is left in pieces, for a photo full of dust is not a hole of the photo's size.
    """
    boxes = hole_boxes(labels)
    group_of = _groups_of_close(labels, image_size // CLOSE)
    groups = _joint(boxes, group_of)
    largest = np.zeros(len(groups), int)
    np.maximum.at(largest, group_of, _longest_sides(boxes))
    together = _longest_sides(groups) <= 3 * largest
    names = np.where(together[group_of], group_of, len(groups) + np.arange(len(boxes)))
    _, unit_of = np.unique(names, return_inverse=True)
    return _joint(boxes, unit_of), unit_of


def _groups_of_close(labels: np.ndarray, margin: int) -> np.ndarray:
    """int (holes,): each hole's group, from 0; one's holes touch if all grow by margin pixels."""
    grown = (labels > 0).astype(np.uint8)
    for axis in (0, 1):
        grown = _ndimage().maximum_filter1d(grown, 2 * margin + 1, axis, mode="constant")
    group_of = np.zeros(labels.max() + 1, int)
    group_of[labels] = _labels(grown)
    return group_of[1:] - 1


def hole_boxes(labels: np.ndarray) -> np.ndarray:
    """Top, left, bottom and right of each hole, int (holes, 4); labels: see `label_holes`."""
    slices = _ndimage().find_objects(labels)
    return np.array([(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in slices])


def _joint(boxes: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """The boxes around each group of boxes."""
    joint = np.tile([np.iinfo(int).max, np.iinfo(int).max, 0, 0], (group_of.max() + 1, 1))
    np.minimum.at(joint[:, :_BOTTOM], group_of, boxes[:, :_BOTTOM])
    np.maximum.at(joint[:, _BOTTOM:], group_of, boxes[:, _BOTTOM:])
    return joint


def _longest_sides(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, _BOTTOM:] - boxes[:, :_BOTTOM]).max(axis=1)


def _with_context(boxes: np.ndarray, image_size: int, shape: tuple[int, int]) -> np.ndarray:
    """Boxes grown by a quarter of their size, or more, as far as the photo goes."""
    context = np.maximum(image_size // CONTEXT, -(-_longest_sides(boxes) // 4))[:, None]
    return np.clip(boxes + context * [-1, -1, 1, 1], 0, [*shape, *shape])


def _find_squares(
    wanted: np.ndarray, image_size: int, shape: tuple[int, int]
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Left, top and side of squares that cover all boxes, and the indices of each one's boxes."""
    remaining = np.arange(len(wanted))
    sides = _longest_sides(wanted)
    if max(shape) <= image_size or sides.max() > max(image_size, NEARLY_ALL * max(shape)):
        yield *_placed(np.array([0, 0, *shape]), max(shape), shape), max(shape), remaining
        return
    while len(remaining):
        left, top, side, inside = _next_square(wanted[remaining], image_size, shape)
        yield left, top, side, remaining[inside]
        remaining = remaining[~inside]


def _next_square(
    wanted: np.ndarray, image_size: int, shape: tuple[int, int]
) -> tuple[int, int, int, np.ndarray]:
    """One square, and which boxes it covers: around the largest box, or else from top to bottom."""
    sides = _longest_sides(wanted)
    side = int(sides.max())
    if side > image_size:
        left, top = _placed(wanted[sides.argmax()], side, shape)
        square = np.array([top, left, top + side, left + side])
        return left, top, side, _lie_in(wanted, square)
    strip = wanted[:, _BOTTOM] <= wanted[:, _TOP].min() + image_size
    inside = strip & (wanted[:, _RIGHT] <= wanted[strip, _LEFT].min() + image_size)
    around = _joint(wanted[inside], np.zeros(inside.sum(), int))[0]
    return *_placed(around, image_size, shape), image_size, inside


def _lie_in(boxes: np.ndarray, outer: np.ndarray) -> np.ndarray:
    starts, ends = boxes[:, :_BOTTOM] >= outer[:_BOTTOM], boxes[:, _BOTTOM:] <= outer[_BOTTOM:]
    return (starts & ends).all(axis=1)


def _placed(box: np.ndarray, side: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Left and top of a square around a box: in the photo, or evenly over it where it is larger."""
    height, width = shape
    left = _first(box[_LEFT] + box[_RIGHT], side, width)
    return left, _first(box[_TOP] + box[_BOTTOM], side, height)


def _first(twice_the_middle: int, side: int, length: int) -> int:
    if side >= length:
        return -((side - length) // 2)
    return int(np.clip((twice_the_middle - side) // 2, 0, length - side))


# ---- To the network ----


def cut_image(photo: np.ndarray, keep: np.ndarray, region: Region, image_size: int) -> np.ndarray:
    """A region as the network may see it, uint8 (S, S, 3): 0 where `cut_keep` is False.

    Scaled as `pictures` does, but each pixel is a mean of kept pixels alone: what is to be removed
    leaves no trace around its hole.
    """
    kept = _square(keep, region).astype(np.float32)
    weights = _scaled(kept, image_size)
    known = cut_keep(keep, region, image_size)
    channels = [
        _scaled(channel * kept, image_size) / np.where(known, weights, 1)
        for channel in np.moveaxis(_square(photo, region), -1, 0)
    ]
    return _to_bytes(np.where(known, channels, 0).transpose(1, 2, 0))


def cut_keep(keep: np.ndarray, region: Region, image_size: int) -> np.ndarray:
    """bool (S, S): what the network may take as known.

    That is where all of the photo's pixels that the network's pixel covers, even in part, are kept.
    """
    steps = np.arange(image_size + 1) * region.side
    covered = [*zip(steps[:-1] // image_size, -(-steps[1:] // image_size), strict=True)]
    keep = _square(keep, region)
    for _ in range(2):  # along the columns; then, as that is transposed, along the rows
        keep = np.stack([keep[first:last].all(axis=0) for first, last in covered], axis=1)
    return keep


def cut_start(photo: np.ndarray, region: Region, image_size: int) -> np.ndarray:
    """A region of a complete photo to start from, uint8 (S, S, 3), scaled as `pictures` does.

    Where it reaches beyond the photo, the photo's edge goes on.
    """
    rows, columns = (
        np.clip(np.arange(first, first + region.side), 0, length - 1)
        for first, length in zip((region.top, region.left), photo.shape[:2], strict=True)
    )
    return _scaled(photo[np.ix_(rows, columns)], image_size)


def _square(array: np.ndarray, region: Region) -> np.ndarray:
    """The region's square of a photo or mask; 0 or False outside of it."""
    rows, square_rows = _overlap(region.top, region.side, array.shape[0])
    columns, square_columns = _overlap(region.left, region.side, array.shape[1])
    square = np.zeros((region.side, region.side, *array.shape[2:]), array.dtype)
    square[square_rows, square_columns] = array[rows, columns]
    return square


def _scaled(picture: np.ndarray, image_size: int) -> np.ndarray:
    return resize_and_crop(Image.fromarray(picture), image_size)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


# ---- Back into the photo ----


def paste(
    photo: np.ndarray,
    keep: np.ndarray,
    regions: Sequence[Region],
    results: Sequence[np.ndarray],
    image_size: int,
) -> np.ndarray:
    """The photo with its holes filled from results, uint8 (S, S, 3), one for each region.

    Kept pixels stay as they are, and colours in a hole are shifted so that they meet those around
    it. Raises ValueError if regions and results differ in number.
    """
    filled = photo.copy()
    region_of = _region_of_each_pixel(keep, regions)
    for number, (region, result) in enumerate(zip(regions, results, strict=True)):
        patch = _enlarged(_fitted(result, photo, keep, region, image_size), region.side)
        rows, patch_rows = _overlap(region.top, region.side, photo.shape[0])
        columns, patch_columns = _overlap(region.left, region.side, photo.shape[1])
        inside = region_of[rows, columns] == number
        filled[rows, columns][inside] = patch[patch_rows, patch_columns][inside]
    return filled


def _region_of_each_pixel(keep: np.ndarray, regions: Sequence[Region]) -> np.ndarray:
    """int (H, W): the index of the region that fills a pixel; -1 where none does."""
    labels = label_holes(keep)
    region_of_hole = np.full(labels.max() + 1, -1)
    for number, region in enumerate(regions):
        region_of_hole[list(region.holes)] = number
    return region_of_hole[labels]


def _enlarged(square: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC))


def _overlap(start: int, side: int, length: int) -> tuple[slice, slice]:
    """The part of a photo that a square covers, along one axis, in both's coordinates."""
    first, last = max(start, 0), min(start + side, length)
    return slice(first, last), slice(first - start, last - start)


def _fitted(
    result: np.ndarray, photo: np.ndarray, keep: np.ndarray, region: Region, image_size: int
) -> np.ndarray:
    """A result with the photo's colours where they are known, and a smooth way from there.

    What it lacks at known pixels, it also lacks in the hole: near the edge as much as nearby (by a
    blur of known pixels alone, which reaches into the hole), deep inside as much as on average.
    """
    known = cut_keep(keep, region, image_size)[..., None]
    if not known.any():
        return result
    truth = cut_image(photo, keep, region, image_size).astype(np.float32)
    lack = truth - result
    width = max(1.0, image_size / FEATHER)
    nearby = _blurred(lack * known, width / 2) / np.maximum(_blurred(known, width / 2), 1e-6)
    average = lack.mean(axis=(0, 1), where=known)
    depth = _ndimage().distance_transform_edt(~known[..., 0])[..., None]  # 1 at the hole's edge
    share = np.cos(np.clip((depth - 1) / width, 0, 1) * np.pi) / 2 + 0.5
    return _to_bytes(np.where(known, truth, result + average + share * (nearby - average)))


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    return _ndimage().gaussian_filter(values.astype(np.float32), sigma, axes=(0, 1), truncate=3)
