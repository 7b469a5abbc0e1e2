"""Images and masks: paired, checked, as tensors, and back to bytes.

An image's tensor is in [-1, 1], a keep mask's in [0, 1] (1 = keep, 0 = fill in); both have three
channels. "Prepared" means uint8 RGB, (S, S, 3), S = image_size.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath
from typing import TypeVar

import numpy as np
import torch

from guided_diffusion import storage
from guided_diffusion.config import UserError
from guided_diffusion.pictures import list_images, load_prepared, read_rgb, resize_and_crop

READERS = 4  # threads

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One image to inpaint and the mask that goes with it."""

    index: int  # position in the sorted list after `offset`; decides the random stream
    image_path: str
    mask_path: str
    name: str  # of the results, relative to each output folder, with "/": "sub/x.png"


@dataclass(frozen=True, eq=False)
class Example:
    """A pair as the sampler takes it."""

    image: torch.Tensor  # (3, S, S) float32 in [-1, 1]
    keep_mask: torch.Tensor  # (3, S, S) float32 in [0, 1]; 1 = keep, 0 = fill in
    image_bytes: np.ndarray  # (S, S, 3) uint8: what `image` was made of


# ---- Which image goes with which mask ----


def find_pairs(
    gt_path: str, mask_path: str, offset: int = 0, max_len: int | None = None
) -> list[Pair]:
    """Pair images with masks by sorted order, the first `offset` left out, at most `max_len`.

    Each path is a folder, searched recursively, or a single file; a single mask file serves all
    images. Warns, once, if an image and its mask have different names. Raises UserError if there
    is nothing to pair, if the counts differ, or if two images would write the same result.
    """
    images = list_images("gt_path", gt_path)
    masks = list_images("mask_path", mask_path)
    names = _result_names(gt_path, images)
    if not storage.is_dir(mask_path):
        masks = masks * len(images)
    if len(images) != len(masks):
        raise UserError(
            f"gt_path {gt_path} has {len(images)} image(s), but mask_path {mask_path} has "
            f"{len(masks)} (subfolders included): give each image one mask, or, to use one mask "
            f"for all images, give the mask file itself as mask_path, e.g. {masks[0]}"
        )
    if offset >= len(images):
        raise UserError(
            f"offset {offset} leaves no image: gt_path {gt_path} has {len(images)}; "
            f"use an offset of at most {len(images) - 1}"
        )
    chosen = list(zip(images, masks, names, strict=True))[offset:][:max_len]
    pairs = [Pair(index, *paths_and_name) for index, paths_and_name in enumerate(chosen)]
    if storage.is_dir(mask_path):
        _warn_of_different_names(pairs)
    return pairs


