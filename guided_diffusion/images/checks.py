"""What is checked of images and masks before hours of sampling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from guided_diffusion.config import CUT, DatasetConfig, UserError
from guided_diffusion.images.files import InputFile, resize_and_crop
from guided_diffusion.images.pairs import Pair, PairFiles
from guided_diffusion.images.regions import cut_keep, find_regions, keep_of
from guided_diffusion.images.tensors import decode_mask
from guided_diffusion.images.tiles import find_tiles, is_wide, padded

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
    views: int = 1  # with fit: region, one a region
    hole: int = 0  # with fit: region, the longest side of the largest hole
    windows: int = 0  # with fit: tile, over all holes
    wide: frozenset[str] = frozenset()  # with fit: tile, keys of _WIDE


@dataclass(frozen=True)
class Found:
    """What was found in the files of a pair."""

    image: Size
    mask: _Mask
    start: Size | None = None


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


class PairChecks:
    """Looks at the files of pairs, one by one, and then says what is wrong with all of them."""

    def __init__(
        self, dataset: DatasetConfig, image_size: int | None, known_from: int | None = None
    ):
        """image_size, known_from: as for `decode_pair`."""
        self.dataset, self.image_size = dataset, image_size
        self.cut = known_from == CUT
        self.masks: dict[str, _Mask] = {}  # by path, since one may serve all images
        # The setting that needs masks of the size of their images; "": none.
        self.needs_sizes = "image_size: null" if image_size is None else ""
        if dataset.fit != "crop":
            self.needs_sizes = f"fit: {dataset.fit}"

    def inspect(self, files: PairFiles) -> Found | UserError:
        """What is in these files, or why one of them cannot be decoded."""
        try:
            image = files.image.rgb().size
            start = files.start and files.start.rgb().size
            if files.mask.path not in self.masks:
                self.masks[files.mask.path] = self._inspect_mask(files.mask)
        except UserError as error:
            return error
        return Found(image, self.masks[files.mask.path], start)

    def _inspect_mask(self, file: InputFile) -> _Mask:
        mask = decode_mask(file, self.dataset.mask_convention)
        if self.dataset.fit == "region":
            return _inspect_photo_mask(mask, self.image_size)
        if self.dataset.fit == "tile":
            return _inspect_tiled_mask(mask, self.image_size)
        return _inspect_mask(mask, self.image_size, self.cut)

    def fits(self, found: Found) -> bool:
        """Whether mask and start picture are as large as they must be."""
        mask_fits = not self.needs_sizes or found.mask.size == found.image
        return mask_fits and found.start in (None, found.image)

    def report(self, found: Mapping[Pair, Found | UserError]) -> None:
        """Warn of what was found, one line a kind.

        That is: masks in grey (unless they are cut into black and white) or in colour, masks that
        are dim all over, that keep everything, nothing or little, and masks that are not as large
        as their image; with fit: region, holes that are larger than the network's square, and masks
        that leave the network nothing to see; with fit: tile, holes that are wider than a window
        or most of a photo; without an image_size, pictures that are large.
        Raises UserError that names the first file that cannot be read, or that has not the size of
        its image, where it must: a picture to start from, and, with fit: region or tile or without
        an image_size, a mask.
        """
        errors = list(dict.fromkeys(str(e) for e in found.values() if isinstance(e, UserError)))
        if errors:
            others = f" ({len(errors) - 1} more cannot be read either)" if errors[1:] else ""
            raise UserError(f"{errors[0]}{others}")
        for message in self._messages(found):
            warnings.warn(message, UserWarning, stacklevel=2)

    def _messages(self, found: Mapping[Pair, Found]) -> Iterator[str]:
        """Warnings. Raises UserError."""
        _check_starts(found)
        masks = {pair.mask_path: each.mask for pair, each in found.items()}
        for kind, text in _WARNINGS.items():
            paths = [path for path, mask in masks.items() if mask.kind == kind]
            if paths:
                count = f"{len(paths)} of {len(masks)} masks, first {paths[0]},"
                yield f"{count} {text.format(S=self.image_size)}"
        yield from _convention_warnings(masks, self.dataset.mask_convention)
        yield from _unequal_sizes(found, self.needs_sizes)
        if self.dataset.fit == "region":
            yield from _large_holes(found, self.image_size)
        yield from _wide_holes(found, self.image_size)
        if self.image_size is None:
            yield from _large_pictures(found)


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


def _inspect_tiled_mask(mask: Image.Image, image_size: int) -> _Mask:
    keep = keep_of(mask)
    parts = find_tiles(padded(~keep, image_size), image_size)
    windows = sum(len(part.windows) for part in parts)
    wide = set()
    if is_wide(~keep, image_size + 1):
        wide.add("hole")
    if keep.mean() < 0.5 and is_wide(~keep, image_size // 4):  # other than fine patterns
        wide.add("photo")
    kind = "coloured" if _is_coloured(mask) else _kind(np.asarray(mask), keep * np.uint8(255))
    kept = float(keep.mean())
    return _Mask(mask.size, kind, kept, len(parts), windows=windows, wide=frozenset(wide))


def _is_coloured(mask: Image.Image) -> bool:
    """More than what JPEG does to black and white."""
    lowest, highest = np.asarray(mask).min(axis=2), np.asarray(mask).max(axis=2)
    return bool((highest.astype(int) - lowest).max() > COLOUR)


def _kind(values: np.ndarray, used: np.ndarray) -> str:
    """values: of a mask. used: as the sampler takes them, which may be cut at CUT."""
    if 0 < values.max() < CUT:
        return "dim"
    if ((used > 0) & (used < 255)).any():
        return "fractional"
    if used.min() == used.max():
        return "white" if used.max() else "black"
    return "binary"


def _check_starts(found: Mapping[Pair, Found]) -> None:
    """Raises UserError where an image and the picture to start from differ in size."""
    sizes = {pair: (each.image, each.start) for pair, each in found.items() if each.start}
    unequal = [pair for pair, (image, start) in sizes.items() if start != image]
    if unequal:
        raise UserError(
            f"{len(unequal)} of {len(found)} images differ in size from their start picture, first "
            f"{_shown(unequal[0].image_path, sizes[unequal[0]][0])} and "
            f"{_shown(unequal[0].start_path, sizes[unequal[0]][1])}: start_from needs pictures in "
            "the size of the images"
        )


def _shown(path: str, size: Size) -> str:
    return "{} ({}x{})".format(path, *size)


def _unequal_sizes(found: Mapping[Pair, Found], needing: str) -> Iterator[str]:
    """The warning about masks that have not the size of their image.

    needing: the setting that needs masks of that size, for which it is an error; "": none.
    """
    unequal = [pair for pair, each in found.items() if each.image != each.mask.size]
    if not unequal:
        return
    first, sizes = unequal[0], found[unequal[0]]
    message = (
        f"{len(unequal)} of {len(found)} images differ in size from their mask, first "
        f"{_shown(first.image_path, sizes.image)} and {_shown(first.mask_path, sizes.mask.size)}: "
    )
    if needing:
        raise UserError(f"{message}{needing} needs masks in the size of their images")
    yield (
        f"{message}each is resized and its centre cropped separately; check that they still fit "
        "together"
    )


def _large_pictures(found: Mapping[Pair, Found]) -> Iterator[str]:
    large = [pair for pair, each in found.items() if math.prod(each.image) > LARGE]
    if large:
        first = _shown(large[0].image_path, found[large[0]].image)
        yield (
            f"{len(large)} of {len(found)} pictures are larger than 1024x1024, first {first}: time "
            "grows with the square of their pixels; to work on squares around the holes alone, set "
            "image_size: 512 and, in the dataset, fit: region"
        )


def _large_holes(found: Mapping[Pair, Found], image_size: int) -> Iterator[str]:
    large = [pair for pair, each in found.items() if each.mask.hole > image_size]
    if large:
        yield (
            f"{len(large)} of {len(found)} photos have holes larger than the {image_size} pixels "
            f"that the network sees, first {large[0].image_path} "
            f"({found[large[0]].mask.hole} pixels): what fills them is made smaller and then "
            "enlarged, so that it is less sharp than the photo"
        )


_WIDE = {
    "hole": (
        "have holes wider than {S} pixels, the window of the network: their middle rests on "
        "what other windows made up; beyond twice the window, {others} serves better"
    ),
    "photo": (
        "are to be filled in for the most part, but a network that sees {S}x{S} of them knows "
        "patches, not scenes; {others} serves better"
    ),
}


def _wide_holes(found: Mapping[Pair, Found], image_size: int | None) -> Iterator[str]:
    """Warnings about holes that are too wide for fit: tile."""
    for kind, text in _WIDE.items():
        pairs = [pair for pair, each in found.items() if kind in each.mask.wide]
        if pairs:
            others = "fit: region, a larger model or method: latent"
            yield (
                f"{len(pairs)} of {len(found)} photos, first {pairs[0].image_path}, "
                f"{text.format(S=image_size, others=others)}"
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
