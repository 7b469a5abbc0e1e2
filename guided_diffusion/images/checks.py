"""What is checked of images and masks before hours of sampling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from guided_diffusion.config import CUT, LITTLE, DatasetConfig, UserError
from guided_diffusion.images.files import Decoded, InputFile, resize_and_crop
from guided_diffusion.images.metadata import looks_otherwise
from guided_diffusion.images.pairs import Pair, PairFiles
from guided_diffusion.images.regions import cut_keep, find_regions, keep_of
from guided_diffusion.images.tensors import decode_mask, levels_near, stretch_mask
from guided_diffusion.images.tiles import find_tiles, is_wide, padded

Size = tuple[int, int]  # width, height

COLOUR = 16  # levels of 255 between red, green and blue, up to which a pixel is grey
LARGE = 2**20  # pixels of a picture above which attention over all of it takes most of the time
# Of each convention: the other one, and what white means there.
CONVENTIONS = {"keep": ("fill", "fill in"), "fill": ("keep", "keep")}


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
    stretched: tuple[int, int, int] | None = None  # from, to, and of how much, in the file


@dataclass(frozen=True)
class Found:
    """What was found in the files of a pair."""

    image: Size
    mask: _Mask
    start: Size | None = None
    lost: tuple[str, ...] = ()  # keys of _LOST


_WARNINGS = {
    "fractional": (
        "have values between 0 (fill in) and 255 (keep) at {S}x{S}, which are used as they are; no "
        "harm along edges; to avoid it, save images and masks at {S}x{S}, masks black and white"
    ),
    "dim": (
        "are nowhere brighter than half of 255, so that nothing is kept as it is; if 1 means keep "
        "in your masks, multiply them by 255"
    ),
    "dim16": (
        "are nowhere brighter than half of the 65,535 that is white in their 16 bits, so that "
        "nothing is kept as it is; if 255 means keep in your masks, multiply them by 257"
    ),
    "layer": (
        "have one colour all over and their shape in the transparency, which is not read; python "
        "-m guided_diffusion.masks from-alpha makes masks that keep what is opaque, and masks "
        "invert turns them round where what you painted is to be filled in"
    ),
    "hidden": (
        "keep no spot as large as a pixel of the network's {S}x{S}, which therefore sees nothing "
        "of the photo; use fit: crop"
    ),
    "coloured": (
        "are in colour, of which more or less may be kept than one sees; if they are photos, "
        "{both} may be swapped; if the hole is painted in a colour: "
        "python -m guided_diffusion.masks from-colour"
    ),
    "white": (
        "keep everything (white all over): nothing is filled in; if the hole is transparent: "
        "python -m guided_diffusion.masks from-alpha"
    ),
    "black": "keep nothing (black all over): the whole picture is filled in",
}
# What results do not keep of an image.
_LOST = {
    "alpha": (
        "are transparent in places, which results do not keep with fit: crop: the colours beneath "
        "show; to keep it, set fit: region"
    ),
    "profile": (
        "have a colour profile, which results do not keep with fit: crop: their colours look "
        "different; to keep it, set fit: region, or convert the images to sRGB before"
    ),
    "other": (
        "have a colour profile that is not for RGB, so that results cannot keep it: their colours "
        "may look different; to be sure, convert the images to sRGB before"
    ),
    "damaged": (
        "have a colour profile that cannot be read, so that results do not keep it: their colours "
        "may look different"
    ),
    "dark": (
        "have 16 bits but use less than a quarter of their range, so that they look nearly black; "
        "stretch their values, so that white is 65535"
    ),
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
            image = files.image.decoded()
            start = files.start and files.start.rgb().size
            if files.mask.path not in self.masks:
                self.masks[files.mask.path] = self._inspect_mask(files.mask)
        except UserError as error:
            return error
        return Found(image.rgb.size, self.masks[files.mask.path], start, tuple(self._lost(image)))

    def _lost(self, image: Decoded) -> Iterator[str]:
        """What results do not keep of an image: keys of _LOST."""
        profile, is_whole = image.metadata.profile, bool(self.needs_sizes)
        if profile in ("other", "damaged"):
            yield profile
        if image.is_dark:
            yield "dark"
        if not is_whole and image.kept.alpha is not None:
            yield "alpha"
        if not is_whole and profile == "RGB" and looks_otherwise(image.kept.icc):
            yield "profile"

    def _inspect_mask(self, file: InputFile) -> _Mask:
        convention = self.dataset.mask_convention
        mask, stretched = decode_mask(file, convention), None
        if self.dataset.fit == "region":
            found = _inspect_photo_mask(mask, self.image_size)
        elif self.dataset.fit == "tile":
            found = _inspect_tiled_mask(mask, self.image_size)
        else:
            if not self.cut and levels_near(mask, convention):
                mask, stretched = stretch_mask(mask, convention), _levels_of_file(file)
            found = _inspect_mask(mask, self.image_size, self.cut)
        return replace(found, kind=_kind_of_file(file, found.kind), stretched=stretched)

    def fits(self, found: Found) -> bool:
        """Whether mask and start picture are as large as they must be."""
        mask_fits = not self.needs_sizes or found.mask.size == found.image
        return mask_fits and found.start in (None, found.image)

    def report(self, found: Mapping[Pair, Found | UserError]) -> None:
        """Warn of what was found, one line a kind.

        That is: images of which results lose something; masks in grey (unless they are cut into
        black and white) or in colour, masks that are dim all over, nearly white, in a transparent
        layer, that keep everything, nothing or little, and masks that are not as large as their
        image; with fit: region, holes that are larger than the network's square, and masks that
        leave the network nothing to see; with fit: tile, holes that are wider than a window or
        most of a photo; without an image_size, pictures that are large.
        Raises UserError that names the first file that cannot be read, that is an image and its own
        mask, or that has not the size of its image, where it must: a picture to start from, and,
        with fit: region or tile or without an image_size, a mask.
        """
        errors = list(dict.fromkeys(str(e) for e in found.values() if isinstance(e, UserError)))
        if errors:
            others = f" ({len(errors) - 1} more cannot be read either)" if errors[1:] else ""
            raise UserError(f"{errors[0]}{others}")
        for message in self._messages(found):
            warnings.warn(message, UserWarning, stacklevel=2)

    def _messages(self, found: Mapping[Pair, Found]) -> Iterator[str]:
        """Warnings. Raises UserError."""
        _check_apart(found)
        _check_starts(found)
        yield from _losses(found)
        masks = {pair.mask_path: each.mask for pair, each in found.items()}
        yield from _mask_kinds(masks, self.image_size, "gt_path and mask_path")
        yield from _stretched_masks(masks)
        other, means = CONVENTIONS[self.dataset.mask_convention]
        yield from _convention_warnings(masks, means, f"set mask_convention: {other}")
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


def _levels_of_file(file: InputFile) -> tuple[int, int, int]:
    """The darkest and the brightest level, and the one that is white."""
    picture = file.upright()
    if picture.mode.startswith("I"):
        return int(np.min(picture)), int(np.max(picture)), 65535
    picture = file.rgb()
    return int(np.min(picture)), int(np.max(picture)), 255


def _kind_of_file(file: InputFile, kind: str) -> str:
    """The kind of a mask, more precisely where its pixels alone look empty."""
    if kind not in ("black", "white", "dim"):
        return kind
    picture = file.upright()
    if picture.has_transparency_data:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        return kind if alpha.min() == alpha.max() else "layer"
    if picture.mode.startswith("I") and 0 < np.max(picture) < 2**15:
        return "dim16"
    return kind


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


def _stretched_masks(masks: Mapping[str, _Mask]) -> Iterator[str]:
    near = [path for path, mask in masks.items() if mask.stretched and mask.kind != "coloured"]
    if near:
        low, high, white = masks[near[0]].stretched
        yield (
            f"{len(near)} of {len(masks)} masks, first {near[0]}, have values from {low:,} to "
            f"{high:,}, where white is {white:,}: nearly white is taken as white, and all values "
            "are stretched to fit"
        )


def _check_apart(pairs: Iterable[Pair]) -> None:
    """Raises UserError where an image is its own mask, as in a folder of images alone."""
    same = [pair.image_path for pair in pairs if pair.image_path == pair.mask_path]
    if same:
        raise UserError(
            f"gt_path and mask_path are the same, so that {same[0]} would be its own mask: put "
            "masks in a folder of their own, or, in the same one, call them after their images, "
            "as x_mask.png for x.png"
        )


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


def _losses(found: Mapping[Pair, Found]) -> Iterator[str]:
    """Warnings about what results do not keep of their images."""
    images = {pair.image_path: each.lost for pair, each in found.items()}
    for kind, text in _LOST.items():
        paths = [path for path, lost in images.items() if kind in lost]
        if paths:
            yield f"{len(paths)} of {len(images)} images, first {paths[0]}, {text}"


def _mask_kinds(masks: Mapping[str, _Mask], image_size: int | None, both: str) -> Iterator[str]:
    """Warnings about masks that are not black and white. both: where images and masks are given."""
    for kind, text in _WARNINGS.items():
        paths = [path for path, mask in masks.items() if mask.kind == kind]
        if paths:
            count = f"{len(paths)} of {len(masks)} masks, first {paths[0]},"
            yield f"{count} {text.format(S=image_size, both=both)}"


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


def _convention_warnings(masks: Mapping[str, _Mask], means: str, cure: str) -> Iterator[str]:
    """means: what white would mean if the masks were meant the other way round."""
    little = [path for path, mask in masks.items() if mask.kept < LITTLE]
    meant = [path for path in little if masks[path].kind in ("binary", "fractional")]
    if 2 * len(meant) > len(masks):
        yield (
            f"{len(meant)} of {len(masks)} masks, first {meant[0]}, keep less than a fifth of the "
            f"picture; if white (255) means {means} in your masks, {cure}"
        )


def warn_of_given(
    images: Sequence[Size], masks: Sequence[Size], values: np.ndarray, used: np.ndarray
) -> None:
    """What `PairChecks` warns of, about pictures that a Python caller gives.

    images, masks: their sizes as given. values, used: the masks as the network's size has them,
    and as the sampler takes them, uint8 (B, H, W, 3), white = keep.
    """
    found = {
        Pair(i, f"image {i + 1}", f"mask {i + 1}", ""): Found(image, _given_mask(mask, *arrays))
        for i, (image, mask, *arrays) in enumerate(zip(images, masks, values, used, strict=True))
    }
    by_name = {pair.mask_path: each.mask for pair, each in found.items()}
    size = values.shape[1] if values.shape[1] == values.shape[2] else None
    for message in (
        *_mask_kinds(by_name, size, "images and masks"),
        *_convention_warnings(by_name, "fill in", "invert them"),
        *_unequal_sizes(found, ""),
    ):
        warnings.warn(message, UserWarning, stacklevel=4)  # at the line that calls the inpainter


def _given_mask(size: Size, values: np.ndarray, used: np.ndarray) -> _Mask:
    kind = "coloured" if _is_coloured(Image.fromarray(values)) else _kind(values, used)
    return _Mask(size, kind, float(used.mean()) / 255)
