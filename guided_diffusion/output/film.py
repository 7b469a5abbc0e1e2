"""Watch the process: the pictures on the way to a result, and an animation of them.

For a picture "sub/x.png", in a folder of the run:

    sub/x/000120_x0.png   the x_0 that the network predicts, after 120 transitions
    sub/x/000120_xt.png   the noisy picture x_t, after the same transitions
    sub/x.gif, sub/x.webp both side by side above the schedule, as an animation
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.config import UserError
from guided_diffusion.images.files import encode_png, read_rgb
from guided_diffusion.images.tensors import to_bytes
from guided_diffusion.machine import storage

T = TypeVar("T")
Frame = tuple[int, Image.Image, Image.Image]  # transitions done, x_0, x_t

# ---- Which pictures, and where ---------------------------------------------------------------


def due_positions(times: Sequence[int], every: int) -> list[int]:
    """After how many transitions the process is shown, ascending.

    A step up in time evaluates no network, and gives nothing to show. These are the first
    evaluations that end at or after each multiple of `every`, and the last one.
    times: what the sampler walks, see `scheduler`. every: transitions, at least 1.
    """
    ends = [end for end, (t, u) in enumerate(pairwise(times), start=1) if u <= t]
    due = [end for before, end in pairwise([0, *ends]) if end // every > before // every]
    return sorted({*due, ends[-1]})


_FRAME = re.compile(r"(\d{6,})_(?:x0|xt)\.png")

# Written as "=" and a number in the names of folders: what a blob store's list takes for wildcards,
# and the dot of what looks like a file written here. So the folder of the picture "x.gif.png" is
# not where the animation of "x.png" is.
_ENCODED = re.compile(r"[=*?\[\]]|\.(?=(?:gif|webp|png)(?:/|$))", re.IGNORECASE)


@dataclass(frozen=True)
class FilmLog:
    """Writes the process of each picture. Its methods raise OSError where that is impossible."""

    folder: str  # for all pictures; may be remote
    every: int  # transitions from one frame to the next, see `due_positions`
    times: Sequence[int]  # what the sampler walks, see `scheduler`
    noise_words: Sequence[str]  # how noisy x_t is, by time: "noise 80 %"

    def begin(self, name: str) -> None:
        """Remove what an earlier run wrote of a picture, "sub/x.png", which starts afresh."""
        for path in (*self._frames(name), self._gif(name), self.animation(name)):
            storage.remove(path)

    def is_due(self, position: int) -> bool:
        """Whether the evaluation that ends after so many transitions is to be written."""
        return position in self._due

    def write(
        self, names: Sequence[str], position: int, x_t: torch.Tensor, pred_x0: torch.Tensor
    ) -> None:
        """Write a frame of each picture of a batch, if it is due.

        position: transitions done. x_t, pred_x0: (B, 3, H, W), about [-1, 1], one for each name.
        """
        if not self.is_due(position):
            return
        for kind, tensor in (("x0", pred_x0), ("xt", x_t)):
            for name, pixels in zip(names, to_bytes(tensor), strict=True):
                storage.write_atomically(self._frame(name, position, kind), encode_png(pixels))

    def finish(self, name: str) -> None:
        """Make the animations of a picture of the frames that are there; of none, nothing.

        Warns of frames that cannot be read, and does without.
        """
        pictures_at = Counter(self._frames(name).values())
        complete = sorted(position for position, count in pictures_at.items() if count == 2)
        frames = [*self._read(name, spread(complete, WEBP_FRAMES))]
        if not frames:
            return
        stage = Stage(self.times, self.noise_words, frames[0][1].size)
        drawn = [stage.draw(*frame) for frame in frames]
        storage.write_atomically(self._gif(name), encode_gif(drawn))
        storage.write_atomically(self.animation(name), encode_webp(drawn))

    def _read(self, name: str, positions: Sequence[int]) -> Iterator[Frame]:
        for position in positions:
            paths = (self._frame(name, position, kind) for kind in ("x0", "xt"))
            try:
                yield (position, *map(read_rgb, paths))
            except UserError as error:
                warnings.warn(str(error), UserWarning, stacklevel=2)

    def animation(self, name: str) -> str:
        """The path of a picture's animation as WebP; the GIF lies beside it."""
        return f"{self._stem(name)}.webp"

    def _gif(self, name: str) -> str:
        return f"{self._stem(name)}.gif"

    def _frame(self, name: str, position: int, kind: str) -> str:
        return f"{self._stem(name)}/{position:06}_{kind}.png"

    def _stem(self, name: str) -> str:
        encoded = _ENCODED.sub(lambda match: f"={ord(match[0]):02X}", name.removesuffix(".png"))
        return f"{self.folder.rstrip('/')}/{encoded}"

    def _frames(self, name: str) -> dict[str, int]:
        """The paths of a picture's frames that are there, and after how many transitions each is.

        In their folder may be others, of pictures in a subfolder of the picture's name.
        """
        stem = self._stem(name)
        found = {path: _FRAME.fullmatch(path[len(stem) + 1 :]) for path in storage.list_sizes(stem)}
        return {path: int(match[1]) for path, match in found.items() if match}

    @cached_property
    def _due(self) -> frozenset[int]:
        return frozenset(due_positions(self.times, self.every))


