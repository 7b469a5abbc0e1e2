"""The report of a run: a page that shows its pictures side by side, and opens from the disk.

The page, report.html, holds its own style and script, and links to the pictures; those that are
large, or that a browser cannot show or reach, get a smaller copy in the folder `report` beside it.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from guided_diffusion.config import UserError
from guided_diffusion.images import files
from guided_diffusion.machine import storage

LARGE = 512  # the longest side of a picture that is shown as it is, in pixels
THREADS = 4  # that make thumbnails; each holds one picture, of any size

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of files are shown as text, whatever is in them
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp")


@dataclass(frozen=True)
class Row:
    """One image of a run. Paths are as the program uses them, on this machine or in a store."""

    name: str  # sub/x.png
    input: str | None  # None if the run does not write it
    masked: str
    results: tuple[str, ...]  # one a sample, at least one
    seconds: tuple[float, ...]  # one a sample
    seeds: tuple[int, ...]  # one a sample
    process: str | None = None  # the animation of how it was made

    def pictures(self) -> tuple[str, ...]:
        """The paths of all its pictures."""
        return (*filter(None, [self.input]), self.masked, *self.results)


@dataclass(frozen=True)
class _Picture:
    """A picture as the page needs it."""

    link: str  # URL of the file itself
    shown: str  # URL of the file, or of its thumbnail
    size: tuple[int, int]  # of what is shown; (1, 1) if it cannot be read


def write_report(path: str, title: str, facts: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Write the page at `path`, such as log/NAME/report.html, and thumbnails beside it.

    facts: what to say about the whole run, name -> value, in the order to be shown.
    Links are relative to the page's folder wherever that can be, so that the log folder can be
    moved; the page is the same bytes when nothing changed. Thumbnails of unchanged pictures are
    kept. Raises OSError; the page, written last, is then what it was.
    """
    rows = list(rows)
    paths = list(dict.fromkeys(path for row in rows for path in row.pictures()))
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(paths, pool.map(partial(_picture, page=path), paths), strict=True))
    shown = [_shown(row, found, path) for row in rows]
    template = _ENVIRONMENT.get_template("report_template.html")
    page = template.render(title=title, facts=facts, rows=shown)
    # A file's name may have bytes that are no text.
    storage.write_atomically(path, page.encode("utf-8", errors="replace"))


# ---- Links and thumbnails ----


def _picture(path: str, page: str) -> _Picture:
    """How the page shows a picture, for which a thumbnail is made if it needs one."""
    link = _link(path, page)
    if _can_be_shown(path, link):
        size = _size(path)
        if size and max(size) <= LARGE:
            return _Picture(link, link, size)
    thumbnail = f"{_beside(page)}/{hashlib.sha256(link.encode()).hexdigest()[:20]}.jpg"
    if not _is_of(thumbnail, path):
        try:
            _write_thumbnail(path, thumbnail)
        except UserError:  # it cannot be read; perhaps the browser does better
            return _Picture(link, link, (1, 1))
    return _Picture(link, _link(thumbnail, page), _size(thumbnail) or (1, 1))


def _beside(page: str) -> str:
    """The folder of a page's thumbnails."""
    return os.path.splitext(page)[0]


def _can_be_shown(path: str, link: str) -> bool:
    """Whether a browser can show a picture from the disk, without a look at its size."""
    return PurePath(path).suffix.lower() in _SHOWN_BY_BROWSERS and ":" not in link


def _size(path: str) -> tuple[int, int] | None:
    """Width and height of a picture, by its first bytes; None if they cannot be read."""
    try:
        with storage.open_binary(path) as file:
            return files.peek_size(file)
    except Exception:  # Pillow reports damaged files by many unrelated types
        return None


def _write_thumbnail(path: str, thumbnail: str) -> None:
    """Raises UserError if the picture cannot be read, OSError if nothing can be written."""
    decoded = files.read_input(path).decoded()
    image, icc = decoded.rgb, decoded.kept.icc
    image.thumbnail((LARGE, LARGE))
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=90, icc_profile=icc or None)
    storage.write_atomically(thumbnail, content.getvalue())
    if not storage.is_remote(path) and not storage.is_remote(thumbnail):
        time = os.stat(path).st_mtime_ns
        os.utime(thumbnail, ns=(time, time))


def _is_of(thumbnail: str, path: str) -> bool:
    """Whether there is a thumbnail of the picture as it is now: both then have the same time."""
    try:
        return os.stat(thumbnail).st_mtime_ns == os.stat(path).st_mtime_ns
    except OSError:  # also where one is in a store
        return False


def _link(path: str, page: str) -> str:
    """The URL of a file: relative to the page, if both are on one drive or in one store."""
    if _root(path) == _root(page):
        return _quote(_relative(path, page))
    if not storage.is_remote(path):
        return Path(path).absolute().as_uri()
    kind, _, rest = path.partition("://")
    if kind == "gs":
        return f"https://storage.googleapis.com/{_quote(rest)}"
    if kind == "az":
        account, _, rest = rest.partition("/")
        return f"https://{account}.blob.core.windows.net/{_quote(rest)}"
    return f"{kind}://{_quote(rest)}"


def _root(path: str) -> str:
    """What two paths must share for one to be reached from the other: gs://bucket, or a drive."""
    if storage.is_remote(path):
        return "/".join(path.split("/", 3)[:3])
    return os.path.splitdrive(os.path.abspath(path))[0].lower()


def _relative(path: str, page: str) -> str:
    if storage.is_remote(path):
        return posixpath.relpath(path, posixpath.dirname(page))
    # By the paths' text, as browsers do it, links or not.
    return PurePath(os.path.relpath(path, os.path.dirname(os.path.abspath(page)))).as_posix()


def _quote(path: str) -> str:
    return quote(path.encode("utf-8", errors="surrogateescape"))


# ---- Rows as the template takes them ----


@dataclass(frozen=True)
class _Shown:
    """A picture in its row."""

    kind: str  # Input, Masked, Result, Result 2
    alt: str
    picture: _Picture
    remarks: tuple[str, ...] = ()  # what to say below it


@dataclass(frozen=True)
class _ShownRow:
    """A row with all that the page says of it."""

    name: str  # sub/x.png
    process: str | None  # URL of the animation
    before: list[_Shown]  # input and masked, or masked alone
    results: list[_Shown]


def _shown(row: Row, found: Mapping[str, _Picture], page: str) -> _ShownRow:
    def shown(kind: str, path: str, *remarks: str) -> _Shown:
        return _Shown(kind, f"{kind} of {row.name}", found[path], remarks)

    several = len(row.results) > 1
    made = zip(row.results, row.seconds, row.seeds, strict=True)
    return _ShownRow(
        row.name,
        row.process and _link(row.process, page),
        [*([shown("Input", row.input)] if row.input else []), shown("Masked", row.masked)],
        [
            shown(f"Result {i}" if several else "Result", path, _duration(seconds), f"seed {seed}")
            for i, (path, seconds, seed) in enumerate(made, start=1)
        ],
    )


def _duration(seconds: float) -> str:
    """3.9 s, 1 min 05 s, 2 h 03 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
