"""Images and masks: which go together, and the files of each pair, read once."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypeVar

from guided_diffusion.config import UserError
from guided_diffusion.images.files import InputFile, list_images, read_input
from guided_diffusion.images.names import (
    Name,
    contradictions,
    differ,
    likeness,
    match_names,
    split_names,
)
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


@dataclass(frozen=True)
class Pairing:
    """The pairs of a dataset, and how they were found."""

    pairs: list[Pair]
    images: int  # in gt_path, also those that offset and max_len leave out
    rule: str  # by which masks belong to images, in words; "": one mask serves all


def find_pairs(
    gt_path: str,
    mask_path: str,
    offset: int = 0,
    max_len: int | None = None,
    start_path: str | None = None,
) -> list[Pair]:
    """The pairs alone, see `pair_up`."""
    return pair_up(gt_path, mask_path, offset, max_len, start_path).pairs


def pair_up(
    gt_path: str,
    mask_path: str,
    offset: int = 0,
    max_len: int | None = None,
    start_path: str | None = None,
) -> Pairing:
    """Pair images with masks, the first `offset` left out, at most `max_len`.

    Each path is a folder, searched recursively, or a single file; a single mask file serves all
    images. Both may be one folder, where masks are called after their images: x, x_mask. Names
    pair first, see `match_names`, and then sorted order, with a warning if names differ.
    start_path: of the pictures to start from, paired as masks are; None: none. Raises UserError if
    there is nothing to pair, if the counts differ, if sorted order contradicts the names, or if two
    images would write the same result.
    """
    images, masks = _list_both(gt_path, mask_path)
    names = _result_names(gt_path, images)
    if offset >= len(images):
        raise UserError(
            f"offset {offset} leaves no image: gt_path {gt_path} has {len(images)}; "
            f"use an offset of at most {len(images) - 1}"
        )
    chosen = slice(offset, None if max_len is None else offset + max_len)
    gts = _Folder("gt_path", gt_path, images)
    masks, rule = _one_each("mask", _Folder("mask_path", mask_path, masks), gts, chosen)
    starts = [None] * len(images)
    if start_path:
        is_input = is_same_path(start_path, gt_path)
        found = images if is_input else list_images("start_from.path", start_path)
        folder = _Folder("start_from.path", start_path, found)
        starts, _ = _one_each("start picture", folder, gts, chosen)
    rows = list(zip(images, masks, names, starts, strict=True))[chosen]
    pairs = [Pair(index, *paths_and_name) for index, paths_and_name in enumerate(rows)]
    return Pairing(pairs, len(images), rule)


def _list_both(gt_path: str, mask_path: str) -> tuple[list[str], list[str]]:
    """Images and masks; one folder may hold both. Raises UserError."""
    images = list_images("gt_path", gt_path)
    if not is_same_path(gt_path, mask_path):
        masks = list_images("mask_path", mask_path)
        if not storage.is_dir(mask_path):
            return images, masks
        among = {*masks}  # where mask_path lies within gt_path
        return [path for path in images if path not in among] or images, masks
    split = split_names(names_of(gt_path, images))
    if split is None:
        return images, images
    mask_of, affix = split
    alone = {*range(len(images))} - {*mask_of} - {*mask_of.values()}
    if alone:
        raise UserError(
            f"gt_path and mask_path are one folder, {gt_path}, where masks are called after their "
            f"images with {affix}, but {len(alone)} of {len(images)} pictures have no partner, "
            f"first {images[min(alone)]}: add it, or move the picture away"
        )
    order = sorted(mask_of)
    return [images[i] for i in order], [images[mask_of[i]] for i in order]


def is_same_path(path: str, other: str) -> bool:
    """Whether two paths are of one file or folder."""
    if storage.is_remote(path) or storage.is_remote(other):
        return path.rstrip("/") == other.rstrip("/")
    return os.path.realpath(path) == os.path.realpath(other)


def names_of(root: str, paths: Sequence[str]) -> list[Name]:
    """The folder, below the root, and the stem of each path."""
    relative = [PurePath(path).relative_to(root) for path in paths]
    return [(path.parent.as_posix(), path.stem) for path in relative]


@dataclass(frozen=True)
class _Folder:
    key: str  # of the config
    path: str  # or a single file
    found: list[str]  # sorted


def _one_each(noun: str, others: _Folder, gts: _Folder, chosen: slice) -> tuple[list[str], str]:
    """A file for each image, and the rule in words; a path of one file serves all images.

    chosen: of the images, those that are worked on. Raises UserError.
    """
    images, found, path = gts.found, others.found, others.path
    if not storage.is_dir(path):
        return found * len(images), ""
    if len(found) != len(images):
        raise UserError(
            f"gt_path {gts.path} has {len(images)} image(s), but {others.key} {path} has "
            f"{len(found)} (subfolders included): give each image one {noun}, or, to use one "
            f"{noun} for all images, give the {noun} file itself as {others.key}, e.g. {found[0]}"
        )
    root = gts.path if storage.is_dir(gts.path) else str(PurePath(gts.path).parent)
    names, other_names = names_of(root, images), names_of(path, found)
    if match := match_names(names, other_names):
        return [found[place] for place in match.order], match.rule
    if wrong := contradictions(names, other_names):
        raise UserError(
            f"sorted order would give {len(wrong)} of {len(images)} images a {noun} that has the "
            f"name of another image, first {images[wrong[0]]} with {found[wrong[0]]}: give each "
            f"{noun} the name of its image, or one ending for all, as x_mask.png for x.png"
        )
    pairs = list(zip(images, found, names, other_names, strict=True))[chosen]
    _warn_of_different_names(noun, pairs)
    return found, "in sorted order"


def _warn_of_different_names(noun: str, pairs: list[tuple[str, str, Name, Name]]) -> None:
    """pairs: an image, what goes with it, and their names."""
    unlike = [pair for pair in pairs if differ(*pair[2:])]
    if unlike:
        image, other, *_ = min(unlike, key=lambda pair: likeness(*pair[2:]))
        warnings.warn(
            f"images and {noun}s are paired in sorted order, and the names of {len(unlike)} of "
            f"{len(pairs)} differ; the pair least alike: image {image}, {noun} {other}",
            UserWarning,
            stacklevel=5,
        )


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
