"""Pictures: found in folders, read, prepared as the network sees them, and written as PNG.

"Prepared" means uint8 RGB, (S, S, 3), S = image_size; (H, W, 3) where that is None, and pictures
stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from guided_diffusion.config import UserError
from guided_diffusion.images import types
from guided_diffusion.images.metadata import (
    NOTHING,
    Kept,
    Metadata,
    kept_of,
    metadata_of,
    split,
    without_exif,
)
from guided_diffusion.machine import storage

MOST_PIXELS = 400_000_000  # of a picture: twice those of the largest photos of telephones
DARK = 64  # level of 255 that 16-bit pictures should reach: with 12 bits in 16, they reach 16


# ---- Found ----


# Where configs of this repository look for pictures that do not come with it.
_SOURCES = {
    "data/datasets/gts/portraits": "start it in the repository's folder",
    "data/datasets/": "bash download.sh data fetches the original's example pictures",
    "data/portraits": "python data/make_portraits.py data/portraits draws them",
    "data/photos": "data/prepare_photos.py lays them out",
}


def _how_to_get(path: str) -> str:
    if storage.is_remote(path):
        return ""
    hints = (f"; {hint}" for folder, hint in _SOURCES.items() if path.startswith(folder))
    return f" (relative paths start at the current directory, {os.getcwd()}){next(hints, '')}"


def list_images(key: str, path: str) -> list[str]:
    """The images that a path stands for, sorted; `key` is the config key that it came from.

    Of a folder, all that Pillow decodes, whatever their names. Warns of the other visible files.
    Raises UserError if there is none.
    """
    try:
        if not storage.exists(path):
            raise UserError(f"{key}: no such file or folder: {path}{_how_to_get(path)}")
        if not storage.is_dir(path):
            return [path]
        files = [file for file in storage.list_files(path) if not _is_litter(file, path)]
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {reason(error)}") from error
    starts = {file: _start(file) for file in files if not types.is_image_name(file)}
    others = {file: start for file, start in starts.items() if not types.is_image(file, start)}
    left_out = _left_out(path, others)
    images = [file for file in files if file not in others]
    if not images:
        raise UserError(
            f"{key}: no images in folder {path} or its subfolders; "
            f"accepted types: {types.ACCEPTED}{left_out and '; ' + left_out}"
        )
    if left_out:
        warnings.warn(f"{key} {path}: {left_out}", UserWarning, stacklevel=2)
    return images


def _is_litter(path: str, folder: str) -> bool:
    """Whether a file system, not a person, put it there."""
    *parents, name = path[len(folder) :].split("/")
    return "__MACOSX" in parents or name.lower() in ("thumbs.db", "desktop.ini", "icon\r")


def _start(path: str) -> bytes:
    """The first bytes of a file whose name is not that of a picture; none where they can't help."""
    try:
        return storage.read_start(path, types.START) if types.may_be_image(path) else b""
    except OSError:  # a link to nowhere, or nobody's to read
        return b""


def _left_out(folder: str, others: Mapping[str, bytes]) -> str:
    """In words. others: path -> first bytes of the files that are no pictures."""
    by_kind: dict[str, list[str]] = {}
    for file, start in others.items():
        by_kind.setdefault(types.known_kind(file, start), []).append(file)
    return "; ".join(_left_out_kind(folder, *each) for each in by_kind.items())


def _left_out_kind(folder: str, kind: str, files: Sequence[str]) -> str:
    number, what = f"{len(files):,} files are", kind or "no pictures"
    if len(files) == 1:
        number, what = "1 file is", kind or "no picture"
    name = files[0][len(folder) :].lstrip("/")
    first = f"first {name}" if files[1:] else name
    return f"{number} left out, {first}: {what}"


# ---- Read and prepared ----