def _warn_of_different_names(pairs: list[Pair]) -> None:
    for pair in pairs:
        if PurePath(pair.image_path).stem != PurePath(pair.mask_path).stem:
            warnings.warn(
                "images and masks are paired in sorted order, and some names differ; first such "
                f"pair: image {pair.image_path}, mask {pair.mask_path}",
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


def for_each(paths: Iterable[str], function: Callable[[str], T]) -> dict[str, T]:
    """path -> function(path), computed once for each, in several threads, as files may be far off.

    In the order of the paths.
    """
    paths = list(dict.fromkeys(paths))
    parts = [paths[i::READERS] for i in range(READERS)]
    with ThreadPoolExecutor(READERS) as readers:
        done = readers.map(lambda part: [(path, function(path)) for path in part], parts)
        results = dict(chain.from_iterable(done))
    return {path: results[path] for path in paths}


# ---- From a file to a tensor ----


def image_to_tensor(prepared: np.ndarray) -> torch.Tensor:
    """uint8 (S, S, 3) -> float32 (3, S, S) in [-1, 1]."""
    return _channels_first(prepared.astype(np.float32) / 127.5 - 1)


def mask_to_tensor(prepared: np.ndarray) -> torch.Tensor:
    """uint8 (S, S, 3) -> float32 (3, S, S) in [0, 1], not thresholded."""
    return _channels_first(prepared.astype(np.float32) / 255)


def load_pair(pair: Pair, image_size: int, flip: bool = False) -> Example:
    """Read a pair, mirrored left to right if `flip`. Raises UserError that names a bad file."""
    image = load_prepared(pair.image_path, image_size)
    mask = load_prepared(pair.mask_path, image_size)
    if flip:
        image, mask = np.fliplr(image), np.fliplr(mask)
    return Example(image_to_tensor(image), mask_to_tensor(mask), np.ascontiguousarray(image))


def flip_decision(seed: int, index: int) -> bool:
    """Whether `random_flip` mirrors image `index`: true for half of all (seed, index).

    The decision has a generator of its own, so that the image's sampling noise stays the same.
    """
    return random.Random(f"flip {seed} {index}").random() < 0.5


def _channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # (3, S, S)


# ---- From a tensor to a file ----


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), values outside clamped.

    Truncated, not rounded, as the original does: 63 of the 256 levels that `image_to_tensor` maps
    come back one lower.
    """
    levels = ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def paste_known(results: np.ndarray, originals: np.ndarray, keep_masks: torch.Tensor) -> np.ndarray:
    """The results with the original bytes wherever the mask is exactly 1.

    results, originals: uint8 (B, S, S, 3). keep_masks: (B, 1 or 3, S, S).
    """
    keep = keep_masks.cpu().permute(0, 2, 3, 1).numpy() == 1
    return np.where(keep, originals, results)


# ---- Checks before hours of sampling ----


@dataclass(frozen=True)
class _Finding:
    size: tuple[int, int]  # width, height before resizing
    kind: str  # what the picture would be as a mask: "binary" or a key of _MASK_WARNINGS


_MASK_WARNINGS = {
    "fractional": (
        "have values between 0 (fill in) and 255 (keep) at {S}x{S}, which are used as they are; no "
        "harm along edges; to avoid it, save images and masks at {S}x{S}, masks black and white"
    ),
    "dim": (
        "are nowhere brighter than half of 255, so that nothing is kept as it is; if 1 means keep "
        "in your masks, multiply them by 255"
    ),
    "white": "keep everything (white all over): nothing is filled in",
    "black": "keep nothing (black all over): the whole picture is filled in",
}


def check_pairs(pairs: Sequence[Pair], image_size: int) -> None:
    """Read and prepare every image and mask once.

    Warns, one line a kind, of masks with grey values, of masks that are dim all over, that keep
    everything or nothing, and of masks that are not as large as their image. Raises UserError that
    names the first file that cannot be read.
    """
    findings = _inspect_all(pairs, image_size)
    messages = _mask_warnings(pairs, findings, image_size) + _size_warnings(pairs, findings)
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)


def _inspect_all(pairs: Sequence[Pair], image_size: int) -> dict[str, _Finding]:
    paths = [path for pair in pairs for path in (pair.image_path, pair.mask_path)]
    findings = for_each(paths, lambda path: _inspect(path, image_size))
    errors = [finding for finding in findings.values() if isinstance(finding, UserError)]
    if errors:
        others = f" ({len(errors) - 1} more cannot be read either)" if errors[1:] else ""
        raise UserError(f"{errors[0]}{others}")
    return findings


def _inspect(path: str, image_size: int) -> _Finding | UserError:
    try:
        image = read_rgb(path)
    except UserError as error:
        return error
    return _Finding(image.size, _kind(resize_and_crop(image, image_size)))


def _kind(prepared: np.ndarray) -> str:
    if 0 < prepared.max() < 128:
        return "dim"
    if ((prepared > 0) & (prepared < 255)).any():
        return "fractional"
    if prepared.min() == prepared.max():
        return "white" if prepared.max() else "black"
    return "binary"


def _mask_warnings(
    pairs: Sequence[Pair], findings: dict[str, _Finding], image_size: int
) -> list[str]:
    masks = dict.fromkeys(pair.mask_path for pair in pairs)
    messages = []
    for kind, text in _MASK_WARNINGS.items():
        found = [mask for mask in masks if findings[mask].kind == kind]
        if found:
            count = f"{len(found)} of {len(masks)} masks, first {found[0]},"
            messages.append(f"{count} {text.format(S=image_size)}")
    return messages


def _size_warnings(pairs: Sequence[Pair], findings: dict[str, _Finding]) -> list[str]:
    def size(path: str) -> str:
        return "{}x{}".format(*findings[path].size)

    unequal = [pair for pair in pairs if size(pair.image_path) != size(pair.mask_path)]
    if not unequal:
        return []
    image, mask = unequal[0].image_path, unequal[0].mask_path
    return [
        f"{len(unequal)} of {len(pairs)} images differ in size from their mask, first "
        f"{image} ({size(image)}) and {mask} ({size(mask)}): each is resized and its centre "
        "cropped separately; check that they still fit together"
    ]
