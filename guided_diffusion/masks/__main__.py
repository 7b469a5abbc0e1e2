"""Make masks: draw them, or take them from pictures. White (255) = keep, black (0) = fill in."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageColor

from guided_diffusion.config import LITTLE, UserError
from guided_diffusion.config.errors import exit_status
from guided_diffusion.images.files import (
    encode_png,
    list_images,
    read_rgb,
    read_upright,
)
from guided_diffusion.images.types import is_image_name
from guided_diffusion.machine import storage
from guided_diffusion.masks import edits
from guided_diffusion.masks.kinds import KINDS, SIDES, check_name, check_size, draw_mask, mask_rng

WRITERS = 8  # threads: each file waits until the disk has it

PROGRAM = "python -m guided_diffusion.masks"
EXAMPLES = f"""examples:
  {PROGRAM} thick masks --number 100 --seed 1
  {PROGRAM} thin masks --like photos
  {PROGRAM} box mask.png --size 640x480
  {PROGRAM} half masks --like photos --side left
  {PROGRAM} from-alpha erased.png mask.png
  {PROGRAM} from-colour painted mask_folder --colour '#ff00ff'
  {PROGRAM} grow mask.png larger.png --by 8

The options of each kind: {PROGRAM} KIND --help
"""

KIND_HELP = {
    "thick": "wide strokes or boxes, as the paper's Wide",
    "thin": "many narrow strokes, as the paper's Narrow",
    "ev2li": "keep every second row, as the paper's Alternating lines",
    "nn2": "keep every second pixel of every second row, as the paper's Super-resolve",
    "genhalf": "keep the left half, as the paper's Half",
    "ex64": "keep the centre, a quarter of each side, as the paper's Expand",
    "box": "fill in one random box; each of its sides is a quarter to a half of the picture's",
    "lines": "fill in some random straight lines from edge to edge",
    "half": "fill in the half that --side names",
    "expand": "keep the centre, --keep of each side",
}
EDIT_HELP = {
    "from-alpha": "from a picture: fill in what is transparent, if only a little",
    "from-colour": "from a picture: fill in what is painted over with --colour",
    "invert": "from a mask: black becomes white, and white black",
    "grow": "from a mask: make the hole (black) larger by so many pixels, all round",
    "shrink": "from a mask: make the hole (black) smaller by so many pixels, all round",
    "threshold": "from a grey mask: make it black and white",
}


OPTION_HELP = {
    "--size": "256, or 640x480 (width x height)",
    "--like": "one mask of the same name and size for each image there",
    "--number": "how many masks (1)",
    "--seed": "for other random masks (0); mask i depends on the seed and i alone",
    "--overwrite": "replace files that exist",
    "--side": f"the half to fill in: {', '.join(SIDES)} (right, as genhalf)",
    "--keep": "share of each side that is kept (0.25, as ex64: a sixteenth of the area)",
    "--colour": "the colour, in quotes, or its name",
    "--tolerance": "how far red, green and blue may be off, of 255, as a JPEG does not keep "
    "colours exactly (16; 0 = that colour alone)",
    "--by": "how far, from the centre of a pixel to that of another",
    "--at": "what is as bright as this, of 255, or brighter is kept (128)",
}


def main() -> int:
    return exit_status(_run)


def _run() -> None:
    warnings.showwarning = lambda text, *_: print(f"warning: {text}", file=sys.stderr)
    arguments = parse_arguments(sys.argv[1:])
    targets, masks = (_draw if arguments.command in KINDS else _edit)(arguments)
    _check_free(targets, arguments.out, arguments.overwrite)
    _write(targets, masks, arguments)


# ---- The command line ----


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for an unknown kind or an unusable value, SystemExit for wrong usage."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="KIND", required=True)
    for name, text in (KIND_HELP | EDIT_HELP).items():
        command = commands.add_parser(name, help=text, description=f"{name}: {text}.")
        _add_arguments(command, name)
    if words and not words[0].startswith("-"):
        check_name(words[0], commands.choices, "kind")
    return parser.parse_args(words)


def _add_arguments(command: argparse.ArgumentParser, kind: str) -> None:
    add = partial(_add, command.add_argument)
    if kind in EDITS:
        command.add_argument("image", metavar="IMAGE", help="a picture, or a folder of them")
    command.add_argument("out", metavar="OUT", help="a folder, or a .png file for a single mask")
    if kind in KINDS:
        sizes = command.add_mutually_exclusive_group()
        _add(sizes.add_argument, "--size", type=_size, default=(256, 256), metavar="S")
        _add(sizes.add_argument, "--like", metavar="FOLDER")
        add("--number", type=_whole("--number", 1), metavar="N")
        add("--seed", type=_whole("--seed", 0), default=0, metavar="S")
    add("--overwrite", action="store_true")
    match kind:
        case "half":
            add("--side", default="right", metavar="SIDE")
        case "expand":
            add("--keep", type=_share, default=0.25, metavar="SHARE")
        case "from-colour":
            add("--colour", type=_colour, required=True, metavar="'#RRGGBB'")
            add("--tolerance", type=_whole("--tolerance", 0, 255), default=16, metavar="LEVELS")
        case "grow" | "shrink":
            add("--by", type=_whole("--by", 1), required=True, metavar="PIXELS")
        case "threshold":
            add("--at", type=_whole("--at", 1, 255), default=128, metavar="LEVEL")


def _add(add_argument: Callable[..., object], option: str, **settings: object) -> None:
    add_argument(option, help=OPTION_HELP[option], **settings)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--size: found {text}; accepted: a number such as 256, or 640x480")
    size = int(sides[0]), int(sides[-1])
    check_size(size, "--size")
    return size


def _whole(option: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads a whole number, for argparse."""
    accepted = f">= {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise UserError(f"{option}: found {text}; accepted: a whole number {accepted}")
        return int(text)

    return read


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--keep: found {text}; accepted: a number such as 0.25") from None


