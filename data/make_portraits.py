"""Draw frontal cartoon portraits, the training and demo data of the embedded model.

Only one half of each picture is drawn, at eight times its size; it is reduced and then mirrored.
So every portrait is symmetric about its vertical axis to the byte (face, hair, clothes,
background and light), and a completion of one half can be scored against the truth. A portrait
depends on (seed, index) alone: asking for more of them never changes the earlier ones.

    python data/make_portraits.py data/portraits --number 30000
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

Colour = tuple[int, int, int]
Point = tuple[float, float]  # (distance from the axis, height from the top), frame = 64 units
Fill = Colour | tuple[Colour, Colour]  # one colour, or a fade from top to bottom

FRAME = 64  # units along one side of the picture, whatever its size in pixels
OVERSAMPLING = 8


def palette(colours: str) -> tuple[Colour, ...]:
    """Return RGB colours that are written in hexadecimal."""
    return tuple(tuple(bytes.fromhex(colour)) for colour in colours.split())


SKINS = palette("ffe0c8 fad3b7 f4c4a0 e8b28a d99e72 c2855c a46b47 865438 68402c")
HAIRS = palette(
    "26202a 3a2824 543628 764a2e 986238 c48e4c ecc474 "
    "b24c28 d66a36 9e9ca4 e4e2e2 e27094 467eac 7e5aaa"
)
HAIR_WEIGHTS = (14, 14, 12, 10, 9, 8, 8, 6, 6, 6, 5, 3, 3, 3)
CLOTHES = palette(
    "e85c54 f49854 f8c85c 70b06c 34806c 40a0b0 4878be "
    "2c3e68 7c62b2 d06894 963e4c eeeae2 78808c 3c3a44"
)
BACKGROUNDS = palette(
    "ffe2c8 ffd4ce fce8a8 ceeac4 b2e2d6 b6def2 c4cef6 "
    "deccf2 f6cee4 f0ece4 629ca8 707eb2 de8270 86a880"
)
EYES = palette("5c3a26 3a2822 8e6230 528a4e 4082ba 687e92 2c8c88")
LIPS = palette("c45454 d64860 a83854 e26e6e")
FRAMES = palette("2c2834 78462c be3c42 365a96 cea250")
GOLD = (244, 200, 96)
WHITE = (255, 255, 255)
INK = (46, 30, 48)  # the colour that shadows lean to


@dataclass(frozen=True)
class Cut:
    """One hair style: how far the hair stands off the head, where it ends, what is added."""

    lift: float  # units above the skull
    side: float  # units beside the temples
    ends: float  # height at which the hair ends
    fringes: tuple[str, ...] = ("swept", "peak")
    flare: float = 0.0  # how much wider the ends are than the temples
    extra: str = ""  # "", "bun", "buns", "pigtails", "curls" or "waves"

    @property
    def is_long(self) -> bool:
        return self.ends > 35


CUTS = {
    "bald": Cut(0, 0, 0),
    "buzz": Cut(1.0, 0.5, 27, ("swept", "peak")),
    "crop": Cut(3.4, 1.0, 28, ("swept", "peak", "blunt", "spiky")),
    "quiff": Cut(6.4, 0.6, 28, ("swept", "peak")),
    "curly": Cut(3.6, 1.2, 27, ("swept",), extra="curls"),
    "afro": Cut(5.0, 4.0, 30, ("swept",), extra="curls"),
    "bob": Cut(4.4, 2.6, 43, ("blunt", "parted", "swept"), 1.6),
    "long": Cut(4.2, 2.2, 60, ("parted", "blunt", "swept"), 2.8),
    "wavy": Cut(4.4, 2.6, 57, ("parted", "swept"), 2.0, "waves"),
    "bun": Cut(2.6, 0.7, 28, ("swept", "parted", "blunt"), extra="bun"),
    "buns": Cut(3.0, 0.8, 28, ("parted", "blunt"), extra="buns"),
    "pigtails": Cut(3.4, 1.0, 29, ("parted", "blunt"), extra="pigtails"),
}
BEARDED = ("bald", "buzz", "crop", "quiff", "curly", "afro")
UNDER_HATS = ("bald", "crop", "bob", "long", "wavy", "pigtails")


@dataclass(frozen=True)
class Traits:
    """All that tells one portrait from another; lengths in units of 1/64 of the picture."""

    skin: Colour
    hair: Colour
    cloth: Colour
    cloth_2: Colour
    background: Colour
    backdrop: str
    light: float  # brightness gained at the top and lost at the bottom, as a fraction
    warmth: float  # red gained and blue lost, as a fraction
    width: float
    jaw: float
    chin: float
    chin_y: float
    cut: str
    fringe: str
    lift: float
    ends: float
    brow: tuple[float, float, float]  # thickness, arch, tilt
    eye: Colour
    eye_shape: str
    eye_size: float
    eye_x: float
    lashes: bool
    nose: tuple[float, float]  # half width, height
    mouth: str
    mouth_width: float
    lip: Colour
    blush: float
    freckles: bool
    beard: str
    glasses: str
    frame: Colour
    hat: str
    hat_colour: Colour
    outfit: str
    earrings: bool


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from a to b."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def darker(colour: Colour, share: float = 0.2) -> Colour:
    return mix(colour, INK, share)


def lighter(colour: Colour, share: float = 0.2) -> Colour:
    return mix(colour, WHITE, share)


# ---------------------------------------------------------------------------- choosing


def pick(rng: np.random.Generator, options: Sequence, weights: Sequence[float] | None = None):
    """Return one of the options, all equally likely where no weights are given."""
    shares = None if weights is None else np.array(weights) / sum(weights)
    return options[rng.choice(len(options), p=shares)]


def pick_apart(
    rng: np.random.Generator,
    palette: Sequence[Colour],
    others: Sequence[Colour],
    apart: float,
    weights: Sequence[float] | None = None,
) -> Colour:
    """Return a colour of the palette at least `apart` (RGB distance) from all the others.

    Where no colour is that far from them, the farthest is returned.
    """
    gaps = np.array(palette, float)[:, None] - np.array(others, float)
    distances = np.linalg.norm(gaps, axis=2).min(axis=1)
    clear = distances >= min(apart, distances.max())
    return pick(rng, palette, clear * np.array(weights or [1.0] * len(palette)))


def jitter(rng: np.random.Generator, colour: Colour, reach: int = 5) -> Colour:
    """Return the colour moved a little, so that palettes do not look like a paint box."""
    return tuple(int(np.clip(c + rng.integers(-reach, reach + 1), 0, 255)) for c in colour)


def choose_colours(rng: np.random.Generator) -> dict[str, Colour]:
    """Choose colours that stand clear of their neighbours in the picture."""
    skin = pick(rng, SKINS)
    hair = pick_apart(rng, HAIRS, [skin], 62, HAIR_WEIGHTS)
    cloth = pick_apart(rng, CLOTHES, [skin, hair], 70)
    cloth_2 = pick_apart(rng, CLOTHES, [skin, cloth], 90)
    background = pick_apart(rng, BACKGROUNDS, [skin, hair, cloth], 60)
    hat_colour = pick_apart(rng, CLOTHES, [skin, hair, background], 80)
    frame = pick_apart(rng, FRAMES, [skin], 95)
    names = ("skin", "hair", "cloth", "cloth_2", "background", "hat_colour", "frame")
    colours = (skin, hair, cloth, cloth_2, background, hat_colour, frame)
    return {name: jitter(rng, colour) for name, colour in zip(names, colours, strict=True)}


def choose_head(rng: np.random.Generator) -> dict:
    """Choose the hair style and what depends on it: hat, beard, lashes, earrings."""
    hat = pick(rng, ("none", "beanie", "cap", "brim", "scarf"), (72, 9, 8, 7, 4))
    cut = pick(rng, tuple(CUTS) if hat == "none" else UNDER_HATS)
    style = CUTS[cut]
    can_have_beard = cut in BEARDED and hat != "scarf"
    beard = pick(
        rng,
        ("none", "full", "stubble", "moustache", "goatee"),
        (50, 20, 12, 10, 8) if can_have_beard else (1, 0, 0, 0, 0),
    )
    soft = beard == "none" and rng.random() < (0.8 if cut not in BEARDED else 0.3)
    return {
        "hat": hat,
        "cut": cut,
        "fringe": pick(rng, style.fringes),
        "lift": style.lift * rng.uniform(0.85, 1.15),
        "ends": style.ends + rng.uniform(-2, 2) * style.is_long,
        "beard": beard,
        "lashes": soft,
        "mouth": pick(
            rng, ("smile", "open", "calm", "lips"), (35, 25, 15, 45) if soft else (50, 28, 22, 0)
        ),
        "earrings": soft and rng.random() < 0.5,
    }


def choose_traits(rng: np.random.Generator) -> Traits:
    """Choose every trait of one portrait from its own generator."""
    return Traits(
        **choose_colours(rng),
        **choose_head(rng),
        backdrop=pick(rng, ("fade", "glow", "disc"), (45, 35, 20)),
        light=rng.uniform(0.0, 0.08),
        warmth=rng.uniform(-0.035, 0.035),
        width=rng.uniform(14.4, 16.2),
        jaw=rng.uniform(0.76, 0.92),
        chin=rng.uniform(0.32, 0.5),
        chin_y=rng.uniform(47.5, 50.0),
        brow=(rng.uniform(0.9, 1.9), rng.uniform(0.2, 1.5), rng.uniform(-0.7, 0.1)),
        eye=pick(rng, EYES),
        eye_shape=pick(rng, ("round", "almond")),
        eye_size=rng.uniform(0.92, 1.12),
        eye_x=rng.uniform(6.3, 7.1),
        nose=(rng.uniform(1.7, 2.6), rng.uniform(36.4, 37.8)),
        mouth_width=rng.uniform(4.0, 5.6),
        lip=pick(rng, LIPS),
        blush=rng.uniform(0.15, 0.5),
        freckles=rng.random() < 0.1,
        glasses=pick(rng, ("none", "round", "square"), (72, 15, 13)),
        outfit=pick(rng, ("crew", "vee", "shirt", "roll", "hood", "jacket")),
    )


# ---------------------------------------------------------------------------- the pen


def curve(points: Sequence[Point], steps: int = 10) -> np.ndarray:
    """Return a smooth open curve (Catmull-Rom) through the points, shape [n, 2].

    An end on the axis continues into its mirror image, so that the whole has no kink there.
    """
    p = np.array(points, float)
    before, after = (p[1] * (-1, 1), p[-2] * (-1, 1))
    before = before if p[0, 0] == 0 else p[0]
    after = after if p[-1, 0] == 0 else p[-1]
    p = np.vstack([before, p, after])
    p0, p1, p2, p3 = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    spline = p1 + 0.5 * t * (
        p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0))
    )
    return np.vstack([spline.reshape(-1, 2), p[-2]])


class Pen:
    """Paints the half picture right of the axis, in units of 1/64 of the picture.

    Shapes that cross the axis are cut there; mirroring completes them.
    """

    def __init__(self, size: int) -> None:
        self.unit = size * OVERSAMPLING / FRAME
        self.canvas = Image.new("RGB", (size * OVERSAMPLING // 2, size * OVERSAMPLING))
        self.draw = ImageDraw.Draw(self.canvas)

    def box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, ...]:
        return tuple(v * self.unit for v in (x - rx, y - ry, x + rx, y + ry))

    def pixels(self, points: np.ndarray) -> list[Point]:
        return [tuple(point) for point in (points * self.unit).tolist()]

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.draw.ellipse(self.box(x, y, rx, ry), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Paint a smooth stroke with round ends."""
        path = curve(points)
        self.draw.line(self.pixels(path), colour, round(width * self.unit), joint="curve")
        for x, y in (path[0], path[-1]):
            self.ellipse(x, y, width / 2, width / 2, colour)

    def mask(self, *pieces: Sequence[Point], shift: float = 0.0) -> Image.Image:
        """Return the area inside curves laid end to end, moved down by `shift`."""
        mask = Image.new("L", self.canvas.size)
        path = np.vstack([curve(piece) for piece in pieces]) + (0, shift)
        ImageDraw.Draw(mask).polygon(self.pixels(path), fill=255)
        return mask

    def discs(self, discs: Sequence[tuple[float, float, float]], shift: float = 0) -> Image.Image:
        """Return the area covered by discs (x, y, radius)."""
        mask = Image.new("L", self.canvas.size)
        draw = ImageDraw.Draw(mask)
        for x, y, radius in discs:
            draw.ellipse(self.box(x, y + shift, radius, radius), fill=255)
        return mask

    def paint(self, mask: Image.Image, fill: Fill, strength: float = 1.0) -> None:
        """Paint the area of a mask with one colour or a fade, opaque at strength 1."""
        area = mask.getbbox()
        if area is None:
            return
        mask = mask.crop(area)
        if strength < 1:
            mask = mask.point([round(v * strength) for v in range(256)])
        if isinstance(fill[0], tuple):
            fill = fade(*fill, mask.size)
        self.canvas.paste(fill, area, mask)

    def shape(self, *pieces: Sequence[Point], fill: Fill) -> None:
        """Paint the area inside curves laid end to end."""
        self.paint(self.mask(*pieces), fill)

    def glow(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, strength: float
    ) -> None:
        """Paint a soft spot, strongest in its middle."""
        left, top, right, bottom = (round(v) for v in self.box(x, y, rx, ry))
        spot = Image.fromarray(SPOT).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        mask = Image.new("L", self.canvas.size)
        mask.paste(spot, (left, top))
        self.paint(mask, colour, strength)


