"""What is checked of images and masks before hours of sampling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from guided_diffusion.config import CUT, DatasetConfig, UserError
from guided_diffusion.images.files import read_rgb, resize_and_crop
from guided_diffusion.images.pairs import Pair, for_each
from guided_diffusion.images.regions import cut_keep, find_regions, keep_of
from guided_diffusion.images.tensors import read_mask

T = TypeVar("T")
Size = tuple[int, int]  # width, height

COLOUR = 16  # levels of 255 between red, green and blue, up to which a pixel is grey
LARGE = 2**20  # pixels of a picture above which attention over all of it takes most of the time
LITTLE = 0.2  # of a picture: masks that keep less are often meant the other way round


@dataclass(frozen=True)
class _Mask:
    """What was found in a mask."""

    size: Size  # before resizing
    kind: str  # "binary" or a key of _WARNINGS
    kept: float  # share of the picture
    inputs: int = 1  # of the network: with fit: region, one a region
    hole: int = 0  # with fit: region, the longest side of the largest hole


_WARNINGS = {
    "fractional": (
        "have values between 0 (fill in) and 255 (keep) at {S}x{S}, which are used as they are; no "
        "harm along edges; to avoid it, save images and masks at {S}x{S}, masks black and white"
    ),
    "dim": (
        "are nowhere brighter than half of 255, so that nothing is kept as it is; if 1 means keep "
        "in your masks, multiply them by 255"
    ),
    "hidden": (
        "keep no spot as large as a pixel of the network's {S}x{S}, which therefore sees nothing "
        "of the photo; use fit: crop"
    ),
    "coloured": (
        "are in colour, of which more or less may be kept than one sees; if they are photos, "
        "gt_path and mask_path may be swapped; if the hole is painted in a colour: "
        "python -m guided_diffusion.masks from-colour"
    ),
    "white": (
        "keep everything (white all over): nothing is filled in; if the hole is transparent: "
        "python -m guided_diffusion.masks from-alpha"
    ),
    "black": "keep nothing (black all over): the whole picture is filled in",
}


def check_pairs(
    pairs: Sequence[Pair],
    dataset: DatasetConfig,
    image_size: int | None,
    known_from: int | None = None,
) -> list[int]:
    """Read every image and mask once, and count the inputs of the network that each pair makes.

    Warns, one line a kind, of masks in grey (unless they are cut into black and white) or in
    colour, of masks that are dim all over, that keep everything, nothing or little, and of masks
    that are not as large as their image; with fit: region, of holes that are larger than the
    network's square, and of masks that leave the network nothing to see; without an image_size, of
    pictures that are large. image_size, known_from: as for `load_example`. Raises UserError that
    names the first file that cannot be read, or that has not the size of its image, where it must:
    a picture to start from, and, with fit: region or without an image_size, a mask.
    """
    inspect = _inspect_photo_mask
    if dataset.fit != "region":
        inspect = partial(_inspect_mask, cut=known_from == CUT)

    def inspect_mask(path: str) -> _Mask:
        return inspect(read_mask(path, dataset.mask_convention), image_size)

    checked = list({(pair.image_path, pair.mask_path): pair for pair in pairs}.values())
    pictures = (path for pair in pairs for path in (pair.image_path, pair.start_path) if path)
    images = inspected(pictures, lambda path: read_rgb(path).size)
    masks = inspected([pair.mask_path for pair in pairs], inspect_mask)
    _check_starts(checked, images)
    for message in _messages(checked, images, masks, dataset, image_size):
        warnings.warn(message, UserWarning, stacklevel=2)
    return [masks[pair.mask_path].inputs for pair in pairs]


def inspected(paths: Iterable[str], inspect: Callable[[str], T]) -> dict[str, T]:
    """path -> what is found in it. Raises UserError that names the first bad file."""

    def found(path: str) -> T | UserError:
        try:
            return inspect(path)
        except UserError as error:
            return error

    findings = for_each(paths, found)
    errors = [finding for finding in findings.values() if isinstance(finding, UserError)]
    if errors:
        others = f" ({len(errors) - 1} more cannot be read either)" if errors[1:] else ""
        raise UserError(f"{errors[0]}{others}")
    return findings


def _inspect_mask(mask: Image.Image, image_size: int | None, cut: bool) -> _Mask:
    prepared = resize_and_crop(mask, image_size)
    used = keep_of(prepared) * np.uint8(255) if cut else prepared
    kind = "coloured" if _is_coloured(mask) else _kind(prepared, used)
    return _Mask(mask.size, kind, float(used.mean()) / 255)


def _inspect_photo_mask(mask: Image.Image, image_size: int) -> _Mask:
    keep = keep_of(mask)
    regions = find_regions(keep, image_size)
    hole = max((region.largest_hole for region in regions), default=0)
    kind = _kind(np.asarray(mask), keep * np.uint8(255))
    if kind == "binary" and not any(cut_keep(keep, each, image_size).any() for each in regions):
        kind = "hidden"
    if _is_coloured(mask):
        kind = "coloured"
    return _Mask(mask.size, kind, float(keep.mean()), len(regions), hole)


def _is_coloured(mask: Image.Image) -> bool:
    """More than what JPEG does to black and white."""
    lowest, highest = np.asarray(mask).min(axis=2), np.asarray(mask).max(axis=2)
    return bool((highest.astype(int) - lowest).max() > COLOUR)


def _check_starts(pairs: Sequence[Pair], sizes: Mapping[str, Size]) -> None:
    """Raises UserError where an image and the picture to start from differ in size."""
    started = [pair for pair in pairs if pair.start_path]
    unequal = [pair for pair in started if sizes[pair.start_path] != sizes[pair.image_path]]
    if unequal:
        image, start = unequal[0].image_path, unequal[0].start_path
        shown = ["{}x{}".format(*sizes[path]) for path in (image, start)]
        raise UserError(
            f"{len(unequal)} of {len(pairs)} images differ in size from their start picture, first "
            f"{image} ({shown[0]}) and {start} ({shown[1]}): start_from needs pictures in the size "
            "of the images"
        )


def _kind(values: np.ndarray, used: np.ndarray) -> str:
    """values: of a mask. used: as the sampler takes them, which may be cut at CUT."""
    if 0 < values.max() < CUT:
        return "dim"
    if ((used > 0) & (used < 255)).any():
        return "fractional"
    if used.min() == used.max():
        return "white" if used.max() else "black"
    return "binary"


def _messages(
    pairs: Sequence[Pair],
    images: Mapping[str, Size],
    masks: Mapping[str, _Mask],
    dataset: DatasetConfig,
    image_size: int | None,
) -> Iterator[str]:
    """Warnings. Raises UserError."""
    for kind, text in _WARNINGS.items():
        found = [path for path, mask in masks.items() if mask.kind == kind]
        if found:
            count = f"{len(found)} of {len(masks)} masks, first {found[0]},"
            yield f"{count} {text.format(S=image_size)}"
    yield from _convention_warnings(masks, dataset.mask_convention)
    unequal = [pair for pair in pairs if images[pair.image_path] != masks[pair.mask_path].size]
    if unequal:
        needing = "image_size: null" if image_size is None else ""
        needing = "fit: region" if dataset.fit == "region" else needing
        yield _about_sizes(unequal, len(pairs), images, masks, needing)
    if dataset.fit == "region":
        yield from _large_holes(pairs, masks, image_size)
    if image_size is None:
        yield from _large_pictures(pairs, images)


def _large_pictures(pairs: Sequence[Pair], images: Mapping[str, Size]) -> Iterator[str]:
    paths = [pair.image_path for pair in pairs]
    large = [path for path in paths if math.prod(images[path]) > LARGE]
    if large:
        width, height = images[large[0]]
        yield (
            f"{len(large)} of {len(pairs)} pictures are larger than 1024x1024, first {large[0]} "
            f"({width}x{height}): time grows with the square of their pixels; to work on squares "
            "around the holes alone, set image_size: 512 and, in the dataset, fit: region"
        )


def _large_holes(
    pairs: Sequence[Pair], masks: Mapping[str, _Mask], image_size: int
) -> Iterator[str]:
    large = [pair for pair in pairs if masks[pair.mask_path].hole > image_size]
    if large:
        yield (
            f"{len(large)} of {len(pairs)} photos have holes larger than the {image_size} pixels "
            f"that the network sees, first {large[0].image_path} "
            f"({masks[large[0].mask_path].hole} pixels): what fills them is made smaller and then "
            "enlarged, so that it is less sharp than the photo"
        )


def _convention_warnings(masks: Mapping[str, _Mask], convention: str) -> Iterator[str]:
    little = [path for path, mask in masks.items() if mask.kept < LITTLE]
    meant = [path for path in little if masks[path].kind in ("binary", "fractional")]
    if 2 * len(meant) > len(masks):
        other, means = ("fill", "fill in") if convention == "keep" else ("keep", "keep")
        yield (
            f"{len(meant)} of {len(masks)} masks, first {meant[0]}, keep less than a fifth of the "
            f"picture; if white (255) means {means} in your masks, set mask_convention: {other}"
        )


def _about_sizes(
    unequal: Sequence[Pair],
    number: int,
    images: Mapping[str, Size],
    masks: Mapping[str, _Mask],
    needing: str,
) -> str:
    """The warning about masks that have not the size of their image.

    needing: the setting that needs masks of that size, for which it is an error; "": none.
    """
    image, mask = unequal[0].image_path, unequal[0].mask_path
    sizes = ["{}x{}".format(*size) for size in (images[image], masks[mask].size)]
    message = (
        f"{len(unequal)} of {number} images differ in size from their mask, first "
        f"{image} ({sizes[0]}) and {mask} ({sizes[1]}): "
    )
    if needing:
        raise UserError(f"{message}{needing} needs masks in the size of their images")
    return (
        f"{message}each is resized and its centre cropped separately; check that they still fit "
        "together"
    )