def _colour(text: str) -> tuple[int, int, int]:
    is_hex = len(text) == 6 and set(text.lower()) <= set("0123456789abcdef")
    try:
        red, green, blue = ImageColor.getrgb("#" * is_hex + text)
    except ValueError:  # also where there are four values
        raise UserError(
            f"--colour: found {text}; accepted: '#ff00ff' (in quotes), ff00ff, or a name as magenta"
        ) from None
    return red, green, blue


# ---- Masks, and where they go ----

Masks = Iterator[np.ndarray]  # each uint8 (H, W), 255 = keep


def _draw(arguments: argparse.Namespace) -> tuple[list[str], Masks]:
    targets, sizes = (_like if arguments.like else _numbered)(arguments)
    options = {name: value for name, value in vars(arguments).items() if name in ("side", "keep")}
    masks = (
        draw_mask(arguments.command, size, mask_rng(arguments.seed, index), **options)
        for index, size in enumerate(sizes)
    )
    return targets, masks


def _like(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[int, int]]]:
    if arguments.number is not None:
        raise UserError("--number: there is one mask for each image of --like; leave it out")
    images = list_images("--like", arguments.like)
    targets = _targets("--like", arguments.like, images, arguments.out)
    sizes = [read_upright(image).size for image in images]
    for image, size in zip(images, sizes, strict=True):
        check_size(size, f"--like: {image}")
    return targets, sizes


def _numbered(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[int, int]]]:
    number = arguments.number or 1
    if not _is_file_name(arguments.out):
        targets = [_in_folder(arguments.out, f"{index:06d}.png") for index in range(number)]
    elif number == 1:
        targets = [arguments.out]
    else:
        raise UserError(f"OUT: {number} masks do not fit in a file, {arguments.out}; give a folder")
    return targets, [arguments.size] * number


def _edit(arguments: argparse.Namespace) -> tuple[list[str], Masks]:
    images = list_images("IMAGE", arguments.image)
    targets = _targets("IMAGE", arguments.image, images, arguments.out)
    return targets, (_edited(image, arguments) for image in images)


