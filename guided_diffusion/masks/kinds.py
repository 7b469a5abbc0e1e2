"""The kinds of masks: what each hides, drawn in any size.

A mask is uint8 (H, W), 255 = keep, 0 = fill in; sizes are (width, height) in pixels. Lengths below
are those of a picture of 256x256 and scale with the square root of the picture's area.

`thick` and `thin` follow RePaint's published evaluation masks; where its text leaves something
open, those masks were measured (docs/masks.md).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from guided_diffusion.config import UserError

KEEP, FILL_IN = 255, 0
SMALLEST, LARGEST = 16, 16384  # accepted sides of a mask, in pixels
SIDES = ("left", "right", "top", "bottom")

Size = tuple[int, int]  # width, height
Draw = Callable[..., np.ndarray]  # (size, rng, **options) -> mask


def draw_mask(kind: str, size: Size, rng: np.random.Generator, **options: object) -> np.ndarray:
    """Draw a mask of a kind in KINDS: uint8 (H, W), 255 = keep, 0 = fill in.

    size: (width, height). rng: `mask_rng`; the fixed kinds do not use it. options: `side` of half,
    `keep` of expand. Raises UserError for an unknown kind, an unusable size or option.
    """
    check_name(kind, KINDS, "kind of mask")
    check_size(size, "size")
    return KINDS[kind](size, rng, **options)


def mask_rng(seed: int, index: int) -> np.random.Generator:
    """The random numbers of mask `index`; both >= 0. More masks never change the earlier ones."""
    return np.random.default_rng((seed, index))


def check_name(name: str, known: Collection[str], what: str) -> None:
    """Raises UserError with the nearest of the known names if this is none of them."""
    if name not in known:
        nearest = max(known, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
        raise UserError(
            f"no such {what}: {name}; did you mean {nearest}? (all: {', '.join(known)})"
        )


def check_size(size: Size, what: str) -> None:
    """Raises UserError that begins with `what` if no mask can have this size."""
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise UserError(
            f"{what}: {size[0]}x{size[1]} pixels; accepted: {SMALLEST} to {LARGEST} on each side"
        )


# ---- Fixed kinds ----


def _only(kept: slice | tuple[slice, slice], size: Size) -> np.ndarray:
    """A mask that keeps these rows, or these rows of these columns."""
    mask = _all_of(FILL_IN, size)
    mask[kept] = KEEP
    return mask


def _half(size: Size, rng: np.random.Generator, side: str = "right") -> np.ndarray:
    check_name(side, SIDES, "side")
    width, height = size
    hidden = {
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
    }
    mask = _all_of(KEEP, size)
    mask[hidden[side]] = FILL_IN
    return mask


def _expand(size: Size, rng: np.random.Generator, keep: float = 0.25) -> np.ndarray:
    if not 0 < keep < 1:
        raise UserError(
            f"keep: found {keep:g}; accepted: a share of each side, above 0 and below 1"
        )
    width, height = (max(1, round(keep * side)) for side in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return _only(np.s_[top : top + height, left : left + width], size)


def _all_of(value: int, size: Size) -> np.ndarray:
    return np.full(size[::-1], value, np.uint8)  # (H, W)


# ---- Strokes and boxes, as published ----


@dataclass(frozen=True)
class _Strokes:
    """Polylines of segments with round ends, each of a width and a length of its own."""

    fewest: int
    most: int
    widths: int  # how many; the narrowest is _NARROWEST
    lengths: int  # how many; the shortest is _SHORTEST


_THICK = _Strokes(fewest=1, most=5, widths=100, lengths=200)
_THIN = _Strokes(fewest=4, most=50, widths=10, lengths=40)
_NARROWEST, _SHORTEST = 5, 10
_MOST_SEGMENTS = 5
_MAX_ANGLE = 4  # whole radians from the vertical: 0, 1, 2, 3

_BOX_SHARE = 0.5  # of thick masks; the others have strokes
_MOST_BOXES = 3
_BOX_SIDES = (30, 150)
_BOX_MARGIN = 10  # to the edges of the picture


def _thick(size: Size, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < _BOX_SHARE:
        return _until_half_is_kept(lambda: _boxes(size, rng))
    return _until_half_is_kept(lambda: _strokes(size, rng, _THICK))


def _thin(size: Size, rng: np.random.Generator) -> np.ndarray:
    return _until_half_is_kept(lambda: _strokes(size, rng, _THIN))


def _until_half_is_kept(draw: Callable[[], np.ndarray]) -> np.ndarray:
    mask = draw()
    while 2 * np.count_nonzero(mask) < mask.size:
        mask = draw()
    return mask


def _strokes(size: Size, rng: np.random.Generator, strokes: _Strokes) -> np.ndarray:
    picture = Image.new("L", size, KEEP)
    draw = ImageDraw.Draw(picture)
    for number in range(rng.integers(strokes.fewest, strokes.most + 1)):
        lean = 1 if number % 2 else -1  # the first to the left, the second to the right, ...
        _stroke(draw, size, rng, strokes, lean)
    return np.array(picture)


def _stroke(
    draw: ImageDraw.ImageDraw, size: Size, rng: np.random.Generator, strokes: _Strokes, lean: int
) -> None:
    scale = _scale(size)
    here = rng.integers(0, size)  # x, y
    for _ in range(rng.integers(1, _MOST_SEGMENTS + 1)):
        angle = lean * rng.integers(_MAX_ANGLE)
        length = scale * (_SHORTEST + rng.integers(strokes.lengths))
        # An even width is drawn one pixel wider: so are the published ones.
        width = scale * ((_NARROWEST + rng.integers(strokes.widths) + 1) // 2 * 2 + 1)
        step = length * np.array([math.sin(angle), math.cos(angle)])
        there = np.clip(np.rint(here + step).astype(int), 0, np.array(size) - 1)
        _segment(draw, here, there, max(1, round(width)))
        here = there


def _segment(draw: ImageDraw.ImageDraw, here: np.ndarray, there: np.ndarray, width: int) -> None:
    draw.line((*here.tolist(), *there.tolist()), fill=FILL_IN, width=width)
    for x, y in (here.tolist(), there.tolist()):
        draw.circle((x, y), (width - 1) / 2, fill=FILL_IN)


def _boxes(size: Size, rng: np.random.Generator) -> np.ndarray:
    mask, scale = _all_of(KEEP, size), _scale(size)
    margin = round(scale * _BOX_MARGIN)
    shortest, longest = (round(scale * side) for side in _BOX_SIDES)
    for _ in range(rng.integers(1, _MOST_BOXES + 1)):
        spans = [_span(side, margin, shortest, longest, rng) for side in size]
        mask[spans[1], spans[0]] = FILL_IN
    return mask


def _span(side: int, margin: int, shortest: int, longest: int, rng: np.random.Generator) -> slice:
    """A random piece of a side of the picture; of a short one, no more than there is."""
    room = side - 2 * margin
    length = min(rng.integers(shortest, longest + 1), max(room, 1))
    start = margin + rng.integers(max(room - length, 0) + 1)
    return slice(start, start + length)


def _scale(size: Size) -> float:
    return math.sqrt(size[0] * size[1]) / 256


# ---- Our own ----

_FEWEST_LINES, _MOST_LINES = 4, 10
_LINE_WIDTHS = (4, 12)


def _box(size: Size, rng: np.random.Generator) -> np.ndarray:
    width, height = size
    columns = _span(width, 0, width // 4, width // 2, rng)
    rows = _span(height, 0, height // 4, height // 2, rng)
    mask = _all_of(KEEP, size)
    mask[rows, columns] = FILL_IN
    return mask


def _lines(size: Size, rng: np.random.Generator) -> np.ndarray:
    picture = Image.new("L", size, KEEP)
    draw = ImageDraw.Draw(picture)
    narrowest, widest = _LINE_WIDTHS
    for _ in range(rng.integers(_FEWEST_LINES, _MOST_LINES + 1)):
        width = max(1, round(_scale(size) * rng.integers(narrowest, widest + 1)))
        edges = rng.choice(len(SIDES), size=2, replace=False)
        here, there = (_point_on(SIDES[edge], size, rng) for edge in edges)
        _segment(draw, here, there, width)
    return np.array(picture)


def _point_on(edge: str, size: Size, rng: np.random.Generator) -> np.ndarray:
    x, y = rng.integers(0, size)
    width, height = size
    at = {"left": (0, y), "right": (width - 1, y), "top": (x, 0), "bottom": (x, height - 1)}
    return np.array(at[edge])


KINDS: dict[str, Draw] = {
    "thick": _thick,
    "thin": _thin,
    "ev2li": lambda size, rng: _only(np.s_[1::2], size),
    "nn2": lambda size, rng: _only(np.s_[1::2, 1::2], size),
    "genhalf": lambda size, rng: _half(size, rng, side="right"),
    "ex64": lambda size, rng: _expand(size, rng, keep=0.25),
    "box": _box,
    "lines": _lines,
    "half": _half,
    "expand": _expand,
}
