"""What a picture's file holds beside its pixels: found, hidden from the decoder, and given back.

The decoder gets PNG and JPEG files without it. So no text, profile or EXIF, however large or
damaged, keeps a picture from being read.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"  # the first bytes of a file

MOST = 2**26  # bytes that a compressed text or profile may have; real ones are far smaller
VISIBLE = 4  # levels of 255: a profile that changes no colour by more is as good as sRGB

# Chunks of a PNG that say what its values mean, and how long they are; a profile comes beside.
_COLOUR = {b"cICP": 4, b"cHRM": 32, b"gAMA": 4, b"sRGB": 1}
_XMP = b"XML:com.adobe.xmp"
_RAW_EXIF = (b"Raw profile type exif", b"Raw profile type APP1")  # as ImageMagick writes it

# Tags of a TIFF file that describe the photo, not its pixels.
_OF_THE_PHOTO = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_THUMBNAIL = ((0x0201, 0x0202), (0x0111, 0x0117))  # where it lies, and its bytes: JPEG or plain


@dataclass(frozen=True)
class Metadata:
    """Of a picture's file, as it is there; b"": none."""

    exif: bytes = b""  # a TIFF structure
    icc: bytes = b""  # a colour profile, maybe damaged
    xmp: bytes = b""
    colour: tuple[tuple[bytes, bytes], ...] = ()  # (kind, content) of a PNG's chunks
    is_deep: bool = False  # colours of 16 bits, of which the decoder gives 8

    @property
    def orientation(self) -> int | None:
        """How the picture is to be turned, 1 to 8 as in EXIF; None: that cannot be read."""
        value = _Exif(self.exif).orientation if self.exif else 0
        if value == 0:  # that is: not known
            match = re.search(rb"""tiff:Orientation(?:=["']|>)([1-8])""", self.xmp)
            return int(match[1]) if match else 1
        return value if value in range(1, 9) else None

    @property
    def profile(self) -> Literal["", "RGB", "other", "damaged"]:
        """What kind of colours the profile is for; "": there is none."""
        if not self.icc:
            return ""
        if len(self.icc) < 128 or self.icc[36:40] != b"acsp":
            return "damaged"
        return "RGB" if self.icc[16:20] == b"RGB " else "other"


@dataclass(frozen=True, eq=False)
class Kept:
    """What a result keeps of its photo besides pixels."""

    exif: bytes = b""
    icc: bytes = b""
    colour: tuple[tuple[bytes, bytes], ...] = ()
    alpha: np.ndarray | None = None  # uint8 (H, W); None: opaque

    @property
    def of_colours(self) -> Kept:
        """Only what decides how pixels look."""
        return Kept(icc=self.icc, colour=self.colour)

    def png_options(self) -> dict[str, object]:
        """For Pillow's `save`."""
        chunks = PngImagePlugin.PngInfo()
        for kind, content in self.colour:
            chunks.add(kind, content)
        options = {"exif": self.exif, "icc_profile": self.icc, "pnginfo": self.colour and chunks}
        return {name: value for name, value in options.items() if value}


NOTHING = Kept()


def kept_of(metadata: Metadata, alpha: np.ndarray | None) -> Kept:
    """alpha: uint8 (H, W), of the upright picture."""
    exif = _Exif(metadata.exif).cleaned() if metadata.orientation else b""
    icc = metadata.icc if metadata.profile == "RGB" else b""
    return Kept(exif, icc, metadata.colour, alpha)


def looks_otherwise(icc: bytes) -> bool:
    """Whether RGB colours with this profile look other than without it, as sRGB."""
    from PIL import ImageCms  # few pictures need it

    levels = np.linspace(0, 255, 6).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        shown = ImageCms.profileToProfile(
            Image.fromarray(colours), profile, ImageCms.createProfile("sRGB")
        )
    except (ImageCms.PyCMSError, OSError):
        return False  # a viewer cannot use it either
    return bool(np.abs(np.asarray(shown).astype(int) - colours).max() > VISIBLE)


# ---- Found ----


def split(data: bytes) -> tuple[Metadata | None, bytes]:
    """What lies beside the pixels, and a file without it.

    None, and the file as it is, where it is neither PNG nor JPEG: see `metadata_of`.
    """
    if data.startswith(PNG):
        return _split_png(data)
    if data.startswith(JPEG):
        return _split_jpeg(data)
    return None, data