# ---- One frame -------------------------------------------------------------------------------

WHITE, INK, GREY = (255, 255, 255), (40, 44, 52), (120, 126, 136)
WALKED, AHEAD, MARK = (38, 84, 148), (190, 202, 218), (232, 80, 24)  # of the curve

SMALLEST, LARGEST = 160, 256  # longer side of a picture; others are enlarged or reduced
MARGIN, LINE, CURVE = 16, 22, 96  # pixels: around everything; a line of text; the curve's height
RADIUS = 5  # of the mark
LABELS = ("estimate of the result", "noisy picture")
FINER = 3  # lines are drawn so many times as large, and reduced, so that they are smooth


class Stage:
    """What all frames of an animation share: the labels, and the schedule's curve."""

    def __init__(
        self, times: Sequence[int], noise_words: Sequence[str], picture_size: tuple[int, int]
    ):
        """times, noise_words: see `FilmLog`. picture_size: width and height of the pictures."""
        self.times, self.noise_words = times, noise_words
        self.shown = shown_size(picture_size)
        self.column = max(self.shown[0], SMALLEST)  # a narrow picture has room for its label
        self.top = self.shown[1] + LINE + 2 * MARGIN  # of the curve
        self.size = (2 * self.column + 3 * MARGIN, self.top + CURVE + MARGIN)
        self.font, self.small_font = ImageFont.load_default(15), ImageFont.load_default(12)
        self.walked, self.ahead = self._background(WALKED), self._background(AHEAD)
        self.mark = _disc(RADIUS)

    def point(self, position: int) -> tuple[float, float]:
        """Where on a frame the curve is after so many transitions: x and y, in pixels."""
        walked = position / (len(self.times) - 1)
        fallen = (self.times[0] - self.times[position]) / (self.times[0] + 1)
        return MARGIN + walked * (self.size[0] - 2 * MARGIN), self.top + fallen * CURVE

    def draw(self, position: int, x_0: Image.Image, x_t: Image.Image) -> Image.Image:
        """The frame after so many transitions, RGB. x_0, x_t: RGB pictures of picture_size."""
        frame = self.ahead.copy()
        x, y = map(round, self.point(position))
        frame.paste(self.walked.crop((0, self.top, x, self.size[1])), (0, self.top))
        frame.paste(MARK, (x - RADIUS, y - RADIUS), self.mark)
        for left, picture in zip(self._lefts(), (x_0, x_t), strict=True):
            shown = picture.resize(self.shown, Image.Resampling.BICUBIC)
            frame.paste(shown, (left, MARGIN + LINE))
        pen, right = ImageDraw.Draw(frame), self.size[0] - MARGIN
        progress = f"transition {position:,} of {len(self.times) - 1:,}"
        pen.text((right, self.top), self.caption(position), INK, self.font, "ra")
        pen.text((right, self.top + LINE), progress, GREY, self.small_font, "ra")
        return frame

    def caption(self, position: int) -> str:
        """The time after so many transitions, and the noise in x_t, in words."""
        t = self.times[position]
        if t == self.times[-1]:
            return "finished"
        return f"t = {t} · {self.noise_words[t]}"

    def _lefts(self) -> tuple[int, int]:
        return MARGIN, 2 * MARGIN + self.column

    def _background(self, colour: tuple[int, int, int]) -> Image.Image:
        """A frame without pictures, its curve in one colour."""
        width, height = self.size
        large = Image.new("RGB", (FINER * width, FINER * height), WHITE)
        points = [self.point(position) for position in range(len(self.times))]
        line = [(FINER * x, FINER * y) for x, y in points]
        ImageDraw.Draw(large).line(line, colour, width=FINER + 1)
        background = large.reduce(FINER)
        pen = ImageDraw.Draw(background)
        for left, label in zip(self._lefts(), LABELS, strict=True):
            pen.text((left, MARGIN), label, INK, self.small_font)
        corner = MARGIN, self.top + CURVE
        pen.text(corner, "time t, against transitions", GREY, self.small_font, "ld")
        return background