def fade(top: Colour, bottom: Colour, size: tuple[int, int]) -> Image.Image:
    """Return a vertical fade between two colours."""
    column = np.linspace(top, bottom, 64)[:, None].round().astype(np.uint8)
    return Image.fromarray(column).resize(size, Image.Resampling.BILINEAR)


def soft_spot(side: int = 48) -> np.ndarray:
    """Return a round bump, 255 in the middle and 0 at the rim, shape [side, side]."""
    axis = np.linspace(-1, 1, side)
    square = np.clip(1 - axis[:, None] ** 2 - axis**2, 0, 1)
    return (255 * square**2).round().astype(np.uint8)


SPOT = soft_spot()


# ---------------------------------------------------------------------------- the parts


def paint_background(pen: Pen, t: Traits) -> None:
    top, bottom = lighter(t.background, 0.18), darker(t.background, 0.1)
    pen.canvas.paste(fade(top, bottom, pen.canvas.size))
    if t.backdrop == "glow":
        pen.glow(0, 30, 44, 44, lighter(t.background, 0.75), 0.8)
    if t.backdrop == "disc":
        pen.ellipse(0, 33, 28, 28, lighter(t.background, 0.35))


def head_outline(t: Traits) -> list[Point]:
    w, end = t.width, t.chin_y
    skull = [(0, 11.5), (w * 0.62, 14), (w * 0.97, 22), (w, 30), (w * (t.jaw + 1) / 2, 38)]
    return [*skull, (w * t.jaw * 0.86, end - 5), (w * t.chin, end - 0.9), (0, end)]


