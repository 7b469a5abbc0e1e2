"""What lies beside the pixels of a picture: it never keeps one from being read, and comes back."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from guided_diffusion.images import files
from guided_diffusion.images.files import InputFile, encode_png, prepare, read_input, to_rgb
from guided_diffusion.images.metadata import looks_otherwise
from guided_diffusion.images.pairs import Pair
from guided_diffusion.output import report
from tests.support.checks import DATASET, REGION, load_pair, messages_of
from tests.support.pictures import noise, user_error

TYPES = ("png", "jpg", "webp", "avif", "tiff")
RED, BLUE = (254, 0, 0), (0, 0, 254)


def halves() -> Image.Image:
    """Lying on its side: once turned by Orientation 6, red is above blue."""
    picture = Image.new("RGB", (48, 32), BLUE)
    picture.paste(RED, (0, 0, 24, 32))
    return picture


def is_upright(picture: Image.Image) -> bool:
    """Whether it is `halves` after that turn; False: as it lay. Fails for anything else."""
    upright = picture.size == (32, 48)
    points = ((16, 10), (16, 38)) if upright else ((10, 16), (38, 16))
    for point, colour in zip(points, (RED, BLUE), strict=True):
        assert np.abs(np.subtract(picture.getpixel(point), colour)).max() < 12
    return upright


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- EXIF, made by hand -----------------------------------------------------------------------


def directory(order: str, place: int, tags: list[tuple[int, int, int, bytes]]) -> bytes:
    """A directory of a TIFF structure that lies at `place`, the long values after it.

    tags: (tag, type, count, value).
    """
    data, entries = b"", struct.pack(f"{order}H", len(tags))
    behind = place + 2 + 12 * len(tags) + 4
    for tag, kind, count, value in tags:
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field, data = struct.pack(f"{order}I", behind + len(data)), data + value
        entries += struct.pack(f"{order}HHI", tag, kind, count) + field
    return entries + bytes(4) + data


def exif(order: str = "<", orientation: int = 6, kind: int = 3) -> bytes:
    """Of a camera: a maker, an orientation and a distance of -1/0, which cannot be written anew."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    code = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
    tags = [
        (0x010F, 2, 8, b"Pinhole\0"),
        (0x0112, kind, 1, struct.pack(order + code, orientation)),
    ]
    place = 8 + len(directory(order, 8, [*tags, (0x8769, 4, 1, bytes(4))]))
    first = directory(order, 8, [*tags, (0x8769, 4, 1, struct.pack(f"{order}I", place))])
    distance = struct.pack(f"{order}iI", -1, 0)
    return head + first + directory(order, place, [(0x9206, 10, 1, distance)])


def with_thumbnail(data: bytes, picture: bytes) -> bytes:
    """EXIF (little endian) with a directory for a thumbnail, and that after it."""
    link = 8 + 2 + 12 * struct.unpack_from("<H", data, 8)[0]
    data = data[:link] + struct.pack("<I", len(data)) + data[link + 4 :]
    tags = [(0x0201, 4, 1, bytes(4)), (0x0202, 4, 1, struct.pack("<I", len(picture)))]
    start = len(data) + len(directory("<", len(data), tags))
    tags[0] = (0x0201, 4, 1, struct.pack("<I", start))
    return data + directory("<", len(data), tags) + picture


def file_of(suffix: str, exif_data: bytes | None = None, **options: object) -> InputFile:
    """`halves` as a file of this type."""
    content, kind = io.BytesIO(), {"jpg": "JPEG"}.get(suffix, suffix.upper())
    if suffix in ("jpg", "webp", "avif"):
        options |= {"quality": 95}
    if exif_data is not None and suffix in ("avif", "tiff"):
        return InputFile(f"photo.{suffix}", _with_own_exif(suffix, exif_data, options))
    if exif_data is not None:
        options |= {"exif": b"Exif\0\0" + exif_data}
    halves().save(content, kind, **options)
    return InputFile(f"photo.{suffix}", content.getvalue())


def _with_own_exif(suffix: str, exif_data: bytes, options: dict) -> bytes:
    """Pillow would not write these data as they are: they take the place of others."""
    content, others = io.BytesIO(), Image.Exif()
    others[0x0112], others[0x010E] = 6, "x" * 500
    halves().save(content, suffix, exif=others, **options)
    data = content.getvalue()
    if suffix == "tiff":
        return data
    start, end = data.rindex(b"MM\0*", 0, data.index(b"x" * 500)), data.index(b"x" * 500) + 500
    return data[:start] + exif_data.ljust(end - start, b"\0") + data[end:]


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_odd_exif_values_do_not_matter(suffix, order, kind):
    file = file_of(suffix, exif(order, 6, kind))
    with silent():
        assert is_upright(file.rgb()) and file.size() == (48, 32)
        assert is_upright(file.upright().convert("RGB"))


