"""What kind of file this is: a picture that Pillow decodes, another known kind, or none.

Pillow reads HEIC only where the package pillow-heif is installed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import PurePath

from PIL import Image, ImageFile, TiffImagePlugin

with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

ACCEPTED = "jpg, jpeg, png, gif, webp, bmp, tif, tiff, and all else that Pillow reads"
START = 512  # bytes of a file that tell its kind

_HEIC = "a HEIC photo, which needs the package pillow-heif (pip install pillow-heif)"
_RAW = "a camera's raw file; export it as JPEG, PNG or TIFF"
_VIDEO = "a video; export its pictures as PNG"
_SVG = "an SVG drawing, which has no pixels; export it as PNG"
_PDF = "a PDF document; export its page as PNG"
_EPS = "a PostScript drawing, which has no pixels; export it as PNG"
_FLOAT = "a picture whose pixels are floating-point numbers; save it with 8 or 16 bits"

# Files of these names count as pictures, so that a damaged one is told.
_TRUSTED = (
    "jpg jpeg jpe jfif mpo png apng gif webp bmp tif tiff avif avifs jp2 j2k jpf jpx "
    "tga icb vda vst im heic heif hif"
)
# Known kinds that cannot be used, even where Pillow opens them.
_OTHERS = {
    "dng cr2 cr3 crw nef nrw arw raf orf rw2 pef srw x3f": _RAW,
    "mp4 m4v mov avi mkv webm mpg mpeg wmv 3gp": _VIDEO,
    "svg svgz": _SVG,
    "pdf": _PDF,
    "eps ps ai": _EPS,
    "pfm exr hdr": _FLOAT,
}
_OTHER_SUFFIXES = {suffix: kind for names, kind in _OTHERS.items() for suffix in names.split()}
_HEIC_SUFFIXES = dict.fromkeys(("heic", "heif", "hif"), _HEIC)
_NEVER_PICTURES = "txt csv tsv json jsonl xml xmp yml yaml md html npy npz zip tar gz"

_HEIC_START = rb".{4}ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)"
# How a file starts whose name does not tell; the kinds left out start too much like anything.
_PICTURE_STARTS = {
    rb"\xff\xd8\xff": "JPEG",
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"GIF8[79]a": "GIF",
    rb"RIFF.{4}WEBP": "WEBP",
    rb"BM.{4}\0\0\0\0": "BMP",
    rb"II[*+]\0|MM\0[*+]": "TIFF",
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51": "JPEG2000",
    rb".{4}ftyp(?:m[is]f1.{4,32}?)?avi[fs]": "AVIF",
    _HEIC_START: "HEIF",
    rb"8BPS\0\x01": "PSD",
    rb"P[1-7]\s": "PPM",
    rb"qoif": "QOI",
    rb"DDS ": "DDS",
    rb"icns": "ICNS",
}
_OTHER_STARTS = {
    rb"II\*\0.{4}CR|.{4}ftypcrx |FUJIFILMCCD-RAW|II(?:RO|U\0)|FOVb": _RAW,
    rb"(?!" + _HEIC_START + rb").{4}ftyp(?!avi)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |.{4}moov": _VIDEO,
    rb"\0\0\x01[\xb3\xba]": _VIDEO,
    rb"(?:\xef\xbb\xbf)?\s*(?:<(?:\?xml|!--).*?)?<(?:svg|!DOCTYPE svg)": _SVG,
    rb"%PDF-": _PDF,
    rb"%!PS|\xc5\xd0\xd3\xc6": _EPS,
}


def is_image_name(path: str) -> bool:
    """Whether a file of this name is taken for a picture, whatever is in it."""
    return _suffix(path) in _decoded().keys() & _TRUSTED.split()


def may_be_image(path: str) -> bool:
    """Whether a file can be a picture though its name does not say so."""
    return _suffix(path) not in [*_OTHER_SUFFIXES, *_NEVER_PICTURES.split()]


def is_image(path: str, start: bytes) -> bool:
    """Whether a file is a picture that Pillow decodes. start: its first START bytes."""
    if _first(_OTHER_STARTS, start):
        return False
    return _first(_PICTURE_STARTS, start) in _decoded().values() or _is_as_named(path, start)


def _is_as_named(path: str, start: bytes) -> bool:
    """Whether a file starts as Pillow expects of one of this name."""
    _, accepts = Image.OPEN.get(_decoded().get(_suffix(path), ""), (None, None))
    return accepts is not None and accepts(start) is True


def known_kind(path: str, data: bytes = b"") -> str:
    """What a file is that cannot be read, and what to do; "" where that is not known.

    data: of the file, at least its start, or nothing. It tells more than the name.
    """
    kind = _first(_OTHER_STARTS | {_HEIC_START: _HEIC}, data[:START])
    if not kind and _is_float_tiff(data):
        kind = _FLOAT
    if not kind and not is_image(path, data[:START]):
        kind = (_OTHER_SUFFIXES | _HEIC_SUFFIXES).get(_suffix(path), "")
    return "" if kind is _HEIC and "HEIF" in _decoded().values() else kind


def _suffix(path: str) -> str:
    return PurePath(path).suffix.lower().removeprefix(".")


def _first(kinds: Mapping[bytes, str], start: bytes) -> str:
    found = (kind for pattern, kind in kinds.items() if re.match(pattern, start, re.DOTALL))
    return next(found, "")


@cache
def _decoded() -> dict[str, str]:
    """Suffix -> format, of all that the installed Pillow decodes."""
    Image.init()
    formats = {name for name, (factory, _) in Image.OPEN.items() if not _is_stub(factory)}
    formats |= {"MPO"} & Image.MIME.keys()  # opened as JPEG
    suffixes = Image.registered_extensions().items()
    return {suffix.removeprefix("."): name for suffix, name in suffixes if name in formats}


def _is_stub(factory: object) -> bool:
    """Whether Pillow tells this format's size, but cannot read its pixels."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def _is_float_tiff(data: bytes) -> bool:
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return False
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return 3 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
    except Exception:  # of a damaged file, which is what it will be called
        return False