def paint_neck(pen: Pen, t: Traits) -> None:
    neck = pen.mask(
        [(0, 40), (6.2, 40)], [(6.2, 40), (6.2, 49), (7.6, 53.5), (13, 56)], [(13, 62), (0, 62)]
    )
    pen.paint(neck, darker(t.skin, 0.06))
    shadow = pen.mask(head_outline(t), shift=3.2)
    pen.paint(ImageChops.darker(neck, shadow), darker(t.skin, 0.24))


def paint_clothes(pen: Pen, t: Traits) -> None:
    """Paint shoulders with one of six necklines."""
    fill = (lighter(t.cloth, 0.06), darker(t.cloth, 0.12))
    pointed = {"vee": (7.4, 62.5), "shirt": (6.6, 60.5), "jacket": (8.6, 66)}
    start, dip = pointed.get(t.outfit, (7.6, 57.6))
    neckline = [(start, 52.8), (0, dip)]
    if t.outfit not in pointed:
        neckline.insert(1, (start * 0.75, 55.8))
    if t.outfit == "jacket":
        pen.shape([(0, 56.5), (5.5, 55), (8.5, 52)], [(16, 66), (0, 66)], fill=lighter(t.cloth_2))
    shoulder = [(30.5, 65), (27, 58.5), (19, 55.2), (start, 52.6)]
    pen.shape([(0, 66), (31, 66)], shoulder, neckline, fill=fill)
    paint_collar(pen, t, neckline)


