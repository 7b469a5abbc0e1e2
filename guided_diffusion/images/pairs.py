"""Images and masks: which go together, and the files of each pair, read once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeVar

from guided_diffusion.config import UserError
from guided_diffusion.images.files import InputFile, list_images, read_input
from guided_diffusion.machine import storage

READERS = 4  # threads

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One image to inpaint and the mask that goes with it."""

    index: int  # position in the sorted list after `offset`; decides the random stream
    image_path: str
    mask_path: str
    name: str  # of the results, relative to each output folder, with "/": "sub/x.png"
    start_path: str | None = None  # the picture to start from; None: pure noise

    @property
    def paths(self) -> tuple[str, str, str | None]:
        """Of the image, of the mask, and of the picture to start from."""
        return self.image_path, self.mask_path, self.start_path


@dataclass(frozen=True)
class PairFiles:
    """The files of a pair."""

    image: InputFile
    mask: InputFile
    start: InputFile | None = None


# ---- Which image goes with which mask ----


def find_pairs(
    gt_path: str,
    mask_path: str,
    offset: int = 0,
    max_len: int | None = None,
    start_path: str | None = None,
) -> list[Pair]:
    """Pair images with masks by sorted order, the first `offset` left out, at most `max_len`.

    Each path is a folder, searched recursively, or a single file; a single mask file serves all
    images. start_path: of the pictures to start from, paired as masks are; None: none. Warns, once,
    if an image and its mask, or start picture, have different names. Raises UserError if there is
    nothing to pair, if the counts differ, or if two images would write the same result.
    """
    images = list_images("gt_path", gt_path)
    masks = list_images("mask_path", mask_path)
    names = _result_names(gt_path, images)
    masks = _one_each("mask", "mask_path", mask_path, masks, gt_path, len(images))
    starts = [None] * len(images)
    if start_path:
        key, found = "start_from.path", list_images("start_from.path", start_path)
        starts = _one_each("start picture", key, start_path, found, gt_path, len(images))
    if offset >= len(images):
        raise UserError(
            f"offset {offset} leaves no image: gt_path {gt_path} has {len(images)}; "
            f"use an offset of at most {len(images) - 1}"
        )
    chosen = list(zip(images, masks, names, starts, strict=True))[offset:][:max_len]
    pairs = [Pair(index, *paths_and_name) for index, paths_and_name in enumerate(chosen)]
    if storage.is_dir(mask_path):
        _warn_of_different_names("mask", [(pair.image_path, pair.mask_path) for pair in pairs])
    if start_path and storage.is_dir(start_path):
        of_starts = [(pair.image_path, pair.start_path) for pair in pairs]
        _warn_of_different_names("start picture", of_starts)
    return pairs


def _one_each(
    noun: str, key: str, path: str, found: list[str], gt_path: str, images: int
) -> list[str]:
    """A file for each image, of those found at a path; a path of one file serves all images."""
    if not storage.is_dir(path):
        return found * images
    if len(found) != images:
        raise UserError(
            f"gt_path {gt_path} has {images} image(s), but {key} {path} has {len(found)} "
            f"(subfolders included): give each image one {noun}, or, to use one {noun} for all "
            f"images, give the {noun} file itself as {key}, e.g. {found[0]}"
        )
    return found


def _warn_of_different_names(noun: str, paths: list[tuple[str, str]]) -> None:
    """paths: of an image, and of what goes with it."""
    for image, other in paths:
        if PurePath(image).stem != PurePath(other).stem:
            warnings.warn(
                f"images and {noun}s are paired in sorted order, and some names differ; first such "
                f"pair: image {image}, {noun} {other}",
                UserWarning,
                stacklevel=3,
            )
            return


def _result_names(gt_path: str, images: list[str]) -> list[str]:
    """Where each image's result goes, relative to the output folders. Raises UserError."""
    root = gt_path if storage.is_dir(gt_path) else PurePath(gt_path).parent
    image_of: dict[str, str] = {}
    for image in images:
        name = PurePath(image).relative_to(root).with_suffix(".png").as_posix()
        if name in image_of:
            raise UserError(
                f"{image_of[name]} and {image} would both write the result {name}: "
                "rename one of them"
            )
        image_of[name] = image
    return list(image_of)


# ---- Their files ----


def read_pair(pair: Pair, read: Callable[[str], InputFile] = read_input) -> PairFiles:
    """Raises UserError for a file that cannot be read."""
    return PairFiles(*(path and read(path) for path in pair.paths))


def for_each_pair(pairs: Iterable[Pair], function: Callable[[Pair, PairFiles], T]) -> dict[Pair, T]:
    """pair -> function(pair, its files), in several threads, as files may be far off.

    Each file is read once. Only those that serve several pairs are kept in memory meanwhile.
    In the order of the pairs. Raises UserError for a file that cannot be read.
    """
    pairs = list(dict.fromkeys(pairs))
    uses = Counter(path for pair in pairs for path in pair.paths if path)
    shared = {path: read_input(path) for path, number in uses.items() if number > 1}

    def read(path: str) -> InputFile:
        return shared.get(path) or read_input(path)

    with ThreadPoolExecutor(READERS) as readers:
        results = readers.map(lambda pair: function(pair, read_pair(pair, read)), pairs)
        return dict(zip(pairs, results, strict=True))