def shown_size(picture_size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in an animation of pictures of this width and height, in pixels."""
    longest = max(picture_size)
    shown = min(longest * math.ceil(SMALLEST / longest), LARGEST)
    width, height = (max(1, round(side * shown / longest)) for side in picture_size)
    return width, height


def _disc(radius: int) -> Image.Image:
    """A mask of the shape of a disc, smooth at its edge."""
    side = FINER * (2 * radius + 1)
    large = Image.new("L", (side, side))
    ImageDraw.Draw(large).ellipse((0, 0, side - 1, side - 1), 255)
    return large.reduce(FINER)


# ---- The animations --------------------------------------------------------------------------

# At most so many frames: noise does not compress, least of all in a GIF.
WEBP_FRAMES, GIF_FRAMES = 100, 40
PLAYED, HELD, LONGEST = 8000, 4000, 1000  # ms: all frames but the last; the last; one at most
LEFT_COLOURS, RIGHT_COLOURS = 128, 32  # of a GIF: smooth pictures need more than noise does


def spread(items: Sequence[T], most: int) -> Sequence[T]:
    """All, or so many of them at equal distances, the last one among them."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most - 1] for i in range(1, most + 1)]


def durations(number: int) -> list[int]:
    """How long each of so many frames is shown, in ms; whole hundredths of a second, as GIF has."""
    each = min(PLAYED // max(number - 1, 1) // 10 * 10, LONGEST)
    return [each] * (number - 1) + [HELD]


def encode_webp(frames: Sequence[Image.Image]) -> bytes:
    """RGB frames of equal size -> an animation that rests at its end and starts again."""
    return _encode(frames, "WEBP", quality=50, method=2)


def encode_gif(frames: Sequence[Image.Image]) -> bytes:
    """As `encode_webp`; of a long process fewer frames, all in the same colours."""
    frames = spread(frames, GIF_FRAMES)
    palette = _palette(frames)
    return _encode([f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames], "GIF")


def _encode(frames: Sequence[Image.Image], kind: str, **options: int) -> bytes:
    file, shown = io.BytesIO(), durations(len(frames))
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=shown, loop=0, **options
    )
    return file.getvalue()


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """A palette for all frames, so that nothing flickers."""
    width, height = frames[0].size
    left = _main_colours(frames, (0, 0, width // 2, height), LEFT_COLOURS)
    right = _main_colours(frames, (width // 2, 0, width, height), RIGHT_COLOURS)
    palette = Image.new("P", (1, 1))
    palette.putpalette(left + right + _drawn_colours())
    return palette


def _main_colours(
    frames: Sequence[Image.Image], box: tuple[int, int, int, int], number: int
) -> list[int]:
    """So many colours for a part of the frames: r, g, b, r, g, b, …"""
    some = spread(frames, 16)
    width, height = (box[2] - box[0]) // 2, (box[3] - box[1]) // 2
    sample = Image.new("RGB", (width, height * len(some)))
    for row, frame in enumerate(some):
        part = frame.resize((width, height), Image.Resampling.NEAREST, box)
        sample.paste(part, (0, row * height))
    return sample.quantize(number).getpalette()[: 3 * number]


def _drawn_colours() -> list[int]:
    """What text, curve and mark consist of, their smooth edges included: r, g, b, r, g, b, …"""
    mixed = [
        round(share * level + (1 - share) * white)
        for colour in (INK, GREY, WALKED, AHEAD, MARK)
        for share in (0.25, 0.5, 0.75, 1)
        for level, white in zip(colour, WHITE, strict=True)
    ]
    return [*WHITE, *mixed]