def paint_collar(pen: Pen, t: Traits, neckline: list[Point]) -> None:
    if t.outfit == "crew":
        pen.line(neckline, 1.2, darker(t.cloth, 0.25))
    elif t.outfit == "vee":
        pen.line(neckline, 1.2, lighter(t.cloth, 0.35))
    elif t.outfit == "shirt":
        edges = [(6.2, 51), (0, 58.5)], [(4, 62.5), (10.2, 55.5)], [(10.2, 55.5), (6.2, 51)]
        pen.shape(*edges, fill=lighter(t.cloth, 0.45))
        pen.line([(0.0, 60), (0, 66)], 0.8, darker(t.cloth, 0.25))
    elif t.outfit == "roll":
        edges = [(0, 52.6), (4.5, 51.6), (7.2, 49.6)], [(8.2, 55), (5, 57.6), (0, 58.4)]
        pen.shape(*edges, fill=(lighter(t.cloth, 0.16), darker(t.cloth, 0.1)))
    elif t.outfit == "hood":
        pen.line([(8.4, 51.2), (9.6, 54.5), (6, 58), (0, 60.5)], 3.4, darker(t.cloth, 0.16))
        pen.line([(3.2, 60), (3.4, 63.5)], 0.9, lighter(t.cloth, 0.6))
    elif t.outfit == "jacket":
        edges = [(8.6, 51.8), (12.4, 55.5), (10.5, 59)], [(12, 60.4), (1, 65.6)]
        pen.shape(*edges, fill=darker(t.cloth, 0.22))


def paint_ears(pen: Pen, t: Traits) -> None:
    x = t.width + 0.3
    pen.ellipse(x, 31.5, 2.5, 3.7, darker(t.skin, 0.05))
    pen.ellipse(x + 0.1, 31.7, 1.3, 2.3, darker(t.skin, 0.2))


def paint_earrings(pen: Pen, t: Traits) -> None:
    """Paint earrings, unless long hair covers the ears."""
    if t.earrings and not CUTS[t.cut].is_long:
        pen.ellipse(t.width + 1.0, 36.4, 1.15, 1.3, GOLD)


def paint_face(pen: Pen, t: Traits) -> Image.Image:
    """Paint the bare face and return its area."""
    face = pen.mask(head_outline(t))
    pen.paint(face, (lighter(t.skin, 0.06), darker(t.skin, 0.06)))
    rose = mix(t.skin, (236, 84, 92), 0.3 + 0.3 * t.skin[0] / 255)
    pen.glow(t.width * 0.6, 38.2, 5.2, 3.8, rose, t.blush)
    if t.freckles:
        for x, y in ((7.6, 36.2), (9.6, 37.2), (11.2, 35.8), (8.4, 38.6)):
            pen.ellipse(x, y, 0.42, 0.42, darker(t.skin, 0.32))
    return face


def paint_eyes(pen: Pen, t: Traits) -> None:
    x, y = t.eye_x, 31.0
    rx = (3.0 if t.eye_shape == "almond" else 2.75) * t.eye_size
    ry = (2.05 if t.eye_shape == "almond" else 2.6) * t.eye_size
    inner, outer = (x - rx, y + 0.35), (x + rx, y)
    upper = [(x - rx * 0.55, y - ry * 0.75), (x, y - ry), (x + rx * 0.6, y - ry * 0.72)]
    upper = [inner, *upper, outer]
    lower = [(x + rx * 0.5, y + ry * 0.78), (x, y + ry * 0.92), (x - rx * 0.55, y + ry * 0.75)]
    white = pen.mask(upper, [outer, *lower, inner])
    pen.paint(white, (255, 253, 250))
    r = 1.85 * t.eye_size
    for radius, colour in ((r, darker(t.eye, 0.15)), (r * 0.78, t.eye), (r * 0.48, (24, 18, 26))):
        pen.paint(ImageChops.darker(white, pen.discs([(x, y - 0.1, radius)])), colour)
    pen.ellipse(x - 0.7, y - 0.85, 0.58, 0.58, WHITE)
    lid = darker(mix(t.skin, (60, 34, 34), 0.72), 0.3)
    pen.line(upper, 0.95 if t.lashes else 0.7, lid)
    if t.lashes:
        pen.line([(x + rx * 0.75, y - ry * 0.45), (x + rx + 1.1, y - 1.3)], 0.7, lid)


