"""The report in a browser: it opens from the disk, and its slider works."""

import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.output.report import write_report
from tests.support.reports import NASTY, draw, make_row

pytest.importorskip("selenium", reason="selenium is not installed: see requirements-dev.txt")
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.slow  # the browser

if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip(
        "no Chromium here; on Debian: apt install chromium chromium-driver",
        allow_module_level=True,
    )

SCRIPT = Path(__file__).parents[2] / "docs" / "make" / "draw_report.py"
BLUE, GREY, RED, GREEN = (0, 0, 255), (128, 128, 128), (255, 0, 0), (0, 128, 0)


def load_script():
    """Import the stand-alone script, which lies outside every package."""
    spec = importlib.util.spec_from_file_location("draw_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_report = load_script()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with draw_report.open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """The URL of a report of two samples, then of one of each nasty name, large, and wide."""
    folder = tmp_path_factory.mktemp("with space#") / "log"
    rows = [make_row(folder, "first.png", samples=2, size=(64, 64))]
    draw(rows[0].results[1], (64, 64), "green")
    rows += [make_row(folder, name) for name in NASTY]
    rows += [make_row(folder, "large.png", size=(1200, 800))]
    rows += [make_row(folder, "x" * 200 + ".png", samples=9, size=(300, 100))]
    facts = {"Model": "a/very/long/path/" * 10, "Images": str(len(rows))}
    write_report(str(folder / "report.html"), "A run <b>", facts, rows)
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser, report) -> Chrome:
    draw_report.set_screen(browser, 1200, 900)
    browser.get_log("browser")
    browser.get(report)
    return browser


def find(page: Chrome, selector: str) -> WebElement:
    """The first such element of the first row."""
    return page.find_element(By.CSS_SELECTOR, f"article {selector}")


def screenshot(source: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source)).convert("RGB"), int)


def share(page: Chrome, left: tuple[int, ...] = BLUE, right: tuple[int, ...] = RED) -> float:
    """How much of the first comparison shows the left picture; the rest shows the right one."""
    line = screenshot(find(page, ".stage").screenshot_as_png)[10]  # above the handle's knob
    lefts, rights = (np.abs(line - colour).max(axis=1) < 8 for colour in (left, right))
    # The handle, with its shadow, hides up to twenty columns.
    assert lefts.sum() + rights.sum() >= len(line) - 24
    last, first = np.flatnonzero(lefts)[-1:], np.flatnonzero(rights)[:1]
    end = last[0] + 1 if len(last) else 0
    begin = first[0] if len(first) else len(line)
    assert end <= begin
    return (end + begin) / 2 / len(line)


def load_all(page: Chrome) -> None:
    """Load the pictures that are out of sight too, and wait for all."""
    page.execute_async_script(
        """
        const done = arguments[0], images = [...document.images];
        for (const image of images) image.loading = "eager";
        Promise.allSettled(images.map(image => image.decode())).then(done);
        """
    )


# ---- It opens ---------------------------------------------------------------------------------


def test_every_picture_is_shown_whatever_its_name(page):
    load_all(page)
    widths = page.execute_script("return [...document.images].map(i => [i.src, i.naturalWidth])")
    assert len(widths) == 6 + 5 * (len(NASTY) + 1) + 2 + 11
    assert [source for source, width in widths if width == 0] == []
    links = page.execute_script(
        "return [...document.querySelectorAll('figure a')].map(a => a.href)"
    )
    assert len(set(links)) == 4 + 3 * (len(NASTY) + 1) + 11


def test_nothing_fails_and_nothing_is_asked_of_the_network(page):
    load_all(page)
    events = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and event["params"]["documentURL"] == page.current_url
    }
    assert len(urls) > 3 * len(NASTY)
    assert {url.partition(":")[0] for url in urls} == {"file", "data"}
    assert page.get_log("browser") == []


def test_names_are_text_and_run_nothing(page):
    assert page.execute_script("return document.scripts.length") == 1
    assert find(page, "h2").text == "first.png"
    titles = page.execute_script(
        "return [...document.querySelectorAll('h2')].map(e => e.textContent)"
    )
    assert titles[1:-2] == list(NASTY)


def test_pictures_out_of_sight_are_not_loaded(page):
    late = page.execute_script(
        "return [...document.querySelectorAll('article:last-child img')].map(i => i.complete)"
    )
    assert len(late) == 13 and not any(late)


# ---- The slider -------------------------------------------------------------------------------


def test_at_first_it_shows_half_of_each(page):
    assert share(page) == pytest.approx(0.5, abs=0.01)


def test_keys_move_it(page):
    slider = find(page, "input")
    slider.send_keys(Keys.ARROW_RIGHT * 10)
    assert share(page) == pytest.approx(0.6, abs=0.01)
    slider.send_keys(Keys.HOME)
    assert share(page) == pytest.approx(0, abs=0.04)
    slider.send_keys(Keys.END)
    assert share(page) == pytest.approx(1, abs=0.04)


def test_the_mouse_drags_it_also_from_a_place_beside_the_handle(page):
    stage = find(page, ".stage")
    width = stage.size["width"]
    press = ActionChains(page, duration=20).move_to_element_with_offset(stage, -width // 4, 0)
    press.click_and_hold().perform()
    assert share(page) == pytest.approx(0.25, abs=0.01)
    ActionChains(page, duration=20).move_by_offset(width // 2, 5).perform()
    assert share(page) == pytest.approx(0.75, abs=0.01)
    ActionChains(page, duration=20).move_by_offset(width, 0).release().perform()
    assert share(page) == pytest.approx(1, abs=0.04)
    ActionChains(page, duration=20).move_by_offset(-width, 0).perform()  # not held any more
    assert share(page) == pytest.approx(1, abs=0.04)
    assert find(page, "input").get_property("value") == "100"


def test_the_thumb_of_the_slider_is_below_the_handle(page):
    slider, width = find(page, "input"), find(page, ".stage").size["width"]
    for percent in (10, 80):
        offset = round((percent / 100 - 0.5) * width)
        ActionChains(page).move_to_element_with_offset(slider, offset, 0).click().perform()
        assert share(page) == pytest.approx(percent / 100, abs=0.01)


def test_after_a_click_the_keys_go_on_from_there(page):
    stage = find(page, ".stage")
    offset = round(-0.3 * stage.size["width"])
    ActionChains(page).move_to_element_with_offset(stage, offset, 0).click().perform()
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT * 5)
    assert share(page) == pytest.approx(0.15, abs=0.01)


def swipe(page: Chrome, x: int, y: int) -> None:
    """Move a finger from the middle of the first comparison by so many pixels."""
    stage = find(page, ".stage").rect
    start = (stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    for step in range(11):
        point = {"x": start[0] + step / 10 * x, "y": start[1] + step / 10 * y}
        touch = {"type": "touchMove" if step else "touchStart", "touchPoints": [point]}
        page.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def rest(page: Chrome) -> float:
    """Where the page is scrolled to, once that does not change any more."""
    positions = [None]

    def stands(page: Chrome) -> bool:
        positions.append(page.execute_script("return scrollY"))
        return positions[-1] == positions[-2]

    WebDriverWait(page, 10, poll_frequency=0.3).until(stands)
    return positions[-1]


def test_a_finger_drags_it_or_scrolls_the_page_past_it(page):
    find(page, "input").send_keys(Keys.ARROW_RIGHT * 10)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    swipe(page, 0, -200)
    assert rest(page) > 100
    page.execute_script("scrollTo(0, 0)")
    assert rest(page) == 0  # else the finger would miss the comparison
    assert share(page) == pytest.approx(0.6, abs=0.01)
    swipe(page, find(page, ".stage").size["width"] // 4, 0)
    WebDriverWait(page, 10).until(lambda _: share(page) == pytest.approx(0.75, abs=0.01))
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_buttons_choose_what_is_compared(page):
    find(page, "button[title^=Masked]").click()
    load_all(page)
    assert share(page, left=GREY) == pytest.approx(0.5, abs=0.01)
    find(page, "button[title^='Result 2']").click()
    load_all(page)
    assert share(page, left=GREY, right=GREEN) == pytest.approx(0.5, abs=0.01)
    pressed = page.execute_script(
        "return [...document.querySelectorAll('article:first-child [aria-pressed=true]')]"
        ".map(e => e.textContent)"
    )
    assert pressed == ["Masked", "2"]
    alts = [find(page, f".stage .{side}").get_attribute("alt") for side in ("left", "right")]
    assert alts == ["Masked of first.png", "Result 2 of first.png"]


# ---- Screens and paper ------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "columns"), [(375, 1), (768, 2), (1200, 2)])
def test_it_fits_the_screen(page, width, columns):
    draw_report.set_screen(page, width, 800)
    load_all(page)
    assert page.execute_script("return document.documentElement.scrollWidth") == width
    compare, pictures = (find(page, selector).rect for selector in (".compare", ".pictures"))
    beside = pictures["x"] >= compare["x"] + compare["width"]
    below = pictures["y"] >= compare["y"] + compare["height"]
    assert (beside, below) == ((False, True) if columns == 1 else (True, False))
    for rect in (compare, pictures):
        assert rect["x"] >= 16 and rect["x"] + rect["width"] <= width - 16
    assert screenshot(page.get_screenshot_as_png()).shape == (800, width, 3)


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_light_or_dark_as_the_user_likes(page, dark):
    draw_report.set_screen(page, 1200, 900, dark=dark)
    pixels = screenshot(page.get_screenshot_as_png())
    paper, ink = pixels[0, 0].mean(), pixels[:100].mean(axis=2)
    assert (paper < 40) == dark and (paper > 240) != dark
    assert (ink.max() if dark else 255 - ink.min()) > 200  # the title stands out


def test_on_paper_there_is_no_slider(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = [find(page, selector).is_displayed() for selector in (".compare", ".pictures img")]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == [False, True]