def metadata_of(image: Image.Image) -> Metadata:
    """Of a picture that Pillow has opened, of any type."""
    exif, icc, xmp = (_bytes(image.info.get(key)) for key in ("exif", "icc_profile", "xmp"))
    if image.format != "TIFF":
        return Metadata(_without_head(exif), icc, xmp)
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, 8)  # for each channel, or for all
    return Metadata(_exif_of_tiff(image), icc, is_deep=16 in np.ravel(bits))  # turned on loading


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def without_exif(data: bytes) -> bytes:
    """An AVIF or HEIF file whose EXIF item is of a kind that no decoder knows."""
    return re.sub(rb"(infe.{8})Exif", rb"\1none", data, flags=re.DOTALL)


def _exif_of_tiff(image: Image.Image) -> bytes:
    """What its tags say about the photo; b"" where they cannot be read."""
    kept = Image.Exif()
    try:
        exif = image.getexif()
        kept.update({tag: exif[tag] for tag in _OF_THE_PHOTO if tag in exif})
        for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if tag in exif:
                kept[tag] = dict(exif.get_ifd(tag))
        return _without_head(kept.tobytes()) if len(kept) else b""
    except Exception:  # Pillow reports damaged data by many unrelated types
        return b""


def _without_head(exif: bytes) -> bytes:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _split_png(data: bytes) -> tuple[Metadata, bytes]:
    """The decoder gets the chunks that it needs, and those of transparency."""
    view, kept, others, place = memoryview(data), [PNG], [], len(PNG)
    while place + 12 <= len(data):
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        needed = not kind.isalpha() or kind[:1].isupper() or kind == b"tRNS"
        if end > len(data) and not needed:  # cut off within: the pixels may be whole
            return _metadata_of_chunks(others, data[24:25]), b"".join(kept)
        if end > len(data) or kind == b"IEND":
            break
        if needed:
            kept.append(view[place:end])
        else:
            others.append((kind, data[place + 8 : end - 4]))
        place = end
    return _metadata_of_chunks(others, data[24:25]), b"".join([*kept, view[place:]])


def _metadata_of_chunks(chunks: list[tuple[bytes, bytes]], bits: bytes) -> Metadata:
    """bits: of a channel, one byte, as the first chunk says."""
    found: dict[bytes, bytes] = {}  # the first of each kind
    for kind, content in chunks:
        found.setdefault(kind, content)
    texts = {}
    for kind, content in chunks:
        keyword = content.partition(b"\0")[0]
        if kind in (b"tEXt", b"zTXt", b"iTXt") and keyword in (_XMP, *_RAW_EXIF):
            texts.setdefault(keyword, _text(kind, content))
    raw = next((texts[keyword] for keyword in _RAW_EXIF if keyword in texts), b"")
    icc = b""
    if b"iCCP" in found:  # after its name and a byte for the kind of compression
        icc = _inflated(found[b"iCCP"].partition(b"\0")[2][1:]) or b"damaged"
    return Metadata(
        exif=_without_head(found.get(b"eXIf", b"") or _from_hex(raw)),
        icc=icc,
        xmp=texts.get(_XMP, b""),
        colour=tuple(
            (k, found[k]) for k, size in _COLOUR.items() if len(found.get(k, b"")) == size
        ),
        is_deep=bits == b"\x10",
    )


def _text(kind: bytes, content: bytes) -> bytes:
    """The text of a PNG's chunk."""
    value = content.partition(b"\0")[2]
    if kind == b"zTXt":
        return _inflated(value[1:])
    if kind == b"tEXt":
        return value
    text = value[2:].split(b"\0", 2)[-1]
    return _inflated(text) if value[:1] == b"\1" else text


def _inflated(data: bytes) -> bytes:
    """b"" where it is damaged, or longer than MOST."""
    decompressor = zlib.decompressobj()
    try:
        plain = decompressor.decompress(data, MOST)
    except zlib.error:
        return b""
    return plain if decompressor.eof else b""


