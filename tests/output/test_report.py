"""The report's page and thumbnails as files; test_report_in_chromium looks at them in a browser."""

import os
import re
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.machine import storage
from guided_diffusion.output import report
from guided_diffusion.output.report import Row, write_report
from tests.support.reports import NASTY, draw, make_row


class Page(HTMLParser):
    """What a browser finds in a page: elements, with attributes, and the text within."""

    def __init__(self, path: Path | str):
        super().__init__()
        with storage.open_binary(str(path)) as file:
            self.source = file.read().decode()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("img", "input", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        for tag in set(self.open):
            self.texts[tag][-1] += text

    def values(self, tag: str, attribute: str) -> list[str]:
        found = (values.get(attribute) for name, values in self.elements if name == tag)
        return [value for value in found if value is not None]

    @property
    def shown(self) -> list[str]:
        """The URLs of all pictures, those behind buttons too."""
        return [*self.values("img", "src"), *self.values("button", "value")]

    @property
    def links(self) -> list[str]:
        return self.values("a", "href")


def target(page: Path, url: str) -> Path:
    """The file that a relative URL leads to, as a browser finds it: text, ? and # cut off first."""
    assert not re.match(r"[a-z]+:|/", url, re.IGNORECASE), url
    path = url.partition("#")[0].partition("?")[0]
    return page.parent / os.fsdecode(unquote_to_bytes(path))


@pytest.fixture
def page(tmp_path) -> Path:
    return tmp_path / "log" / "run" / "report.html"


# ---- What the page says -----------------------------------------------------------------------


def test_a_row_has_its_pictures_in_order_with_seconds_and_seed(page):
    row = replace(make_row(page.parent, samples=2), seconds=(3.94, 75.2), seeds=(5, 105))
    write_report(str(page), "demo", {"Seed": "5"}, [row])
    parsed = Page(page)
    assert parsed.links == ["gt/x.png", "gt_masked/x.png", "inpainted/x_0.png", "inpainted/x_1.png"]
    captions = ["Input", "Masked", "Result 13.9 sseed 5", "Result 21 min 15 sseed 105"]
    assert parsed.texts["figcaption"] == captions
    assert (parsed.texts["h1"], parsed.texts["title"]) == (["demo"], ["demo"])
    assert (parsed.texts["dt"], parsed.texts["dd"]) == (["Seed"], ["5"])
    assert parsed.texts["h2"] == ["x.png"]


def test_the_comparison_starts_with_input_and_first_result_and_offers_the_others(page):
    write_report(str(page), "", {}, [make_row(page.parent, samples=2)])
    parsed = Page(page)
    assert parsed.values("img", "src")[:2] == ["gt/x.png", "inpainted/x_0.png"]
    assert parsed.values("img", "alt")[:2] == ["Input of x.png", "Result 1 of x.png"]
    assert parsed.texts["button"] == ["Input", "Masked", "1", "2"]
    assert parsed.values("button", "aria-pressed") == ["true", "false", "true", "false"]
    in_order = ["gt/x.png", "gt_masked/x.png", "inpainted/x_0.png", "inpainted/x_1.png"]
    assert parsed.values("button", "value") == in_order


def test_without_an_input_masked_and_result_are_compared_and_nothing_is_to_choose(page):
    write_report(str(page), "", {}, [replace(make_row(page.parent), input=None)])
    parsed = Page(page)
    assert parsed.values("img", "src") == ["gt_masked/x.png", "inpainted/x.png"] * 2
    assert parsed.values("button", "value") == []


def test_the_animation_is_linked_if_there_is_one(page):
    row = make_row(page.parent)
    write_report(str(page), "", {}, [replace(row, process=f"{page.parent}/process/a b.webp"), row])
    assert [url for url in Page(page).links if "process" in url] == ["process/a%20b.webp"]


def test_a_page_without_rows_says_so(page):
    write_report(str(page), "demo", {}, [])
    assert "No images yet." in Page(page).texts["p"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "0.0 s"), (3.895, "3.9 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s")),
        *((65, "1 min 05 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min")),
        *((7385, "2 h 03 min"), (360000, "100 h 00 min")),
    ],
)
def test_durations_are_written_for_people(page, seconds, text):
    write_report(str(page), "", {}, [replace(make_row(page.parent), seconds=(seconds,))])
    assert Page(page).texts["figcaption"][-1] == f"Result{text}seed 0"


# ---- Names ------------------------------------------------------------------------------------