def paint_brows(pen: Pen, t: Traits) -> None:
    thickness, arch, tilt = t.brow
    x, y = t.eye_x, 26.7
    colour = mix(darker(t.hair, 0.3), t.skin, 0.12)
    path = [(x - 3.1, y + 0.4 + tilt), (x + 0.4, y - arch * 0.7), (x + 3.4, y + 0.5 - tilt)]
    pen.line(path, thickness, colour)


def paint_nose(pen: Pen, t: Traits) -> None:
    width, y = t.nose
    pen.ellipse(0, y + 0.3, width, 1.35, darker(t.skin, 0.24))
    pen.ellipse(0, y - 0.45, width + 0.25, 1.3, lighter(t.skin, 0.05))
    pen.glow(0, y - 1.6, 1.5, 3.6, lighter(t.skin, 0.5), 0.55)


def paint_mouth(pen: Pen, t: Traits) -> None:
    """Paint a smile, an open smile, a calm line, or full lips."""
    w, y = t.mouth_width, 42.0
    dark = mix(darker(t.skin, 0.5), (140, 30, 50), 0.5)
    if t.mouth == "smile":
        pen.line([(0, y + 1.3), (w * 0.6, y + 0.8), (w, y - 0.7)], 0.95, dark)
        pen.line([(0, y + 3.2), (1.6, y + 3)], 0.6, darker(t.skin, 0.16))
    elif t.mouth == "calm":
        pen.line([(0, y + 0.5), (w * 0.6, y + 0.4), (w * 0.85, y)], 1.0, dark)
        pen.line([(0, y + 2.4), (1.6, y + 2.2)], 0.6, darker(t.skin, 0.16))
    elif t.mouth == "open":
        paint_open_mouth(pen, w, y, dark)
    elif t.mouth == "lips":
        w *= 0.88
        lip = mix(t.lip, t.skin, 0.12)
        upper = [(0, y - 0.7), (1.2, y - 1.35), (w * 0.6, y - 0.7), (w, y - 0.1)]
        seam = [(w, y - 0.1), (w * 0.55, y + 0.65), (0, y + 0.6)]
        lower = [(0, y + 2.5), (w * 0.4, y + 2.2), (w * 0.75, y + 1.1), (w, y - 0.1)]
        pen.shape(lower, seam, fill=lighter(lip, 0.1))
        pen.shape(upper, seam, fill=darker(lip, 0.12))
        pen.line(seam, 0.5, darker(lip, 0.5))


def paint_open_mouth(pen: Pen, w: float, y: float, dark: Colour) -> None:
    upper = [(0, y - 0.3), (w * 0.55, y - 0.5), (w, y - 1.0)]
    lower = [(w, y - 1.0), (w * 0.8, y + 1.6), (w * 0.4, y + 3.0), (0, y + 3.3)]
    inside = pen.mask(upper, lower)
    pen.paint(inside, mix(dark, (90, 16, 36), 0.6))
    pen.paint(ImageChops.darker(inside, pen.discs([(0, y + 4.6, 2.6)])), (226, 104, 110))
    teeth = pen.mask(upper, [(w, y + 0.6), (w * 0.5, y + 0.95), (0, y + 1.1)])
    pen.paint(ImageChops.darker(inside, teeth), (255, 252, 246))


def paint_beard(pen: Pen, t: Traits, face: Image.Image) -> None:
    """Paint facial hair, kept inside the face but for a full beard's lower edge."""
    w, end = t.width, t.chin_y
    colour = mix(darker(t.hair, 0.08), t.skin, 0.1)
    if t.beard == "full":
        edge = [(0, end + 2.0), (w * 0.5, end + 0.8), (w * 0.86, end - 5), (w + 0.3, 37), (w, 30)]
        inner = [(w, 30), (w - 1.6, 34), (w * 0.72, 39.4), (5.6, 39.2), (0, 38.9)]
        pen.shape(edge, inner, fill=(colour, darker(colour, 0.14)))
        pen.ellipse(0, 43, 5.8, 3.0, mix(t.skin, colour, 0.08))
    elif t.beard == "stubble":
        cheek = [(w + 1, 33), (w * 0.86, 37.6), (6.5, 40.2), (3, 39), (0, 39.2)]
        area = pen.mask([(0, 52), (w + 1, 52)], [(w + 1, 52), (w + 1, 33)], cheek)
        pen.paint(ImageChops.darker(area, face), colour, 0.3)
    elif t.beard == "goatee":
        tuft = [(0, 45.2), (3.4, 45.6), (3.8, 47.5), (2.4, end + 0.7), (0, end + 1.4)]
        pen.shape(tuft, fill=colour)
    if t.beard in ("full", "moustache", "goatee"):
        upper = [(0, 38.9), (2.6, 38.7), (5.2, 40), (6.6, 42.2)]
        lower = [(6.6, 42.2), (4.2, 41.6), (2, 40.9), (0, 40.6)]
        pen.shape(upper, lower, fill=darker(colour, 0.08))