def _edited(image: str, arguments: argparse.Namespace) -> np.ndarray:
    # Without its alpha, but for the one that asks for it.
    picture = (read_upright if arguments.command == "from-alpha" else read_rgb)(image)
    try:
        return EDITS[arguments.command](picture, arguments)
    except UserError as error:
        raise UserError(f"{image}: {error}") from error


EDITS: dict[str, Callable[[Image.Image, argparse.Namespace], np.ndarray]] = {
    "from-alpha": lambda picture, _: edits.from_alpha(picture),
    "from-colour": lambda picture, a: edits.from_colour(picture, a.colour, a.tolerance),
    "invert": lambda picture, _: edits.invert(edits.read_mask(picture)),
    "grow": lambda picture, a: edits.grow(edits.read_mask(picture), a.by),
    "shrink": lambda picture, a: edits.shrink(edits.read_mask(picture), a.by),
    "threshold": lambda picture, a: edits.threshold(picture, a.at),
}


def _targets(key: str, source: str, images: list[str], out: str) -> list[str]:
    """Where the mask of each image goes; subfolders are kept. Raises UserError."""
    if not storage.is_dir(source):
        name = PurePath(source).with_suffix(".png").name
        targets = [out if _is_file_name(out) else _in_folder(out, name)]
    elif _is_file_name(out):
        raise UserError(f"OUT: {out} is a file, but {key} {source} is a folder; give a folder")
    else:
        names = [PurePath(image).relative_to(source).with_suffix(".png") for image in images]
        targets = [_in_folder(out, name.as_posix()) for name in names]
    _check_distinct(images, targets)
    _check_apart(source, targets)
    return targets


def _is_file_name(out: str) -> bool:
    """Whether OUT is a single mask. Raises UserError for another kind of picture than PNG."""
    if is_image_name(out) and not out.lower().endswith(".png"):
        raise UserError(f"OUT: {out}: masks are PNG files, which keep black and white; end in .png")
    return is_image_name(out)


def _in_folder(folder: str, name: str) -> str:
    return f"{folder.rstrip('/') or '/'}/{name}"


def _check_distinct(images: list[str], targets: list[str]) -> None:
    image_of: dict[str, str] = {}
    for image, target in zip(images, targets, strict=True):
        if target in image_of:
            raise UserError(
                f"{image_of[target]} and {image} would both have the mask {target}: rename one"
            )
        image_of[target] = image


def _check_apart(source: str, targets: list[str]) -> None:
    """Masks neither replace the pictures that they are made from nor lie among them."""
    source_path = os.path.realpath(source)
    for target in targets:
        path = os.path.realpath(target)
        if path == source_path or path.startswith(os.path.join(source_path, "")):
            raise UserError(f"OUT: {target} would be written over or among {source}; change OUT")


def _check_free(targets: list[str], out: str, overwrite: bool) -> None:
    with storage.writing(out, key="OUT"):
        existing = [] if overwrite else [path for path in targets if storage.exists(path)]
        for folder in {os.path.dirname(path) for path in targets}:
            storage.check_writable(folder)
    if existing:
        more = f" (and {len(existing) - 1} more)" if existing[1:] else ""
        raise UserError(
            f"OUT: {existing[0]}{more} exists: add --overwrite, or choose another folder"
        )


def _write(targets: list[str], masks: Masks, arguments: argparse.Namespace) -> None:
    """Every mask is made before the first is written."""
    kept, files, out = [], [], arguments.out
    for mask in masks:
        kept.append(mask.mean() / 255)
        files.append(encode_png(mask))
    with storage.writing(out, key="OUT"), ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(storage.write_atomically, targets, files))
    number = "1 mask" if len(files) == 1 else f"{len(files):,} masks"
    print(f"written: {out}, {number}; {sum(kept) / len(files):.1%} of the pixels are kept")
    little = [target for target, share in zip(targets, kept, strict=True) if share < LITTLE]
    if little and arguments.command == "from-alpha":
        print(
            f"{len(little):,} of {len(files):,}, first {little[0]}, keep little: what is opaque is "
            "kept, what is transparent is filled in; if you painted what is to be filled in, turn "
            f"them round: {PROGRAM} invert {out} ANOTHER"
        )


if __name__ == "__main__":
    sys.exit(main())