def test_any_name_is_shown_as_it_is_and_its_links_lead_to_its_files(page):
    rows = [make_row(page.parent, name) for name in NASTY]
    write_report(str(page), "<b>&amp;$rows", {"<i>": '"</dd>'}, rows)
    parsed = Page(page)
    assert parsed.texts["h2"] == list(NASTY)
    assert parsed.texts["h1"] == ["<b>&amp;$rows"]
    assert (parsed.texts["dt"], parsed.texts["dd"]) == (["<i>"], ['"</dd>'])
    assert len(parsed.texts["script"]) == 1
    paths = [row.pictures() for row in rows]
    expected = [path for three in paths for path in three]
    assert [str(target(page, url)) for url in parsed.links] == expected
    shown = [path for a, b, c in paths for path in (a, c, a, b, c)]
    assert [str(target(page, url)) for url in parsed.values("img", "src")] == shown
    alts = parsed.values("img", "alt")[4::5]
    assert alts == [f"Result of {name}" for name in NASTY]


@pytest.mark.skipif(sys.platform == "darwin", reason="all names are text there")
def test_a_name_that_is_no_text_does_not_stop_the_report(page):
    name = os.fsdecode(b"caf\xe9.png")
    write_report(str(page), name, {}, [make_row(page.parent, name)])
    parsed = Page(page)
    assert parsed.links[0] == "gt/caf%E9.png"
    assert parsed.texts["h2"] == ["caf?.png"]


# ---- Links ------------------------------------------------------------------------------------


def test_the_page_is_the_same_by_whatever_path_one_comes_to_it(page, tmp_path, monkeypatch):
    write_report(str(page), "", {}, [make_row(page.parent, size=(600, 8))])
    before = page.read_bytes()
    for folder, name in ((tmp_path, "log/run"), (page.parent, "."), (page.parent / "gt", "..")):
        monkeypatch.chdir(folder)
        page.unlink()
        write_report(f"{name}/report.html", "", {}, [make_row(name, size=(600, 8))])
        assert page.read_bytes() == before


def test_pictures_elsewhere_on_the_machine_are_linked_through_the_folders_above(page, tmp_path):
    row = replace(make_row(page.parent), input=draw(tmp_path / "photos" / "x.png"))
    write_report(str(page), "", {}, [row])
    assert Page(page).links[0] == "../../photos/x.png"


def test_pictures_on_another_drive_get_a_thumbnail_and_a_link_by_their_whole_path(
    page, tmp_path, monkeypatch
):
    other = draw(tmp_path / "other drive" / "x#.png")
    monkeypatch.setattr(report, "_root", lambda path: "D:" if "other drive" in path else "C:")
    write_report(str(page), "", {}, [replace(make_row(page.parent), input=other)])
    parsed = Page(page)
    assert parsed.links[0] == f"file://{tmp_path}/other%20drive/x%23.png"
    assert re.fullmatch(r"report/\w+\.jpg", parsed.shown[0])
    assert target(page, parsed.shown[0]).exists()


def put_row(folder: str, local: Row) -> Row:
    """A row of the same pictures in a store."""
    paths = [f"{folder}/{kind} 1/x.png" for kind in ("gt", "gt_masked", "inpainted")]
    for path, source in zip(paths, local.pictures(), strict=True):
        storage.write_atomically(path, Path(source).read_bytes())
    return replace(local, input=paths[0], masked=paths[1], results=(paths[2],))


@pytest.mark.parametrize(
    "store", ["gs://bucket", "az://account/box", "https://account.blob.core.windows.net/box"]
)
def test_in_a_store_links_are_relative_and_thumbnails_lie_beside_the_page(cloud, tmp_path, store):
    row = put_row(f"{store}/log/run", make_row(tmp_path, size=(600, 8)))
    storage.write_atomically(f"{store}/photos/y.png", Path(draw(tmp_path / "y.png")).read_bytes())
    row = replace(row, masked=f"{store}/photos/y.png")
    write_report(f"{store}/log/run/report.html", "", {}, [row])
    parsed = Page(f"{store}/log/run/report.html")
    assert parsed.links == ["gt%201/x.png", "../../photos/y.png", "inpainted%201/x.png"]
    thumbnails = {url for url in parsed.shown if url.startswith("report/")}
    assert set(parsed.shown) == {"../../photos/y.png", *thumbnails}
    files = storage.list_files(f"{store}/log/run/report")
    assert {f"{store}/log/run/{url}" for url in thumbnails} == set(files)


@pytest.mark.parametrize(
    ("store", "url"),
    [
        ("gs://bucket", "https://storage.googleapis.com/bucket"),
        ("az://account/box", "https://account.blob.core.windows.net/box"),
        ("https://account.blob.core.windows.net/box", "https://account.blob.core.windows.net/box"),
    ],
)
def test_pictures_in_another_store_are_shown_by_thumbnails_without_the_network(
    cloud, page, tmp_path, store, url
):
    write_report(str(page), "", {}, [put_row(f"{store}/run", make_row(tmp_path))])
    parsed = Page(page)
    assert parsed.links[0] == f"{url}/run/gt%201/x.png"
    assert all(target(page, shown).exists() for shown in parsed.shown)


