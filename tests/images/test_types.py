"""Which files of a folder are pictures, by name and by content, and what the others are called."""

import io
import struct
import warnings
from pathlib import Path

import pytest
from PIL import Image

from guided_diffusion.images import types
from guided_diffusion.images.files import list_images, read_rgb
from guided_diffusion.machine import storage
from tests.support.pictures import noise, save_images, user_error

FORMATS = ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI"]
FORMATS += ["DDS"]
WITHOUT_HEIC = "HEIF" not in types._decoded().values()


def encoded(kind: str) -> bytes:
    if kind in ("AVIF", "MPO") and kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    buffer = io.BytesIO()
    noise(32, 32).save(buffer, kind)
    return buffer.getvalue()


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images of a folder, and the warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        paths = list_images("gt_path", str(folder))
    return [Path(path).name for path in paths], [str(warning.message) for warning in record]


# ---- Pictures ----


@pytest.mark.parametrize("name", ["x", "x.dat", "x.bak", "x.photo.1", "X.JPG_large", "x.heic"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_counts_by_its_content_whatever_its_name(tmp_path, kind, name):
    (tmp_path / name).write_bytes(encoded(kind))
    assert listed(tmp_path) == ([name], [])
    assert read_rgb(str(tmp_path / name)).size == (32, 32)


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    {
        "JPEG": "jfif jpe jpeg JPG",
        "MPO": "mpo",
        "PNG": "apng",
        "AVIF": "avif AVIFS",
        "JPEG2000": "jp2 j2k jpx jpc",
        "PPM": "ppm pnm",
        "TGA": "tga",
        "SGI": "sgi",
        "PCX": "pcx",
        "ICO": "ico",
    }.items(),
)
def test_a_picture_counts_by_the_names_that_pillow_knows(tmp_path, kind, suffixes):
    for suffix in suffixes.split():
        (tmp_path / f"x.{suffix}").write_bytes(encoded(kind))
    assert listed(tmp_path) == (sorted(f"x.{suffix}" for suffix in suffixes.split()), [])


def test_an_avif_of_a_general_brand_is_a_picture():
    assert types.is_image("x", b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf")


def test_a_damaged_picture_is_told_by_its_name(tmp_path):
    (tmp_path / "x.jfif").write_bytes(b"")
    assert listed(tmp_path) == (["x.jfif"], [])
    assert "x.jfif: empty, damaged" in user_error(read_rgb, str(tmp_path / "x.jfif"))


# ---- Others ----


def test_files_that_are_left_out_are_counted_with_the_first_of_each_kind(tmp_path):
    save_images(tmp_path, "a.png", "b/c.png")
    for name in ("notes.txt", "b/notes.md", "list.json", "empty", "film.mp4"):
        (tmp_path / name).write_bytes(b"")
    names, (warning,) = listed(tmp_path)
    assert names == ["a.png", "c.png"]
    assert warning == (
        f"gt_path {tmp_path}: 4 files are left out, first b/notes.md: no pictures; "
        "1 file is left out, film.mp4: a video; export its pictures as PNG"
    )


def test_what_no_person_put_there_is_left_out_in_silence(tmp_path):
    save_images(tmp_path, "a.png", "__MACOSX/b.png", ".hidden/c.png")
    for name in ("Thumbs.db", ".DS_Store", "__MACOSX/._a.png", "desktop.ini", "._a.png"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert listed(tmp_path) == (["a.png"], [])


def test_a_folder_of_others_alone_says_what_they_are(tmp_path):
    (tmp_path / "a.svg").write_text("<svg/>")
    message = user_error(list_images, "gt_path", str(tmp_path))
    assert "no images in folder" in message
    assert message.endswith("a.svg: an SVG drawing, which has no pixels; export it as PNG")


def ftyp(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand


HEIC = ftyp(b"heic")
OTHERS = {
    "a video": [
        ftyp(b"isom"),
        ftyp(b"qt  "),
        ftyp(b"mp42"),
        b"\x1a\x45\xdf\xa3",
        b"RIFF\0\0\0\0AVI ",
    ],
    "a camera's raw file": [b"II*\0\x10\0\0\0CR\2\0", b"FUJIFILMCCD-RAW 0201", ftyp(b"crx ")],
    "an SVG drawing": [b"<svg xmlns", b'<?xml version="1.0"?>\n<!-- Made -->\n<svg>', b"\n<svg>"],
    "a PDF document": [b"%PDF-1.7\n"],
    "a PostScript drawing": [b"%!PS-Adobe-3.0 EPSF-3.0\n"],
}


@pytest.mark.parametrize("name", ["x", "x.png", "x.jpg", "x.tif", "x.webp"])
@pytest.mark.parametrize(
    ("kind", "start"), [(kind, start) for kind, starts in OTHERS.items() for start in starts]
)
def test_known_kinds_are_called_what_they_are_by_content(tmp_path, kind, start, name):
    (tmp_path / name).write_bytes(start + bytes(600))
    message = user_error(read_rgb, str(tmp_path / name))
    assert f"{tmp_path / name}: it is {kind}" in message and "damaged" not in message
    (tmp_path / name).rename(tmp_path / "unnamed")
    save_images(tmp_path, "y.png")
    names, (warning,) = listed(tmp_path)
    assert names == ["y.png"] and f"unnamed: {kind}" in warning


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    {
        "a video": "mp4 MOV avi mkv webm mpg",
        "a camera's raw file": "dng NEF cr2 cr3 arw",
        "an SVG drawing": "svg",
        "a PDF document": "pdf",
    }.items(),
)
def test_known_kinds_are_called_what_they_are_by_name(tmp_path, kind, suffixes):
    for suffix in suffixes.split():
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(encoded("TIFF") if kind == "a camera's raw file" else b"\1\2\3")
        message = user_error(list_images, "gt_path", str(tmp_path))
        assert f"x.{suffix}: {kind}" in message
        path.unlink()


@pytest.mark.skipif(not WITHOUT_HEIC, reason="pillow-heif is installed")
@pytest.mark.parametrize("name", ["x.HEIC", "x.heif", "x.hif", "x", "x.jpg"])
@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_heic_names_the_package_that_reads_it(tmp_path, name, brand):
    (tmp_path / name).write_bytes(ftyp(brand))
    message = user_error(read_rgb, str(tmp_path / name))
    assert "a HEIC photo, which needs the package pillow-heif" in message
    save_images(tmp_path, "y.png")
    if name != "x.jpg":  # whose name promises a picture
        names, (warning,) = listed(tmp_path)
        assert names == ["y.png"] and f"{name}: a HEIC photo" in warning


def test_heic_is_a_picture_where_pillow_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(types, "_decoded", lambda: {"heic": "HEIF", "png": "PNG"})
    for name in ("a.heic", "b", "c.png"):
        (tmp_path / name).write_bytes(HEIC)
    assert listed(tmp_path) == (["a.heic", "b", "c.png"], [])
    assert types.known_kind("a.heic", HEIC) == ""  # it is damaged


def float_tiff(bits: int, samples: int) -> bytes:
    """A TIFF of one pixel, written by hand, because Pillow writes no colours as numbers."""
    entries = [(256, 1), (257, 1), (258, bits), (259, 1), (262, 1 if samples == 1 else 2)]
    entries += [(273, 200), (277, samples), (278, 1), (279, samples * bits // 8), (339, 3)]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    return head.ljust(200, b"\0") + bytes(samples * bits // 8)


@pytest.mark.parametrize(("bits", "samples"), [(32, 1), (64, 1), (16, 1), (32, 3)])
def test_floating_point_tiffs_are_called_so(tmp_path, bits, samples):
    (tmp_path / "x.tif").write_bytes(float_tiff(bits, samples))
    message = user_error(read_rgb, str(tmp_path / "x.tif"))
    assert "pixels are floating-point numbers" in message and "damaged" not in message


# ---- How much is read ----


def test_no_more_than_a_start_is_read_and_only_where_the_name_does_not_tell(tmp_path, monkeypatch):
    save_images(tmp_path, "a.png", "b.jpg")
    for name in ("c.txt", "d.mp4", "e.npz", "f"):
        (tmp_path / name).write_bytes(bytes(10_000))
    read = []
    read_start = storage.read_start
    monkeypatch.setattr(storage, "read_start", lambda *of: read.append(of) or read_start(*of))
    listed(tmp_path)
    assert read == [(f"{tmp_path}/f", types.START)]
    assert storage.read_start(f"{tmp_path}/f", 7) == bytes(7)


def test_the_case_of_skipped_types(tmp_path):
    """Five photos of five types: four are read, and the HEIC is named."""
    for name, kind in (("a.png", "PNG"), ("b.avif", "AVIF"), ("d.jfif", "JPEG"), ("e.png", "PNG")):
        (tmp_path / name).write_bytes(encoded(kind))
    (tmp_path / "c.HEIC").write_bytes(HEIC)
    names, told = listed(tmp_path)
    if WITHOUT_HEIC:
        assert names == ["a.png", "b.avif", "d.jfif", "e.png"]
        assert len(told) == 1 and "1 file is left out, c.HEIC: a HEIC photo" in told[0]
    else:
        assert len(names) == 5