# ---------------------------------------------------------------------------- hair


def hairline(t: Traits) -> list[list[Point]]:
    """Return the edge between hair and forehead, from the temple to the axis."""
    w = t.width
    if t.fringe == "blunt":
        return [[(w - 2.0, 27.5), (w - 3.0, 24.6), (w * 0.4, 23.6), (0, 23.3)]]
    if t.fringe == "parted":
        return [[(w - 1.5, 27), (w * 0.76, 22.2), (w * 0.36, 17.6), (0, 13.8)]]
    if t.fringe == "peak":
        return [[(w - 1.6, 26), (w * 0.84, 20.2), (w * 0.5, 17.6), (0, 19.6)]]
    if t.fringe == "spiky":
        tips = [(w - 1.8, 26.5), (w * 0.74, 20.6), (w * 0.6, 24), (w * 0.42, 19.8)]
        tips += [(w * 0.26, 23.6), (w * 0.1, 19.6), (0, 21.5)]
        return [list(pair) for pair in zip(tips, tips[1:], strict=False)]
    return [[(w - 1.6, 26), (w * 0.86, 20.6), (w * 0.5, 17.3), (0, 16.4)]]


def crown(t: Traits) -> list[Point]:
    """Return the outer edge of the hair, from the axis over the head to the temple."""
    w, side, top = t.width, CUTS[t.cut].side, 11.5 - t.lift
    if t.cut == "quiff":
        return [(0, top), (w * 0.5, top + 0.6), (w * 0.88, top + 5), (w + side, 20), (w + side, 26)]
    return [(0, top), (w * 0.5, top + 1.5), (w * 0.88, top + 5.4), (w + side, 20), (w + side, 26)]


def lengths(t: Traits) -> list[list[Point]]:
    """Return the edge of the hair beside the face: down outside, back up inside."""
    w, cut, ends = t.width, CUTS[t.cut], t.ends
    outer = w + cut.side
    if not cut.is_long:
        return [[(outer, 26), (w + 0.5, ends)], [(w + 0.5, ends), (w - 1.1, ends + 0.8)]]
    outside = [(outer, 26), (outer + cut.flare * 0.5, (26 + ends) / 2), (outer + cut.flare, ends)]
    inside = [(w - 3.2, ends + 0.4), (w - 2.2, min(ends - 4, 44)), (w - 1.0, 34), (w - 1.4, 28)]
    return [outside, [outside[-1], (w + 0.4, ends + 1.2), inside[0]], inside]


def curls(t: Traits) -> list[tuple[float, float, float]]:
    """Return the discs of curly hair, from the top down to the ears."""
    afro = t.cut == "afro"
    w, reach, radius = t.width, (5.2 if afro else 1.6), (5.4 if afro else 3.7)
    angles = np.linspace(0, 1.72 if afro else 1.5, 7 if afro else 6)
    x = (w + reach - 1.0) * np.sin(angles)
    y = 25.5 - (14.6 + 0.6 * reach) * np.cos(angles)
    rim = [(px, py, radius) for px, py in zip(x, y, strict=True)]
    hairline_discs = [(0, 14.8, 3.6), (4.6, 15.0, 3.5), (8.8, 16.8, 3.3), (w - 2.8, 20, 2.9)]
    return rim + hairline_discs


def waves(t: Traits) -> list[tuple[float, float, float]]:
    """Return the discs that give long hair its wavy edge."""
    x = t.width + CUTS[t.cut].side
    heights = np.arange(24, t.ends + 1, 5.2)
    return [(x - 0.4 + 0.06 * (y - 24), y, 3.4) for y in heights]


def paint_back_hair(pen: Pen, t: Traits) -> None:
    """Paint the hair that lies behind neck and shoulders."""
    cut, shade = CUTS[t.cut], darker(t.hair, 0.26)
    w = t.width
    if cut.is_long:
        outer = w + cut.side + cut.flare - 0.6
        end = (outer, t.ends)
        pen.shape([(0, 14), (w, 18), (outer, 30), end], [end, (0, t.ends)], fill=shade)
    if cut.extra == "waves":
        pen.paint(pen.discs(waves(t)), (t.hair, darker(t.hair, 0.15)))
    if t.hat == "none" and cut.extra == "bun":
        pen.paint(pen.discs([(0, 7.2, 6.0)]), (lighter(t.hair, 0.08), darker(t.hair, 0.2)))
    if t.hat == "none" and cut.extra == "buns":
        pen.paint(pen.discs([(w - 2.4, 9.6, 5.4)]), (lighter(t.hair, 0.08), darker(t.hair, 0.2)))
    if cut.extra == "pigtails":
        paint_pigtail(pen, t)