def test_the_page_asks_nothing_of_the_network(page):
    write_report(str(page), "", {}, [make_row(page.parent)])
    source = Page(page).source
    assert re.findall(r"url\([\"']?(\w+:)", source) == ["data:"]
    assert "@import" not in source
    # The name of SVG, which nobody fetches, within the one picture that the page holds.
    assert re.findall(r"https?://[\w./]+", source) == ["http://www.w3.org/2000/svg"]


# ---- Thumbnails -------------------------------------------------------------------------------


def test_large_pictures_are_shown_by_thumbnails_that_link_to_them(page):
    rows = [make_row(page.parent, "at.png", size=(512, 300))]
    rows += [make_row(page.parent, "above.png", size=(100, 1024))]
    write_report(str(page), "", {}, rows)
    parsed = Page(page)
    figures = parsed.values("img", "src")[2:5] + parsed.values("img", "src")[7:]
    assert figures[:3] == parsed.links[:3] == ["gt/at.png", "gt_masked/at.png", "inpainted/at.png"]
    assert parsed.links[3:] == ["gt/above.png", "gt_masked/above.png", "inpainted/above.png"]
    for url, colour in zip(figures[3:], ((0, 0, 255), (128, 128, 128), (255, 0, 0)), strict=True):
        with Image.open(target(page, url)) as thumbnail:
            assert (thumbnail.format, thumbnail.size) == ("JPEG", (50, 512))
            assert np.abs(np.asarray(thumbnail, int) - colour).max() <= 3
    assert len(list((page.parent / "report").iterdir())) == 3
    assert re.findall(r"--ratio:(\d+/\d+)", parsed.source) == ["512/300", "50/512"]


def test_what_browsers_do_not_show_gets_a_thumbnail_and_photos_are_upright(page, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (1024, 256)).save(tmp_path / "turned.jpg", exif=exif)
    row = make_row(page.parent)
    row = replace(row, input=draw(tmp_path / "x.TIF"), masked=f"{tmp_path}/turned.jpg")
    write_report(str(page), "", {}, [row])
    thumbnails = [target(page, url) for url in Page(page).values("img", "src")[2:4]]
    assert [Image.open(path).size for path in thumbnails] == [(8, 6), (128, 512)]


def test_a_picture_that_cannot_be_read_is_linked_itself(page):
    row = make_row(page.parent)
    Path(row.masked).write_bytes(b"no picture")
    Path(row.results[0]).unlink()
    write_report(str(page), "", {}, [row])
    assert Page(page).shown.count("gt_masked/x.png") == 2
    assert Page(page).shown.count("inpainted/x.png") == 2
    assert not (page.parent / "report").exists()


def test_nothing_changes_when_nothing_changed_and_a_new_picture_gets_a_new_thumbnail(page):
    rows = [make_row(page.parent, size=(600, 400))]
    write_report(str(page), "", {}, rows)

    def files() -> dict[str, tuple[int, int]]:
        found = map(os.stat, sorted((page.parent / "report").iterdir()))
        return [(stat.st_ino, stat.st_mtime_ns) for stat in found]

    before, content = files(), page.read_bytes()
    write_report(str(page), "", {}, iter(rows))
    assert (files(), page.read_bytes()) == (before, content)
    time.sleep(0.01)  # a new time
    draw(rows[0].results[0], (600, 400), "green")
    write_report(str(page), "", {}, rows)
    assert len(set(files()) - set(before)) == 1
    with Image.open(target(page, Page(page).values("img", "src")[-1])) as thumbnail:
        assert thumbnail.getpixel((5, 5))[1] > 100
    assert page.read_bytes() == content


def test_what_cannot_be_written_leaves_the_page_as_it_was(page):
    rows = [make_row(page.parent, size=(600, 8))]
    page.write_text("before")
    (page.parent / "report").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        write_report(str(page), "", {}, rows)
    assert page.read_text() == "before"
    assert sorted(path.name for path in page.parent.iterdir()) == [
        *("gt", "gt_masked", "inpainted", "report", "report.html")
    ]


# ---- Many -------------------------------------------------------------------------------------


def test_a_hundred_images_take_little_time_and_space(page):
    rows = [make_row(page.parent, f"{i:06}_a_name_of_some_length.png", 2) for i in range(100)]
    start = time.perf_counter()
    write_report(str(page), "demo", {}, rows)
    assert time.perf_counter() - start < 5
    assert page.stat().st_size < 400_000


def test_ten_thousand_rows_are_built_in_seconds_and_loaded_when_they_are_seen(page):
    write_report(str(page), "demo", {}, [make_row(page.parent)] * 10_000)
    parsed = page.read_text()
    assert parsed.count("<article") == 10_000
    assert parsed.count("<img") == parsed.count('loading="lazy"') == 50_000
    assert len(parsed) < 20_000_000
