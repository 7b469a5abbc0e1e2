"""Draw the report's picture of the README from the demo's report, in headless Chromium.

    python test.py --conf_path confs/demo.yml
    python docs/make/draw_report.py

Needs Chromium and its driver (Debian: apt install chromium chromium-driver) and selenium.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "log/demo/report.html"
PICTURE = ROOT / "data/pictures/report.png"
SIZE = 1180, 650  # as far as the end of the first row
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)


@contextmanager
def open_browser() -> Iterator["Chrome"]:
    """Chromium, with a profile of its own, that asks nothing of the network by itself."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield browser
        finally:
            browser.quit()


def set_screen(browser: "Chrome", width: int, height: int, *, dark: bool = False) -> None:
    """The size of the page in CSS pixels, and whether the user likes dark pages."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def main() -> int:
    from selenium.webdriver import Keys

    if not REPORT.exists():
        print(f"error: no {REPORT}: run the demo first, as said above", file=sys.stderr)
        return 2
    with open_browser() as browser:
        set_screen(browser, *SIZE)
        browser.get(REPORT.as_uri())
        browser.find_element("css selector", "button[title^=Masked]").click()
        browser.find_element("css selector", "input").send_keys(Keys.ARROW_RIGHT * 18)
        screenshot = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    screenshot.convert("RGB").save(PICTURE, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