def paint_pigtail(pen: Pen, t: Traits) -> None:
    w = t.width
    outer = [(w - 1, 26), (w + 5, 24), (w + 10, 30), (w + 10.4, 40), (w + 6.4, 50)]
    inner = [(w + 6.4, 50), (w + 3.6, 42), (w + 1.6, 34), (w - 1, 31)]
    pen.shape(outer, inner, fill=(lighter(t.hair, 0.05), darker(t.hair, 0.2)))


def hair_mask(pen: Pen, t: Traits, shift: float = 0.0) -> Image.Image:
    """Return the area of the hair in front of the head."""
    if CUTS[t.cut].extra == "curls":
        return pen.discs(curls(t), shift)
    return pen.mask(crown(t), *lengths(t), *hairline(t), shift=shift)


def paint_front_hair(pen: Pen, t: Traits, face: Image.Image) -> None:
    """Paint the hair on the head, its shadow on the face and its shine."""
    if t.cut == "bald":
        pen.glow(0, 16.0, t.width * 0.7, 3.4, lighter(t.skin, 0.6), 0.5)
        return
    shadow = ImageChops.darker(hair_mask(pen, t, 1.3), face)
    pen.paint(shadow, darker(t.skin, 0.22))
    hair = hair_mask(pen, t)
    colour = mix(t.hair, t.skin, 0.28) if t.cut == "buzz" else t.hair
    pen.paint(hair, (lighter(colour, 0.1), darker(colour, 0.12)))
    if CUTS[t.cut].extra == "curls":
        paint_curl_shine(pen, t)
    elif t.cut != "buzz":
        shine = pen.mask(*shine_band(t))
        pen.paint(ImageChops.darker(shine, hair), lighter(t.hair, 0.3), 0.55)
    if CUTS[t.cut].extra == "pigtails":
        pen.ellipse(t.width + 1.6, 27.6, 1.5, 2.2, t.hat_colour)


def shine_band(t: Traits) -> list[list[Point]]:
    w, y = t.width, 15.2 - t.lift * 0.75
    return [
        [(2.2, y), (w * 0.5, y + 0.9), (w * 0.86, y + 5)],
        [(w * 0.86, y + 5), (w * 0.5, y + 2.9), (2.2, y)],
    ]


def paint_curl_shine(pen: Pen, t: Traits) -> None:
    for x, y, radius in curls(t):
        arc = [(x - radius * 0.5, y - radius * 0.1), (x, y - radius * 0.5), (x + radius * 0.5, y)]
        pen.line(arc, 0.8, lighter(t.hair, 0.14))


# ---------------------------------------------------------------------------- accessories


def paint_glasses(pen: Pen, t: Traits) -> None:
    if t.glasses == "none":
        return
    x, y, stroke = t.eye_x + 0.15, 31.3, round(0.95 * pen.unit)
    lens = Image.new("L", pen.canvas.size)
    draw = ImageDraw.Draw(lens)
    if t.glasses == "round":
        box = pen.box(x, y, 4.7, 4.6)
        draw.ellipse(box, fill=255)
        pen.paint(lens, WHITE, 0.16)
        pen.draw.ellipse(box, outline=t.frame, width=stroke)
    else:
        box, radius = pen.box(x, y, 5.0, 3.9), 1.4 * pen.unit
        draw.rounded_rectangle(box, radius, fill=255)
        pen.paint(lens, WHITE, 0.16)
        pen.draw.rounded_rectangle(box, radius, outline=t.frame, width=stroke)
    pen.line([(0, 30.2), (x - 4.5, 30.8)], 0.95, t.frame)
    pen.line([(x + 4.7, 30.4), (t.width + 0.4, 30)], 0.95, t.frame)


def paint_hat(pen: Pen, t: Traits) -> None:
    """Paint a beanie, a cap, or a hat with a wide brim."""
    w = t.width + 1.6 + CUTS[t.cut].side * 0.6
    fill = (lighter(t.hat_colour, 0.14), darker(t.hat_colour, 0.12))
    band = darker(t.hat_colour, 0.24)
    dome = [(0, 4.5), (w * 0.6, 6.6), (w * 0.94, 13), (w, 20.5)]
    if t.hat == "beanie":
        pen.ellipse(0, 4.2, 3.4, 3.2, lighter(t.hat_colour, 0.4))
        pen.shape(dome, [(w, 20.5), (0, 18)], fill=fill)
        upper = [(0, 15.4), (w * 0.6, 16.3), (w + 0.5, 18.6)]
        pen.shape(upper, [(w + 0.4, 24), (w * 0.6, 21.8), (0, 21)], fill=band)
    elif t.hat == "cap":
        pen.shape(dome, [(w, 20.5), (w * 0.6, 19.6), (0, 19.3)], fill=fill)
        upper = [(0, 17.2), (w * 0.6, 17.7), (w, 20.3)]
        lower = [(w + 0.2, 22.4), (w * 0.62, 22.2), (0, 23.6)]
        pen.shape(upper, lower, fill=(band, darker(t.hat_colour, 0.36)))
        pen.ellipse(0, 12.4, 3.0, 2.8, t.cloth_2)
    elif t.hat == "brim":
        pen.ellipse(0, 19.4, w + 8.5, 4.0, band)
        top = [(0, 4), (w * 0.55, 4.4), (w * 0.8, 7), (w * 0.9, 18.4)]
        rim = [(w * 0.9, 18.4), (w * 0.5, 20), (0, 20.4)]
        pen.shape(top, rim, fill=fill)
        pen.shape([(0, 16.2), (w * 0.5, 15.8), (w * 0.885, 14.4)], rim, fill=t.cloth_2)