def _from_hex(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it: a line of its name, one of its length, and numbers."""
    lines = text.strip().split(b"\n")[2:]
    try:
        return bytes.fromhex(b"".join(lines).decode("ascii"))
    except ValueError:
        return text and b"damaged"


def _split_jpeg(data: bytes) -> tuple[Metadata, bytes]:
    """The decoder gets what comes before the pixels without comments and data of applications."""
    view, kept, others, place = memoryview(data), [data[:2]], [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a byte to fill up
            place += 1
            continue
        if marker in (0xD9, 0xDA):  # the pixels, or the end
            break
        end = place + 2
        if marker not in (0x01, *range(0xD0, 0xD9)):  # these have no content
            end += int.from_bytes(data[place + 2 : place + 4], "big")
        content = data[place + 4 : end]
        is_needed = not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        # Two of these say which colours the three or four channels are.
        is_needed |= marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14
        is_needed |= marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
        if is_needed:
            kept.append(view[place:end])
        else:
            others.append((marker, content))
        place = end
    return _metadata_of_segments(others), b"".join([*kept, view[place:]])


def _metadata_of_segments(segments: list[tuple[int, bytes]]) -> Metadata:
    def contents(marker: int, head: bytes) -> list[bytes]:
        return [c[len(head) :] for m, c in segments if m == marker and c.startswith(head)]

    # Each piece of a profile begins with its number and that of all.
    pieces = sorted(contents(0xE2, b"ICC_PROFILE\0"), key=lambda piece: piece[:1])
    whole = all(piece[1:2] == bytes([len(pieces) % 256]) for piece in pieces)
    icc = b"".join(piece[2:] for piece in pieces) if whole else b"damaged"
    xmp = b"".join(contents(0xE1, b"http://ns.adobe.com/xap/1.0/\0"))
    exif = b"".join(contents(0xE1, b"Exif\0\0"))
    return Metadata(_without_head(exif), icc, xmp)


# ---- EXIF ----


class _Exif:
    """A TIFF structure, of which little is needed: so little can be damaged."""

    def __init__(self, data: bytes):
        self.data = data
        self.order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        self.is_one = data[:2] in (b"II", b"MM") and data[2:4] in (b"*\0", b"\0*")

    @property
    def orientation(self) -> int | None:
        """As the file says, 0 if it says nothing; None: that cannot be read."""
        if not self.is_one:
            return None
        place = self._number(4, 4)
        for tag, values in self._entries(place):
            if tag == ExifTags.Base.Orientation:
                return self._number(*values[0]) if values else None
        return 0 if self._is_whole(place) else None

    def cleaned(self) -> bytes:
        """The structure for a picture that is upright, without a thumbnail; b"" if damaged.

        Nothing else is moved or changed, so that odd values do no harm.
        """
        first = self._number(4, 4) if self.is_one else 0
        if not self._is_whole(first):
            return b""
        data = bytearray(self.data)
        for tag, values in self._entries(first):
            if tag == ExifTags.Base.Orientation and values:
                place, size = values[0]
                data[place : place + size] = (1).to_bytes(size, self.order)
        link = first + 2 + 12 * self._number(first, 2)
        thumbnail = dict(self._entries(self._number(link, 4)))
        data[link : link + 4] = bytes(4)
        for starts, lengths in _THUMBNAIL:
            pairs = zip(thumbnail.get(starts, ()), thumbnail.get(lengths, ()), strict=False)
            for start, length in ((self._number(*s), self._number(*n)) for s, n in pairs):
                end = min(start + length, len(data))
                if 8 <= start < end:
                    data[start:end] = b"" if end == len(data) else bytes(end - start)
        return bytes(data)

    def _number(self, place: int, size: int) -> int:
        return int.from_bytes(self.data[place : place + size], self.order)

    def _is_whole(self, place: int) -> bool:
        """Whether a directory ends, with a link to the next one, within the data."""
        return place >= 8 and place + 2 + 12 * self._number(place, 2) + 4 <= len(self.data)

    def _entries(self, place: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The tags of a directory, and where the values of each lie: (place, size).

        Only whole numbers; [] for values of another kind, or beyond the end of the data.
        """
        if place < 8:
            return
        for entry in range(place + 2, place + 2 + 12 * self._number(place, 2), 12):
            if entry + 12 > len(self.data):
                return
            size = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}.get(self._number(entry + 2, 2), 0)
            number = self._number(entry + 4, 4) if size else 0
            start = entry + 8 if number * size <= 4 else self._number(entry + 8, 4)
            whole = start + number * size <= len(self.data)
            places = range(start, start + number * size, size) if whole and size else ()
            yield self._number(entry, 2), [(each, size) for each in places]