def prepare(image: Image.Image, image_size: int | None) -> np.ndarray:
    """Turn any picture into what the network sees.

    Turned upright as its EXIF data say, 16 bits scaled to 8 (value / 257, rounded; colour pictures
    of 16 bits are already reduced by Pillow, which keeps the high byte: at most one level less),
    first frame, RGB without alpha; then, unless `image_size` is None, reduced or enlarged until the
    shorter side is `image_size`, and the centre cropped.

    Returns uint8 (image_size, image_size, 3), or (H, W, 3). Raises ValueError for pixels without a
    known range.
    """
    return resize_and_crop(to_rgb(image), image_size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture, upright, RGB of 8 bits. Raises ValueError for pixels without a known range."""
    return _rgb(put_upright(image))


def put_upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF data say; if these are damaged, as it is, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        copy = image.copy()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow reports damaged data by many unrelated types
            orientation = None
    if orientation is None:
        _warn_of_exif(getattr(image, "filename", "") or "a picture")
    return _turned(copy, orientation)


def load_prepared(path: str, image_size: int | None) -> np.ndarray:
    """Read and prepare a picture: uint8 (S, S, 3) or (H, W, 3). Raises UserError if it is bad."""
    return resize_and_crop(read_rgb(path), image_size)


@dataclass(frozen=True, eq=False)
class InputFile:
    """A picture's file, read once: its digest and its pixels are of the same bytes.

    Its methods raise UserError where it is no picture, or a damaged one.
    """

    path: str
    data: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256."""
        return hashlib.sha256(self.data).hexdigest()

    def rgb(self) -> Image.Image:
        """The picture, decoded to its last pixel, upright, RGB of 8 bits."""
        return self.decoded().rgb

    def decoded(self) -> Decoded:
        """The picture, decoded to its last pixel, and what else a result may keep of it."""
        with self._opened() as (image, metadata):
            image = self._upright(image, metadata)
            alpha, is_deep = _alpha(image), metadata.is_deep or image.mode.startswith("I")
            rgb = _rgb(image)
            brightest = max(high for _, high in rgb.getextrema()) if is_deep else DARK
            return Decoded(rgb, metadata, kept_of(metadata, alpha), 0 < brightest < DARK)

    def upright(self) -> Image.Image:
        """The picture, decoded to its last pixel, upright, in its own mode."""
        with self._opened() as (image, metadata):
            return self._upright(image, metadata)

    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture, without decoding its pixels."""
        with self._opened() as (image, metadata):
            width, height = image.size
            return (width, height) if metadata.orientation in (5, 6, 7, 8) else (height, width)

    def _upright(self, image: Image.Image, metadata: Metadata) -> Image.Image:
        """A picture that is just opened, decoded. If its EXIF is damaged, there is a warning."""
        # Pillow does not get to see what it might warn of in PNG and JPEG files, and so most
        # pictures are decoded at a time, by several threads.
        with nullcontext() if image.format in ("PNG", "JPEG") else _quiet_pillow():
            image.load()
        if metadata.orientation is None:
            _warn_of_exif(self.path)
        return _turned(image, metadata.orientation)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Image.Image, Metadata]]:
        """The picture, to decode within the block, and what lies beside its pixels."""
        try:
            image, metadata = _open(self.data)
            _check_pixels(self.path, image.size)
            yield image, metadata
        except UserError:
            raise
        except Exception as error:  # Pillow reports damaged files by many unrelated types
            raise _unreadable(self.path, error, self.data) from error


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture, and what else a result may keep of it."""

    rgb: Image.Image  # upright, of 8 bits
    metadata: Metadata  # as the file has it
    kept: Kept  # for a picture that is upright and RGB
    is_dark: bool  # though of 16 bits, it uses less than a quarter of the range


def read_input(path: str) -> InputFile:
    """Read a picture's file, but decode nothing yet. Raises UserError."""
    try:
        with storage.open_binary(path) as file:
            return InputFile(path, file.read())
    except OSError as error:
        raise _unreadable(path, error) from error


def read_upright(path: str) -> Image.Image:
    """A picture, upright, in its own mode. Raises UserError."""
    return read_input(path).upright()


def read_rgb(path: str) -> Image.Image:
    """A picture, upright, RGB of 8 bits. Raises UserError."""
    return read_input(path).rgb()


def _open(data: bytes) -> tuple[Image.Image, Metadata]:
    metadata, rest = split(data)
    if metadata:
        with _quiet_pillow(has_warnings=False):
            return Image.open(io.BytesIO(rest)), metadata
    with _quiet_pillow():
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # many unrelated types
            if data[4:8] != b"ftyp":
                raise
            # Pillow changes the EXIF of AVIF files, which fails where a value is odd.
            image = Image.open(io.BytesIO(without_exif(data)))
        return image, metadata_of(image)


def peek_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height of a picture, as its first bytes say. Raises many types of errors."""
    with _quiet_pillow(), Image.open(file) as image:
        return image.size


_PILLOW = threading.Lock()


@contextmanager
def _quiet_pillow(has_warnings: bool = True) -> Iterator[None]:
    """A block in which Pillow has no limit of pixels, and its warnings name no file to nobody.

    Those left are harmless: values of EXIF and TIFF tags that are not used. Limit and warnings
    belong to the whole process; thus the lock.
    """
    with _PILLOW, warnings.catch_warnings() if has_warnings else nullcontext():
        if has_warnings:
            warnings.filterwarnings("ignore", module=r"PIL\.")
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = most


def _check_pixels(path: str, size: tuple[int, int]) -> None:
    """Raises UserError."""
    if math.prod(size) > MOST_PIXELS:
        raise UserError(
            f"image {path} is too large: {size[0]}x{size[1]} are {math.prod(size):,} pixels, and "
            f"at most {MOST_PIXELS:,} are read; make it smaller with an image editor, or cut out "
            "the part around the hole"
        )


def _warn_of_exif(path: str) -> None:
    warnings.warn(
        f"{path}: its EXIF data are damaged; the picture is taken as it lies in the file, not "
        "turned, and results get no EXIF",
        UserWarning,
        stacklevel=1,  # so that it is shown once
    )


def _turned(image: Image.Image, orientation: object) -> Image.Image:
    """A copy, turned as an orientation of EXIF says; the picture itself if it needs no turn."""
    turn = Image.Transpose
    turns = {
        **{2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM},
        **{5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90},
    }
    is_known = isinstance(orientation, int) and orientation in turns
    return image.transpose(turns[orientation]) if is_known else image


def _unreadable(path: str, error: Exception, data: bytes = b"") -> UserError:
    """data: of the file, as far as it could be read."""
    kind = types.known_kind(path, data) if isinstance(error, Image.UnidentifiedImageError) else ""
    if kind:
        return UserError(f"cannot read image {path}: it is {kind}")
    return UserError(f"cannot read image {path}: {reason(error)}; replace or remove the file")


def reason(error: Exception) -> str:
    """Why a picture cannot be read, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty, damaged, or not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    """image: one that may be changed, or given back."""
    # The alpha of a palette is dropped like any other; Pillow would recommend RGBA in a warning.
    image.info.pop("transparency", None)
    image = _to_8_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _alpha(image: Image.Image) -> np.ndarray | None:
    """uint8 (H, W), 255 = opaque; None where all of it is."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") and transparent is not None:
        alpha = np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)
    elif image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    else:
        return None
    return None if alpha.min() == 255 else alpha


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, where Pillow's `convert` would clip it. Raises ValueError."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)  # mode I is 32 bits wide, but used for 16-bit pictures too
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels have more than 16 bits; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def resize_and_crop(image: Image.Image, image_size: int | None) -> np.ndarray:
    """A picture as the square that the network sees: of RGB uint8 (image_size, image_size, 3).

    None: as it is.
    """
    if image_size is None:
        return np.array(image)
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return np.array(image.crop((left, top, left + image_size, top + image_size)))


# ---- Written ----


def picture_grid(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3) -> one picture, row by row, about as wide as high; the rest is black."""
    number, size = pictures.shape[:2]
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cells = np.zeros((rows * columns, size, size, 3), np.uint8)
    cells[:number] = pictures
    cells = cells.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    return cells.reshape(rows * size, columns * size, 3)


def encode_png(array: np.ndarray, kept: Kept = NOTHING, hole: np.ndarray | None = None) -> bytes:
    """uint8 (H, W, 3) -> the bytes of a PNG file.

    kept: of the photo that the picture was made of. hole: bool (H, W), what is opaque in any case.
    """
    if kept.alpha is not None:
        array = np.dstack([array, np.where(hole, np.uint8(255), kept.alpha)])
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", **kept.png_options())
    return buffer.getvalue()