def paint_scarf(pen: Pen, t: Traits) -> None:
    """Paint a head scarf around the face and over the shoulders."""
    w, end = t.width, t.chin_y
    outer = [(0, 6.2), (w * 0.6, 8.4), (w + 1.8, 18), (w + 3, 32), (w + 2.4, 46), (w + 7, 60)]
    inner = [(w - 1.4, 32), (w - 2.2, 24), (w * 0.6, 19), (0, 17.6)]
    lower = [(0, end - 0.6), (w * 0.45, end - 1.4), (w * 0.8, end - 7), (w - 1.4, 32)]
    fill = (lighter(t.hat_colour, 0.1), darker(t.hat_colour, 0.14))
    pen.shape(outer, [(w + 7, 60), (w + 7, 66)], [(0, 66), (0, end)], lower, inner, fill=fill)
    pen.line([(w * 0.9, 43), (w * 0.6, 50), (0, 55.5)], 0.8, darker(t.hat_colour, 0.26))
    pen.line([(w + 2, 48), (w * 0.8, 56), (0, 61.5)], 0.8, darker(t.hat_colour, 0.26))


# ---------------------------------------------------------------------------- the whole


def lit(half: Image.Image, t: Traits) -> np.ndarray:
    """Return the half picture under its light: from above, warm or cool, uint8 [h, w, 3]."""
    gain = 1 + t.light * np.linspace(1, -1, half.height)[:, None, None]
    tint = np.array([1 + t.warmth, 1, 1 - t.warmth])
    return np.clip(np.asarray(half) * gain * tint, 0, 255).round().astype(np.uint8)


def paint_person(pen: Pen, t: Traits) -> None:
    """Paint from the back to the front."""
    covered = t.hat == "scarf"
    if not covered:
        paint_back_hair(pen, t)
    paint_neck(pen, t)
    paint_clothes(pen, t)
    paint_ears(pen, t)
    face = paint_face(pen, t)
    paint_beard(pen, t, face)
    for paint in (paint_mouth, paint_nose, paint_eyes, paint_brows):
        paint(pen, t)
    if covered:
        paint_scarf(pen, t)
    else:
        paint_front_hair(pen, t, face)
        paint_earrings(pen, t)
    paint_glasses(pen, t)
    paint_hat(pen, t)


def draw_portrait(seed: int, index: int, size: int = 64) -> Image.Image:
    """Draw one portrait.

    seed, index: 0 or more; together they fix every byte of the picture.
    size: side in pixels, even, at least 8.
    Returns an RGB picture, symmetric about its vertical axis.
    Raises ValueError for another size, and for a negative seed or index.
    """
    if size < 8 or size % 2:
        raise ValueError(f"size is {size}; it must be an even number, at least 8")
    traits = choose_traits(np.random.default_rng([seed, index]))
    pen = Pen(size)
    paint_background(pen, traits)
    paint_person(pen, traits)
    right = lit(pen.canvas.reduce(OVERSAMPLING), traits)
    return Image.fromarray(np.concatenate([right[:, ::-1], right], axis=1))


def portraits(seed: int, number: int, start: int = 0, size: int = 64) -> Iterator[Image.Image]:
    """Yield portraits start, start + 1, ... of a seed, `number` of them."""
    for index in range(start, start + number):
        yield draw_portrait(seed, index, size)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw symmetric cartoon portraits: FOLDER/000000.png, 000001.png, ...",
        epilog="example: python data/make_portraits.py data/portraits --number 30000",
    )
    parser.add_argument("folder", type=Path, help="where the pictures go; created if missing")
    parser.add_argument("--number", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="not negative (default 0)")
    parser.add_argument("--start", type=int, default=0, help="index of the first (default 0)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, even (default 64)")
    return parser.parse_args()


def write_portraits(folder: Path, seed: int, number: int, start: int, size: int) -> None:
    """Write portraits as FOLDER/<index, six digits>.png, with progress on a terminal.

    Raises ValueError for a negative number or an odd size, OSError where writing fails.
    """
    for name, value in (("number", number), ("seed", seed), ("start", start)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    folder.mkdir(parents=True, exist_ok=True)
    progress = tqdm(portraits(seed, number, start, size), total=number, disable=None)
    for index, portrait in enumerate(progress, start):
        portrait.save(folder / f"{index:06d}.png")


def main() -> int:
    args = parse_arguments()
    try:
        write_portraits(**vars(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {args.folder}: {error}", file=sys.stderr)
        return 2
    print(f"{args.number} portraits in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