DAMAGED = {
    "no structure": b"no TIFF structure at all",
    "zeros": bytes(40),
    "cut off": exif()[:20],
    "a directory beyond the end": b"II*\0" + struct.pack("<I", 10**6) + exif()[8:],
    "more tags than there are": exif()[:8] + b"\xff\xff" + exif()[10:22],
    "a turn that there is not": exif(orientation=77),
    "a turn in words": exif(kind=2),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_exif_means_as_it_lies_with_a_warning_that_names_the_file(suffix, damage):
    file = file_of(suffix, DAMAGED[damage])
    with pytest.warns(UserWarning) as record:
        decoded = file.decoded()
    assert not is_upright(decoded.rgb) and decoded.kept.exif == b""
    (warning,) = record
    assert str(warning.message).startswith(f"photo.{suffix}: its EXIF data are damaged")
    assert file.size() == (32, 48)


def test_damaged_exif_of_avif_is_no_obstacle_either():
    for damage in ("no structure", "zeros"):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            decoded = file_of("avif", DAMAGED[damage]).decoded()
        is_upright(decoded.rgb)  # turned or not, it is the picture
        assert all("photo.avif" in str(warning.message) for warning in record)


@pytest.mark.parametrize("orientation", range(9))
def test_all_turns_are_those_of_pillow(orientation):
    file = file_of("png", exif(orientation=orientation))
    image = halves()
    turns = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))
    expected = image.transpose(turns[orientation]) if orientation in turns else image
    with silent():
        np.testing.assert_array_equal(np.asarray(file.rgb()), np.asarray(expected))


def test_pictures_given_in_python_are_read_whatever_their_exif():
    picture = halves()
    picture.info["exif"] = b"Exif\0\0" + DAMAGED["no structure"]
    with pytest.warns(UserWarning, match="a picture: its EXIF data are damaged"):
        assert prepare(picture, None).shape == (32, 48, 3)
    picture.info["exif"] = b"Exif\0\0" + exif()
    picture = Image.open(io.BytesIO(file_of("jpg", exif()).data))
    with silent():
        assert is_upright(to_rgb(picture))


# ---- Texts and profiles -----------------------------------------------------------------------


def chunk(kind: bytes, content: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + content) if check is None else check
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


BOMB = zlib.compress(bytes(80_000_000))
CHUNKS = {
    "a long text": chunk(b"tEXt", b"Comment\0" + b"x" * 70_000_000),
    "a text that inflates": chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "another": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
    "a text of an unknown compression": chunk(b"zTXt", b"Comment\0\7abc"),
    "a profile that inflates": chunk(b"iCCP", b"icc\0\0" + BOMB),
    "a profile of an unknown compression": chunk(b"iCCP", b"icc\0\7abc"),
    "a profile without content": chunk(b"iCCP", b"icc"),
    "a wrong check sum": chunk(b"tEXt", b"Comment\0x", check=5),
    "short ones": chunk(b"gAMA", b"\0") + chunk(b"sRGB", b"") + chunk(b"pHYs", b"\1"),
    "an animation that is none": chunk(b"acTL", b"\0") + chunk(b"fcTL", bytes(9)),
    "EXIF that inflates": chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "EXIF that is no number": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nxyz"),
}


@pytest.mark.parametrize("where", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("which", CHUNKS)
def test_no_chunk_beside_the_pixels_keeps_a_png_from_being_read(which, where):
    data = file_of("png").data
    place = 33 if where == "before the pixels" else len(data) - 12
    file = InputFile("photo.png", data[:place] + CHUNKS[which] + data[place:])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        decoded = file.decoded()
        encode_png(np.asarray(decoded.rgb), decoded.kept)
    np.testing.assert_array_equal(np.asarray(decoded.rgb), np.asarray(halves()))
    told = ["photo.png" in str(warning.message) for warning in record]
    assert told == [True] * (which == "EXIF that is no number")


def test_a_png_cut_off_in_a_text_after_its_pixels_is_read():
    data = file_of("png").data
    cut = data[:-12] + chunk(b"tEXt", b"Comment\0" + b"x" * 900)[:100]
    with silent():
        np.testing.assert_array_equal(
            np.asarray(InputFile("x.png", cut).rgb()), np.asarray(halves())
        )
    assert "cannot read image x.png" in user_error(InputFile("x.png", data[:-40]).rgb)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


SEGMENTS = {
    "JFIF without its values": segment(0xE0, b"JFIF\0"),
    "Photoshop data that are cut off": segment(0xED, b"Photoshop 3.0\x008BIM"),
    "pictures in one file that are not there": segment(0xE2, b"MPF\0no structure"),
    "a profile with a missing piece": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(200)),
    "a profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "an Adobe segment that is cut off": segment(0xEE, b"Adobe"),
    "a long comment": segment(0xFE, b"x" * 65_000) * 20,
}


