"""Photos at their own resolution: windows of the network's size over the holes of a photo.

`find_tiles` chooses them. Only the pixels that some window covers are computed. They are packed
into one row, in the photo's order, and `Tiles.places` says which of them each window sees.

A hole is bool (H, W), True where something is to be filled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from guided_diffusion.images.regions import hole_boxes, label_holes

MOST = 768  # windows at a time, about: of 64x64, the sampler takes about 1 GB for their pixels
# A pixel of a hole has at least S / MARGIN pixels around it in some window of S x S, where the
# photo has them.
MARGIN = 4


@dataclass(frozen=True, eq=False)
class Tiles:
    """Windows that are computed together, and the holes that are filled from them."""

    windows: np.ndarray  # int (K, 2): top and left of each
    side: int
    hole: np.ndarray  # bool (H, W)

    @cached_property
    def covered(self) -> np.ndarray:
        """bool (H, W): pixels that some window covers, N of them."""
        covered = np.zeros(self.hole.shape, bool)
        for top, left in self.windows:
            covered[top : top + self.side, left : left + self.side] = True
        return covered

    @property
    def places(self) -> np.ndarray:
        """int32 (K, S, S): where the pixels of each window are in the row of all N."""
        places = np.cumsum(self.covered, dtype=np.int32).reshape(self.hole.shape) - 1
        at = np.lib.stride_tricks.sliding_window_view(places, (self.side, self.side))
        return at[self.windows[:, 0], self.windows[:, 1]]


def find_tiles(hole: np.ndarray, side: int) -> list[Tiles]:
    """The windows over all holes: none, or all together, or in parts if they are very many.

    Each hole, however large, is filled in one part. hole: (H, W), each at least side.
    """
    windows = find_windows(hole, side)
    if len(windows) <= MOST:
        return [Tiles(windows, side, hole)] if len(windows) else []
    labels = label_holes(~hole)
    tops = np.maximum.accumulate(windows[:, 0])
    parts = np.searchsorted(tops, hole_boxes(labels)[:, 0]) // MOST  # of each hole
    part_of_pixel = np.append(-1, parts)[labels]
    holes = (part_of_pixel == part for part in np.unique(parts))
    return [Tiles(find_windows(each, side), side, each) for each in holes]


def find_windows(hole: np.ndarray, side: int) -> np.ndarray:
    """Top and left of windows that cover a hole and something around it, int (K, 2).

    They follow the hole in strips, from top to bottom, and each lies in the middle of its piece.
    hole: (H, W), each at least side. Returns none where there is no hole.
    """
    windows = []
    rest = hole.copy()  # what lies not yet well inside a window
    for top in range(len(rest)):
        while rest[top].any():
            windows += _strip(rest, top, side)
    return np.array(windows, int).reshape(-1, 2)


def _strip(rest: np.ndarray, top: int, side: int) -> Iterator[tuple[int, int]]:
    """Windows over what is left in the rows from top on, of which it takes away what they cover."""
    margin = side // MARGIN
    core = side - 2 * margin
    strip = rest[top : top + core]
    for left in np.flatnonzero(strip.any(axis=0)):
        cell = strip[:, left : left + core]
        if cell[:, 0].any():
            corner = (
                _first(cell, 1, top, side, len(rest)),
                _first(cell, 0, left, side, rest.shape[1]),
            )
            rest[_inner(corner, side, margin, rest.shape)] = False
            yield corner


def _first(cell: np.ndarray, axis: int, offset: int, side: int, length: int) -> int:
    """Top (axis 1) or left (axis 0) of the window in whose middle the cell's holes lie."""
    places = offset + np.flatnonzero(cell.any(axis=axis))
    return int(np.clip((places[0] + places[-1] + 1 - side) // 2, 0, length - side))


def _inner(
    corner: tuple[int, int], side: int, margin: int, shape: tuple[int, int]
) -> tuple[slice, ...]:
    """A window but for its margin, which it has where the photo goes on."""
    return tuple(
        slice(
            first + margin if first else 0,
            length if first + side == length else first + side - margin,
        )
        for first, length in zip(corner, shape, strict=True)
    )


def padded(array: np.ndarray, side: int) -> np.ndarray:
    """A photo or mask, (H, W) or (H, W, 3), mirrored below and right of it if smaller than side."""
    height, width = array.shape[:2]
    if min(height, width) >= side:
        return array
    amounts = [(0, max(0, side - height)), (0, max(0, side - width)), (0, 0)]
    return np.pad(array, amounts[: array.ndim], mode="symmetric")


def is_wide(hole: np.ndarray, side: int) -> bool:
    """Whether a square of this side fits into the hole."""
    if min(hole.shape) < side:
        return False
    sums = np.zeros((hole.shape[0] + 1, hole.shape[1] + 1), np.int32)
    sums[1:, 1:] = hole.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    rows = sums[side:] - sums[:-side]
    return bool((rows[:, side:] - rows[:, :-side] == side**2).any())