@pytest.mark.parametrize("which", SEGMENTS)
def test_no_segment_beside_the_pixels_keeps_a_jpeg_from_being_read(which):
    data = file_of("jpg").data
    file = InputFile("photo.jpg", data[:2] + SEGMENTS[which] + data[2:])
    with silent():
        decoded = file.decoded()
    plain = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(decoded.rgb), plain)
    assert decoded.kept.icc == b""


def renamed(data: bytes, names: bytes) -> bytes:
    """A JPEG file whose three channels have other names, from which decoders guess colours."""
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    changed = bytearray(data)
    for i in range(3):
        changed[frame + 10 + 3 * i] = changed[scan + 5 + 2 * i] = names[i]
    return bytes(changed)


@pytest.mark.parametrize(("options", "names"), [({}, b"RGB"), ({"keep_rgb": True}, b"\1\2\3")])
def test_colours_of_a_jpeg_are_told_by_its_segments_not_guessed(options, names):
    """JFIF says Y, Cb and Cr, whatever the channels are called; Adobe's says RGB."""
    content = io.BytesIO()
    halves().save(content, "JPEG", quality=95, **options)
    assert not is_upright(InputFile("x.jpg", renamed(content.getvalue(), names)).rgb())


def test_cmyk_is_read_as_pillow_reads_it():
    content = io.BytesIO()
    noise(32, 32).convert("CMYK").save(content, "JPEG")
    expected = np.asarray(Image.open(content).convert("RGB"))
    np.testing.assert_array_equal(
        np.asarray(InputFile("x.jpg", content.getvalue()).rgb()), expected
    )


# ---- What belongs to a photo ------------------------------------------------------------------


@cache
def profile(pad: int = 0) -> bytes:
    """One in which red and green are exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = (
        data.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)
    )
    return struct.pack(">I", len(data) + pad) + data[4:] + bytes(pad)


def pair_of(folder: Path, image: Path | str, size: tuple[int, int]) -> Pair:
    """With a mask that hides the upper left corner."""
    mask = Image.new("L", size, 255)
    mask.paste(0, (0, 0, 12, 12))
    mask.save(folder / "mask.png")
    return Pair(0, str(image), str(folder / "mask.png"), "photo.png")


def write(folder: Path, file: InputFile) -> Path:
    (folder / file.path).write_bytes(file.data)
    return folder / file.path


def result_of(pair: Pair) -> Image.Image:
    """The photo of a pair, filled with grey, as it is written."""
    photo = load_pair(pair, REGION, 16)
    greys = [np.full((16, 16, 3), 128, np.uint8)] * photo.views
    return Image.open(io.BytesIO(photo.encode(photo.finish(greys))))


@pytest.mark.parametrize("suffix", TYPES)
@pytest.mark.parametrize("pad", [0, 200_000])
def test_a_colour_profile_comes_back(tmp_path, suffix, pad):
    file = file_of(suffix, icc_profile=profile(pad))
    pair = pair_of(tmp_path, write(tmp_path, file), (48, 32))
    result = result_of(pair)
    assert result.info["icc_profile"] == profile(pad)
    assert messages_of([pair], 16, REGION) == []


def test_a_profile_shows_the_known_colours_as_in_the_photo(tmp_path):
    pair = pair_of(tmp_path, write(tmp_path, file_of("png", icc_profile=profile())), (48, 32))
    seen = []
    for picture in (Image.open(pair.image_path), result_of(pair)):
        own = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        shown = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"))
        seen.append(np.asarray(shown)[16:])
    np.testing.assert_array_equal(*seen)
    assert (seen[0][0, 0] != RED).any()  # the profile matters


def test_other_chunks_that_tell_colours_come_back(tmp_path):
    data = file_of("png").data
    chunks = {
        b"gAMA": struct.pack(">I", 100_000),
        b"cHRM": bytes(range(32)),
        b"cICP": b"\x0c\x0d\0\1",
    }
    extra = b"".join(chunk(kind, content) for kind, content in chunks.items())
    (tmp_path / "p.png").write_bytes(data[:33] + extra + data[33:])
    png = load_pair(pair_of(tmp_path, tmp_path / "p.png", (48, 32)), REGION, 16)
    written = png.encode(np.asarray(halves()))
    assert all(chunk(kind, content) in written for kind, content in chunks.items())


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_comes_back_but_its_turn_and_its_thumbnail(tmp_path, suffix):
    thumbnail = b"\xff\xd8 the face that was removed \xff\xd9"
    for after in (b"", b"something after it"):
        file = file_of(suffix, with_thumbnail(exif(), thumbnail) + after)
        result = result_of(pair_of(tmp_path, write(tmp_path, file), (32, 48)))
        assert result.size == (32, 48)
        kept = result.info["exif"]
        assert b"Pinhole" in kept and b"removed" not in kept
        assert struct.pack("<iI", -1, 0) in kept
        assert result.getexif()[0x0112] == 1 and result.getexif().get_ifd(ExifTags.IFD.IFD1) == {}


def test_exif_of_a_tiff_comes_back(tmp_path):
    given = Image.Exif()
    given[0x0112], given[0x0110] = 6, "Pinhole 3"
    given[0x8769] = {0x9003: "2020:02:03 04:05:06"}
    halves().save(tmp_path / "p.tiff", exif=given.tobytes())
    kept = result_of(pair_of(tmp_path, tmp_path / "p.tiff", (32, 48))).getexif()
    assert kept[0x0110] == "Pinhole 3" and 0x0112 not in kept and 0x0111 not in kept
    assert kept.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"


def transparent(mode: str) -> tuple[Image.Image, dict[str, object], np.ndarray]:
    """A picture, options to save it with, and its alpha: the right half is 0, or 100."""
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, 24:] = 100 if mode in ("RGBA", "LA") else 0
    if mode in ("RGBA", "LA"):
        picture = halves().convert(mode[:-1])
        picture.putalpha(Image.fromarray(alpha))
        return picture, {}, alpha
    if mode == "P":
        return halves().quantize(4), {"transparency": None}, alpha
    if mode == "I;16":
        values = np.where(alpha == 0, 900, 60_000).astype(np.uint16)
        return Image.fromarray(values), {"transparency": 900}, alpha
    colour = {"RGB": BLUE, "L": halves().convert("L").getpixel((40, 5)), "1": 0}[mode]
    return halves().convert(mode, dither=Image.Dither.NONE), {"transparency": colour}, alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "I;16", "P"])
def test_transparency_comes_back_and_holes_are_opaque(tmp_path, mode):
    picture, options, alpha = transparent(mode)
    if mode == "P":
        options = {"transparency": picture.getpixel((40, 5))}
    picture.save(tmp_path / "p.png", **options)
    pair = pair_of(tmp_path, tmp_path / "p.png", (48, 32))
    Image.fromarray(np.where(np.indices((32, 48))[0] < 10, 0, 255).astype(np.uint8)).save(
        pair.mask_path
    )
    result = result_of(pair)
    assert result.mode == "RGBA"
    written = np.asarray(result)
    assert (written[:10, :, 3] == 255).all()
    np.testing.assert_array_equal(written[10:, :, 3], alpha[10:])
    np.testing.assert_array_equal(
        written[10:, :, :3], np.asarray(read_input(pair.image_path).rgb())[10:]
    )


def test_an_alpha_that_is_opaque_all_over_makes_no_difference(tmp_path):
    halves().convert("RGBA").save(tmp_path / "p.png")
    assert result_of(pair_of(tmp_path, tmp_path / "p.png", (48, 32))).mode == "RGB"


def rich_photo(folder: Path) -> Pair:
    picture = transparent("RGBA")[0]
    picture.save(folder / "p.png", icc_profile=profile(), exif=b"Exif\0\0" + exif(orientation=1))
    return pair_of(folder, folder / "p.png", (48, 32))


def test_crops_keep_nothing_and_say_so(tmp_path):
    pair = rich_photo(tmp_path)
    crop = load_pair(pair, DATASET, 16)
    made = np.asarray(noise(16, 16))
    assert crop.encode(made) == encode_png(made)
    lost = [message for message in messages_of([pair], 16) if "results" in message]
    assert [message.split(f"first {pair.image_path}, ")[1][:30] for message in lost] == [
        "are transparent in places, whi",
        "have a colour profile, which r",
    ]
    assert all(message.startswith("1 of 1 images") for message in lost)


def test_pictures_as_they_are_keep_all(tmp_path):
    pair = rich_photo(tmp_path)
    crop = load_pair(pair, DATASET, None, known_from=128)
    result = Image.open(io.BytesIO(crop.encode(crop.finish([np.zeros((32, 48, 3), np.uint8)]))))
    assert (result.mode, result.info["icc_profile"]) == ("RGBA", profile())
    assert b"Pinhole" in result.info["exif"]
    assert (np.asarray(result)[:12, :12, 3] == 255).all()


def test_a_profile_like_srgb_is_not_worth_a_word(tmp_path):
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert not looks_otherwise(same) and looks_otherwise(profile())
    assert not looks_otherwise(b"no profile")
    pair = pair_of(tmp_path, write(tmp_path, file_of("jpg", icc_profile=same)), (48, 32))
    assert not any("profile" in message for message in messages_of([pair], 16))


@pytest.mark.parametrize(
    ("icc", "words"),
    [
        (profile()[:16] + b"CMYK" + profile()[20:], "not for RGB"),
        (profile()[:16] + b"GRAY" + profile()[20:], "not for RGB"),
        (b"no profile", "cannot be read"),
        (bytes(3000), "cannot be read"),
    ],
    ids=["cmyk", "grey", "text", "zeros"],  # profiles hold the time when they were made
)
@pytest.mark.parametrize("dataset", [DATASET, REGION])
def test_profiles_that_results_cannot_keep_are_told(tmp_path, icc, words, dataset):
    pair = pair_of(tmp_path, write(tmp_path, file_of("png", icc_profile=icc)), (48, 32))
    assert sum(words in message for message in messages_of([pair], 16, dataset)) == 1
    assert "icc_profile" not in result_of(pair).info


# ---- 16 bits ----------------------------------------------------------------------------------


def deep_png(colour_type: int, highest: int) -> bytes:
    channels = {0: 1, 2: 3}[colour_type]
    values = np.linspace(0, highest, 48 * 32 * channels).astype(">u2").reshape(32, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 48, 32, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("highest", "told"), [(1023, 1), (4095, 1), (16000, 1), (16800, 0), (65535, 0)]
)
@pytest.mark.parametrize("kind", ["grey.png", "colour.png", "grey.tiff"])
def test_16_bit_pictures_that_are_nearly_black_are_told(tmp_path, kind, highest, told):
    if kind == "grey.tiff":
        values = np.linspace(0, highest, 48 * 32).astype(np.uint16).reshape(32, 48)
        Image.fromarray(values).save(tmp_path / kind)
    else:
        (tmp_path / kind).write_bytes(deep_png(0 if "grey" in kind else 2, highest))
    pair = pair_of(tmp_path, tmp_path / kind, (48, 32))
    assert sum("white is 65535" in message for message in messages_of([pair], 16, REGION)) == told


def test_dark_pictures_of_8_bits_are_just_dark(tmp_path):
    Image.new("RGB", (48, 32), (9, 9, 9)).save(tmp_path / "p.png")
    assert messages_of([pair_of(tmp_path, tmp_path / "p.png", (48, 32))], 16, REGION) == []


# ---- Large pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", TYPES)
def test_the_limit_of_the_library_is_not_ours(monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = file_of(suffix)
    with silent():
        assert file.rgb().size == (48, 32) and file.size() == (32, 48)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(files, "MOST_PIXELS", 1535)
    message = user_error(file.rgb)
    assert f"image photo.{suffix} is too large: 48x32 are 1,536 pixels" in message


def test_the_report_shows_pictures_beyond_the_limit_of_the_library(tmp_path, monkeypatch):
    noise(700, 9).save(tmp_path / "r.png", icc_profile=profile())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    row = report.Row(
        "r.png", None, str(tmp_path / "r.png"), (str(tmp_path / "r.png"),), (1.0,), (0,)
    )
    with silent():
        report.write_report(str(tmp_path / "report.html"), "", {}, [row])
    (thumbnail,) = (tmp_path / "report").iterdir()
    monkeypatch.undo()
    with Image.open(thumbnail) as shown:
        assert shown.size == (512, 7) and shown.info["icc_profile"] == profile()
